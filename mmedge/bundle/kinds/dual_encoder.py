"""Dual encoders: encoders of two modalities, or one, into one embedding space."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmedge.bundle.kinds.embedding import EmbeddingKind, Label
from mmedge.specs import Task

if TYPE_CHECKING:
    from mmedge.bundle.manifest import Manifest

__all__ = ["ContrastiveHead", "DualEncoderKind"]

Labels = Annotated[tuple[Label, ...], Field(min_length=1)]


class ContrastiveHead(BaseModel):
    """How similarities become scores: logits = scale * (image @ text) + bias.

    Attributes:
        activation: `softmax` over the labels (CLIP) or `sigmoid` for each pair (SigLIP).
        logit_scale: The factor itself, not its logarithm.
        logit_bias: Added after the scale.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    activation: Literal["softmax", "sigmoid"]
    logit_scale: float = Field(gt=0, le=1e6)
    logit_bias: float = Field(default=0.0, ge=-1e6, le=1e6)


class DualEncoderKind(EmbeddingKind):
    """The section of a dual encoder.

    Attributes:
        contrastive_head: None where the model has none, as where one encoder stands alone.
        label_banks: Lists of labels by name.
    """

    type: Literal["dual_encoder"] = "dual_encoder"
    contrastive_head: ContrastiveHead | None = None
    label_banks: dict[str, Labels] = Field(default_factory=dict)

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield the embedding's size, how cosines become scores, and the label banks."""
        yield from super().facts()
        if (head := self.contrastive_head) is not None:
            bias = f" {head.logit_bias:+.4g}" if head.logit_bias else ""
            yield "scores", f"{head.activation}({head.logit_scale:.4g} * cosine{bias})"
        for name, labels in self.label_banks.items():
            yield "labels", f"{name} ({len(labels)})"

    def check(self, manifest: Manifest) -> None:
        """Check embedding sizes, the encoders' modalities, and what the tasks need.

        Raises:
            ValueError: If they contradict each other.
        """
        if Task.ZERO_SHOT_CLASSIFICATION in manifest.tasks and self.contrastive_head is None:
            raise ValueError("zero-shot classification needs a contrastive_head")
        super().check(manifest)
