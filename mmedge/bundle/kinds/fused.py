"""Fused heads: a head over the embeddings of encoders in other bundles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from mmedge.bundle.kinds.base import KindBase
from mmedge.bundle.tensors import CallerFeed, RoleName
from mmedge.specs import Modality

if TYPE_CHECKING:
    from mmedge.bundle.manifest import Manifest

__all__ = ["FusedKind", "Tap"]


class Tap(BaseModel):
    """What a head reads of an encoder.

    Attributes:
        modality: Of the encoder.
        space: Fingerprint of the embedding space that the head was trained on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    modality: Modality
    space: str = Field(min_length=1, max_length=200)


class FusedKind(KindBase):
    """The section of a fused head.

    Attributes:
        head: Its role.
        taps: By input of the head.
        labels: Names of the classes along the last axis of the first output.
    """

    type: Literal["fused"] = "fused"
    head: RoleName = "head"
    taps: dict[str, Tap] = Field(min_length=1)
    labels: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = ()

    def role_names(self) -> tuple[str, ...]:
        """Return the head's role."""
        return (self.head,)

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield the taps and the classes."""
        for name, tap in self.taps.items():
            yield f"tap {name}", f"{tap.modality.value} embeddings of {tap.space}"
        if self.labels:
            yield "labels", f"{len(self.labels)}"

    def check(self, manifest: Manifest) -> None:
        """Check the taps and labels against the head's inputs and outputs.

        Raises:
            ValueError: If they contradict each other.
        """
        role = manifest.roles[self.head]
        given = {entry.name for entry in role.inputs if isinstance(entry.feed, CallerFeed)}
        if unknown := sorted(self.taps.keys() - given):
            raise ValueError(f"tap {unknown[0]!r} is not an input of {self.head} given by callers")
        classes = role.outputs[0].shape[-1]
        if self.labels and classes != len(self.labels):
            raise ValueError(f"{len(self.labels)} labels for an output of {classes} classes")
