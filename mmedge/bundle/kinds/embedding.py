"""What the sections of kinds that embed share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from mmedge.bundle.kinds.base import KindBase
from mmedge.bundle.kinds.heads import HeadSection
from mmedge.bundle.tensors import RoleName, TensorName
from mmedge.specs import Compare, Modality

if TYPE_CHECKING:
    from mmedge.bundle.manifest import Manifest

__all__ = ["EMBEDDING", "EmbeddingKind", "Label", "TapEntry"]

EMBEDDING = "embedding"
"""The tap that every encoder has: its first output."""

Label = Annotated[str, StringConstraints(min_length=1, max_length=10_000)]


class TapEntry(BaseModel):
    """Hidden states of an encoder, (batch, tokens, width), that heads read.

    Attributes:
        role: The encoder, which has an output of the tap's name.
        blocks: How many of the encoder's blocks the states have passed.
        mask: Output (batch, tokens) bool: which states count; None where all do.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    role: RoleName
    blocks: int = Field(ge=1, le=10_000)
    mask: TensorName | None = None


class EmbeddingKind(KindBase):
    """Base of the sections of kinds whose roles embed into one space.

    Attributes:
        encoders: Role by modality.
        embedding_dim: D of the embedding space.
        taps: Further outputs of the encoders that heads read, by output; the embedding itself is
            one without an entry.
        heads: Heads on the encoders, by role.
    """

    encoders: dict[Modality, RoleName] = Field(min_length=1)
    embedding_dim: int = Field(ge=1, le=1 << 20)
    taps: dict[TensorName, TapEntry] = Field(default_factory=dict)
    heads: dict[RoleName, HeadSection] = Field(default_factory=dict)

    def role_names(self) -> tuple[str, ...]:
        """Return the encoders' roles and those of the heads."""
        return (*self.encoders.values(), *self.heads)

    def files(self) -> Iterator[str]:
        """Yield the files of learned defaults."""
        yield from (head.defaults for head in self.heads.values() if head.defaults is not None)

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield the embedding's size."""
        yield "embedding", f"{self.embedding_dim} dimensions"
        for name, tap in self.taps.items():
            yield f"tap {name}", f"{tap.role} behind {tap.blocks} blocks"
        for name, head in self.heads.items():
            for fact, value in head.facts():
                yield f"{name} {fact}", value

    def check(self, manifest: Manifest) -> None:
        """Check embedding sizes, the encoders' modalities, taps and heads.

        Raises:
            ValueError: If they contradict each other.
        """
        for modality, name in self.encoders.items():
            if (found := manifest.modality(name)) is not modality:
                got = None if found is None else found.value
                raise ValueError(f"{name} is the {modality.value} encoder, and takes {got}")
            output = manifest.roles[name].outputs[0]
            if output.compare is not Compare.ROWS or output.shape[1:] != (self.embedding_dim,):
                raise ValueError(
                    f"{name}: its first output is {output.shape} compared by "
                    f"{output.compare.value}, expected embeddings (batch, {self.embedding_dim}) "
                    "compared by rows"
                )
        for name, head in self.heads.items():
            head.check(name, manifest.roles[name])
        for name, tap in self.taps.items():
            if tap.role not in self.encoders.values():
                raise ValueError(f"tap {name!r} is of {tap.role!r}, which is no encoder")
            outputs = {each.name: each for each in manifest.roles[tap.role].outputs[1:]}
            if name not in outputs or len(outputs[name].shape) != 3:
                raise ValueError(f"tap {name!r}: {tap.role} has no output (batch, tokens, width)")
            if tap.mask is not None and (
                tap.mask not in outputs or outputs[tap.mask].shape != outputs[name].shape[:2]
            ):
                raise ValueError(f"tap {name!r}: {tap.role} has no mask {tap.mask!r} for it")
