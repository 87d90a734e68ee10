"""Encoders of one modality, with or without a classification head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmedge.bundle.kinds.embedding import EmbeddingKind, Label
from mmedge.bundle.tensors import RoleName
from mmedge.specs import Compare, Modality, Task

if TYPE_CHECKING:
    from mmedge.bundle.manifest import Manifest

__all__ = ["ClassHead", "EncoderKind"]


class ClassHead(BaseModel):
    """The classes of an encoder's second output, `logits` (batch, L).

    Attributes:
        labels: L names; one may occur twice, as "crane" does in ImageNet.
        activation: `softmax` where an image has one label, `sigmoid` where it may have several.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    labels: Annotated[tuple[Label, ...], Field(min_length=1, max_length=1 << 17)]
    activation: Literal["softmax", "sigmoid"] = "softmax"


class EncoderKind(EmbeddingKind):
    """The section of an encoder.

    Attributes:
        class_head: None without a classification head.
    """

    type: Literal["encoder"] = "encoder"
    encoders: dict[Modality, RoleName] = Field(min_length=1, max_length=1)
    class_head: ClassHead | None = None

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield the embedding's size and the classes."""
        yield from super().facts()
        if (head := self.class_head) is not None:
            yield "classes", f"{len(head.labels)}, {head.activation}"

    def check(self, manifest: Manifest) -> None:
        """Check the embedding, the logits and the task.

        Raises:
            ValueError: If they contradict each other.
        """
        super().check(manifest)
        if (Task.IMAGE_CLASSIFICATION in manifest.tasks) != (self.class_head is not None):
            raise ValueError("image classification and a class_head need each other")
        if self.class_head is None:
            return
        ((modality, name),) = self.encoders.items()
        outputs = manifest.roles[name].outputs
        shape = ("batch", len(self.class_head.labels))
        if (
            modality is not Modality.IMAGE
            or len(outputs) < 2
            or outputs[1].shape != shape
            or outputs[1].compare is not Compare.TOKENS
        ):
            raise ValueError(
                f"{name}: a class_head of {shape[1]} labels needs an image encoder whose second "
                f"output is {shape}, compared by tokens"
            )
