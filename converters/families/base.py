"""Model families and model specifications."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mmedge.bundle.kinds import Kind
from mmedge.bundle.tensors import Feed, ProcessorFeed
from mmedge.converters.sources.source import Source
from mmedge.preprocess.config import ProcessorConfig
from mmedge.specs import Axis, Compare, State, Task, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Family", "ModelSpec", "RoleSpec", "TapPoint"]


@dataclass(frozen=True)
class TapPoint:
    """States between the blocks of a module, which heads can read.

    Attributes:
        blocks: Path of the list of blocks in the module.
        count: How many blocks there are.
        shape: (tokens, width) of the states without the batch axis; tokens may be an axis.
        skip: Leading states that are left out.
        mask: Makes the mask of the states (B, S) bool from the module's inputs; None where all
            of them count.
    """

    blocks: str
    count: int
    shape: tuple[int | str, int]
    skip: int = 0
    mask: Callable[..., torch.Tensor] | None = None


@dataclass(frozen=True)
class RoleSpec:
    """One graph: a module with its export, calibration and comparison settings.

    Attributes:
        module: Takes the inputs in their order, returns the outputs in theirs; None where `graph`
            is the source.
        graph: An ONNX file whose fp32 outputs are the reference; None where `module` is the source.
        inputs: Specs of the inputs; a str in a shape is a dynamic axis.
        outputs: Specs of the outputs.
        axes: Bounds of the inputs' dynamic axes, by name.
        sample: Makes inputs of the given sizes of the dynamic axes from a seed.
        trace_sizes: Sizes to trace with; 2 or more, since 0 and 1 are specialised.
        proof_sizes: Further sizes at which the exported graph must agree with the module.
        feeds: Where each input comes from, by name.
        compare: How each output is compared, by name; NONE for those that are not named.
        state: What calls hand to each other.
        taps: Taps that a conversion can add as outputs, by name.
        tapped: Outputs that are such taps, with their masks; evaluations do not collect them.
    """

    module: nn.Module | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: Mapping[str, Axis]
    sample: Callable[[Mapping[str, int], int], dict[str, torch.Tensor]]
    trace_sizes: Mapping[str, int]
    proof_sizes: tuple[Mapping[str, int], ...]
    feeds: Mapping[str, Feed]
    compare: Mapping[str, Compare]
    graph: Path | None = None
    state: State | None = None
    taps: Mapping[str, TapPoint] = field(default_factory=dict)
    tapped: frozenset[str] = frozenset()

    @property
    def processors(self) -> tuple[str, ...]:
        """Names of the processors that feed it, each once."""
        feeds = (feed.processor for feed in self.feeds.values() if isinstance(feed, ProcessorFeed))
        return tuple(dict.fromkeys(feeds))

    @property
    def batch_axis(self) -> Axis | None:
        """The dynamic axis that every input begins with; None where there is no such axis."""
        first = {item.shape[0] if item.shape else None for item in self.inputs}
        name = first.pop() if len(first) == 1 else None
        return self.axes.get(name) if isinstance(name, str) else None

    def compared(self, name: str) -> Compare:
        """Return the comparison of an output."""
        return self.compare.get(name, Compare.NONE)

    @property
    def verified(self) -> frozenset[str]:
        """Outputs that must agree with the source's, state included."""
        names = (item.name for item in self.outputs)
        return frozenset(n for n in names if self.compared(n) is not Compare.UNORDERED)


@dataclass(frozen=True)
class ModelSpec:
    """Description of one loaded model.

    Attributes:
        kind: The typed section of the manifest.
        tasks: What a bundle of it can be used for.
        roles: Made one at a time, so that each one's weights can be freed, by role name; a role
            that another feeds comes after it.
        processors: Frozen preprocessing by name.
        files: Files of the bundle that the processors read, by path: tokenizer.json, ...
        references: The source's own model by role, for roles that one processor feeds: called by
            keyword with what the source's own processor gives.
        reference_processors: Whether transformers opens the source's processors, so that the frozen
            ones are compared with them.
    """

    kind: Kind
    tasks: tuple[Task, ...]
    roles: Mapping[str, Callable[[], RoleSpec]]
    processors: Mapping[str, ProcessorConfig] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    references: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    reference_processors: bool = True


class Family(Protocol):
    """Converter of one family of models."""

    @property
    def name(self) -> str:
        """The family's name in the manifest."""
        ...

    def matches(self, source: Source) -> bool:
        """Return whether a source is of this family, from its configuration alone."""
        ...

    def load(self, source: Source) -> nn.Module | None:
        """Load the model in fp32, ready for inference; None where there is no module to load.

        Raises:
            SourceError: If the weights do not fit the architecture.
        """
        ...

    def describe(self, source: Source, model: nn.Module | None) -> ModelSpec:
        """Describe a loaded model.

        Raises:
            SourceError: If a processor is missing or does not fit the model.
        """
        ...
