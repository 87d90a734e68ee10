"""convert_module() and convert_head(): bundles of a user's own PyTorch modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmedge.bundle.kinds import FusedKind, Kind, ModuleKind
from mmedge.bundle.kinds.fused import Tap
from mmedge.bundle.tensors import CallerFeed, Feed
from mmedge.converters.described import Described
from mmedge.converters.families.base import ModelSpec, RoleSpec
from mmedge.converters.families.onnx_graph import draw_inputs, usual_axes
from mmedge.converters.pipeline import convert_model
from mmedge.converters.progress import ignore_progress
from mmedge.converters.request import read_data
from mmedge.converters.sources.fingerprint import tensors_sha256
from mmedge.converters.sources.source import Source
from mmedge.specs import Axis, Compare, State, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mmedge.converters.config import ConvertConfig
    from mmedge.converters.progress import Progress
    from mmedge.converters.report import ConversionReport
    from mmedge.preprocess.config import ProcessorConfig

__all__ = ["convert_head", "convert_module"]


def convert_module(  # noqa: PLR0913, what a graph is made from
    module: nn.Module,
    config: ConvertConfig,
    *,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    axes: Mapping[str, Axis] | None = None,
    sample: Callable[[Mapping[str, int], int], dict[str, torch.Tensor]] | None = None,
    feeds: Mapping[str, Feed] | None = None,
    compare: Mapping[str, Compare] | None = None,
    processors: Mapping[str, ProcessorConfig] | None = None,
    state: State | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a PyTorch module to a bundle of kind `module`.

    Args:
        module: Takes the inputs in their order; returns one tensor or a tuple in the outputs'.
        config: Settings; `source` is a name for the provenance. Calibration and evaluation data
            are .npz files with an array for each input that callers give.
        inputs: Specs of the inputs; a str in a shape names a dynamic axis.
        outputs: Specs of the outputs.
        axes: Bounds of the dynamic axes; None takes 1 to 8 for a batch and 1 to 512 for others.
        sample: Makes inputs of given sizes from a seed; None draws normal
            floats, and integers 0 or 1.
        feeds: Where inputs come from that no caller gives, by name: a processor, or the state.
        compare: How outputs are compared, by name; None compares all by values.
        processors: Preprocessing by name, for inputs fed by one.
        state: What calls hand to each other.
        progress: Progress callback.

    Raises:
        ConversionError, BackendError, BundleError, StorageError: As for `convert`.
    """
    specs = tuple(inputs)
    bounds = dict(axes or usual_axes(specs))
    role = RoleSpec(
        module=module.eval(),
        inputs=specs,
        outputs=tuple(outputs),
        axes=bounds,
        sample=sample or (lambda sizes, seed: draw_inputs(specs, sizes, seed)),
        trace_sizes={name: max(2, axis.min) for name, axis in bounds.items()},
        proof_sizes=tuple(
            {name: max(n, axis.min) for name, axis in bounds.items()} for n in (1, 3)
        ),
        feeds={item.name: (feeds or {}).get(item.name, CallerFeed()) for item in specs},
        compare=compare or {item.name: Compare.VALUES for item in outputs},
        state=state,
    )
    return _convert(module, config, ModuleKind(), "module", role, processors or {}, progress)


def convert_head(
    module: nn.Module,
    config: ConvertConfig,
    *,
    taps: Mapping[str, tuple[Tap, int]],
    output: TensorSpec,
    labels: Sequence[str] = (),
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a head over embeddings to a bundle of kind `fused`.

    Args:
        module: Takes embeddings (N, D) float32 in the order of `taps`; returns scores.
        config: Settings; `source` is a name for the provenance. Calibration and evaluation data
            are .npz files with embeddings by input, and `labels` for accuracy.
        taps: The encoder's modality and space, and D, by input of the head.
        output: Spec of the scores.
        labels: Names of the classes along the scores' last axis.
        progress: Progress callback.

    Raises:
        ConversionError, BackendError, BundleError, StorageError: As for `convert`.
    """
    inputs = tuple(
        TensorSpec(name, output.dtype, ("batch", width)) for name, (_, width) in taps.items()
    )
    axes = usual_axes(inputs)
    role = RoleSpec(
        module=module.eval(),
        inputs=inputs,
        outputs=(output,),
        axes=axes,
        sample=lambda sizes, seed: draw_inputs(inputs, sizes, seed),
        trace_sizes={"batch": 2},
        proof_sizes=({"batch": 1}, {"batch": 3}),
        feeds={item.name: CallerFeed() for item in inputs},
        compare={output.name: Compare.VALUES},
    )
    kind = FusedKind(taps={name: tap for name, (tap, _) in taps.items()}, labels=tuple(labels))
    return _convert(module, config, kind, kind.head, role, {}, progress)


def _convert(
    module: nn.Module,
    config: ConvertConfig,
    kind: Kind,
    name: str,
    role: RoleSpec,
    processors: Mapping[str, ProcessorConfig],
    progress: Progress | None,
) -> ConversionReport:
    source = Source(Path(), config.source, None, {"model_type": kind.type}, (), {})
    model = ModelSpec(kind, (), {name: lambda: role}, processors)
    described = Described(source, kind.type, model, tensors_sha256(module))
    return convert_model(config, read_data(config), lambda: described, progress or ignore_progress)
