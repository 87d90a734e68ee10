"""Description of a source's model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mmedge.converters.families import family_of
from mmedge.converters.families.base import ModelSpec
from mmedge.converters.progress import Progress, ProgressEvent
from mmedge.converters.sources.fingerprint import computing_config, tensors_sha256
from mmedge.converters.sources.source import Source

__all__ = ["Described", "describe"]


@dataclass(frozen=True)
class Described:
    """A source, opened and described.

    Attributes:
        source: For the provenance, and the reference of its processors.
        family: The family's name.
        model: The model.
        weights_sha256: Hash of its weights.
        computed: What else its outputs depend on.
    """

    source: Source
    family: str
    model: ModelSpec
    weights_sha256: str
    computed: Mapping[str, object] = field(default_factory=dict)


def describe(source: Source, progress: Progress) -> Described:
    """Load a source's weights and describe the model.

    Raises:
        SourceError: If it cannot be read, or no family knows it.
    """
    family = family_of(source)
    progress(ProgressEvent("Load the weights", 0, 1))
    module = family.load(source)
    model = family.describe(source, module)
    if module is None:
        return Described(source, family.name, model, source.sha256())
    computed = computing_config(module.config)
    return Described(source, family.name, model, tensors_sha256(module), computed)
