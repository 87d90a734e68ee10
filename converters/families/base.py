"""What a model family says about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from mmedge.bundle.manifest import ContrastiveHead
from mmedge.converters.sources.source import Source
from mmedge.preprocess.config import ImageConfig, TextConfig
from mmedge.specs import Compare, Modality, Task, TensorSpec

__all__ = ["ExportSpec", "Family"]


@dataclass(frozen=True)
class ExportSpec:
    """One role: a module and what is needed to trace it and to prove it.

    Attributes:
        modality: What the role takes in.
        module: Takes the inputs in their order and returns the only output.
        inputs: Specs of the inputs; a str in a shape is a dynamic axis.
        outputs: Specs of the outputs.
        limits: Largest size of each dynamic axis that has one ("sequence").
        compare: How each output is compared with the reference's; the graph says so too.
        sample: Makes inputs of the given sizes of the dynamic axes from a seed.
        trace_sizes: Sizes to trace with; 2 or more, since 0 and 1 are specialised.
        proof_sizes: Further sizes at which the exported graph must agree with the module.
    """

    modality: Modality
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sample: Callable[[Mapping[str, int], int], dict[str, torch.Tensor]]
    trace_sizes: Mapping[str, int]
    proof_sizes: tuple[Mapping[str, int], ...]
    limits: Mapping[str, int]
    compare: Mapping[str, Compare] = field(default_factory=dict)


class Family(Protocol):
    """How one kind of model becomes the roles of a bundle."""

    @property
    def name(self) -> str:
        """The family's name in the manifest."""
        ...

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What a bundle of this family can be used for."""
        ...

    def matches(self, source: Source) -> bool:
        """Say whether the source is of this family."""
        ...

    def load(self, source: Source) -> nn.Module:
        """Load the model in fp32, ready for inference.

        Raises:
            SourceError: If the weights do not fit the architecture.
        """
        ...

    def roles(self, model: nn.Module) -> Mapping[str, ExportSpec]:
        """Return what is to be exported, by role name."""
        ...

    def embedding_dim(self, model: nn.Module) -> int:
        """Return D of the shared embedding space."""
        ...

    def head(self, model: nn.Module) -> ContrastiveHead:
        """Return how similarities become scores."""
        ...

    def image_preprocessing(self, source: Source) -> ImageConfig:
        """Return the frozen image preprocessing.

        Raises:
            SourceError: If it is missing or asks for a step that mmedge does not have.
        """
        ...

    def text_preprocessing(self, source: Source) -> TextConfig:
        """Return the frozen text preprocessing.

        Raises:
            SourceError: If the tokenizer is missing or does not fit the model.
        """
        ...

    def tokenizer_json(self, source: Source) -> str:
        """Return the content of the bundle's `tokenizer.json`, without padding or truncation.

        Raises:
            SourceError: If the tokenizer is missing or cannot be converted.
        """
        ...
