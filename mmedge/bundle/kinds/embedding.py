"""What the sections of kinds that embed share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, StringConstraints

from mmedge.bundle.kinds.base import KindBase
from mmedge.bundle.tensors import RoleName
from mmedge.specs import Compare, Modality

if TYPE_CHECKING:
    from mmedge.bundle.manifest import Manifest

__all__ = ["EmbeddingKind", "Label"]

Label = Annotated[str, StringConstraints(min_length=1, max_length=10_000)]


class EmbeddingKind(KindBase):
    """Base of the sections of kinds whose roles embed into one space.

    Attributes:
        encoders: Role by modality.
        embedding_dim: D of the embedding space.
    """

    encoders: dict[Modality, RoleName] = Field(min_length=1)
    embedding_dim: int = Field(ge=1, le=1 << 20)

    def role_names(self) -> tuple[str, ...]:
        """Return the encoders' roles."""
        return tuple(self.encoders.values())

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield the embedding's size."""
        yield "embedding", f"{self.embedding_dim} dimensions"

    def check(self, manifest: Manifest) -> None:
        """Check embedding sizes and the encoders' modalities.

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
