"""Detectors: boxes of objects that texts or images name, or of fixed classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, StringConstraints

from mmedge.bundle.kinds.base import KindBase
from mmedge.bundle.tensors import RoleName
from mmedge.specs import Modality

if TYPE_CHECKING:
    from mmedge.bundle.manifest import Manifest

__all__ = ["OBJECTNESS", "DetectorKind"]

OBJECTNESS = "objectness"
"""Output with the objectness of each patch; not every open detector has one."""

_OPEN = ("class_embeddings", "boxes", "shift", "scale")
_CLOSED = ("logits", "boxes")


class DetectorKind(KindBase):
    """The section of a detector.

    Boxes are (centre x, centre y, width, height), as fractions of the image that the model sees.

    Attributes:
        image_encoder: From an image to `class_embeddings`, `boxes`, `shift` and `scale` of its
            patches where texts name the classes, else to `logits` and `boxes`.
        text_encoder: From texts to queries; None where the classes are fixed.
        labels: Names of the fixed classes, one for each of the logits.
        threshold: Score above which a box is a detection, where a caller gives none.
    """

    type: Literal["detector"] = "detector"
    image_encoder: RoleName = "image_encoder"
    text_encoder: RoleName | None = None
    labels: tuple[Annotated[str, StringConstraints(min_length=1, max_length=10_000)], ...] = ()
    threshold: float = Field(ge=0, lt=1)

    def role_names(self) -> tuple[str, ...]:
        """Return the image encoder, and the text encoder if there is one."""
        texts = () if self.text_encoder is None else (self.text_encoder,)
        return (*texts, self.image_encoder)

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield what it detects, and the threshold."""
        fixed = f"{len(self.labels)} classes: {', '.join(self.labels[:4])}"
        fixed += ", ..." if len(self.labels) > 4 else ""
        yield "detects", "what texts or images name" if self.text_encoder else fixed
        yield "threshold", f"{self.threshold:g}"

    def check(self, manifest: Manifest) -> None:
        """Check outputs, processors and labels.

        Raises:
            ValueError: If they contradict each other.
        """
        shapes = {out.name: out.shape for out in manifest.roles[self.image_encoder].outputs}
        expected = _CLOSED if self.text_encoder is None else _OPEN
        if missing := [name for name in expected if name not in shapes]:
            raise ValueError(f"{self.image_encoder}: has no output {missing[0]!r}")
        if shapes["boxes"][-1] != 4:
            raise ValueError(f"{self.image_encoder}: boxes are {shapes['boxes']}, expected 4 each")
        modalities = {self.image_encoder: Modality.IMAGE}
        if self.text_encoder is not None:
            modalities[self.text_encoder] = Modality.TEXT
            query = manifest.roles[self.text_encoder].outputs[0].shape[-1]
            if query != shapes["class_embeddings"][-1] or self.labels:
                raise ValueError(
                    f"queries of {query}, class embeddings of {shapes['class_embeddings'][-1]} "
                    f"values and {len(self.labels)} fixed labels; expected equal sizes and no label"
                )
        elif shapes["logits"][-1] != len(self.labels):
            raise ValueError(f"{len(self.labels)} labels for {shapes['logits'][-1]} logits")
        for role, modality in modalities.items():
            if manifest.modality(role) is not modality:
                raise ValueError(f"{role}: has no processor of {modality.value}s")
