"""Dual encoders: encoders of two modalities, or one, into one embedding space."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from mmedge.bundle.kinds.base import KindBase
from mmedge.bundle.tensors import RoleName
from mmedge.specs import Compare, Modality, Task

if TYPE_CHECKING:
    from mmedge.bundle.manifest import Manifest

__all__ = ["ContrastiveHead", "DualEncoderKind"]

Label = Annotated[str, StringConstraints(min_length=1, max_length=10_000)]
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


class DualEncoderKind(KindBase):
    """The section of a dual encoder.

    Attributes:
        encoders: Role by modality.
        embedding_dim: D of the shared embedding space.
        contrastive_head: None where the model has none, as where one encoder stands alone.
        label_banks: Lists of labels by name.
    """

    type: Literal["dual_encoder"] = "dual_encoder"
    encoders: dict[Modality, RoleName] = Field(min_length=1)
    embedding_dim: int = Field(ge=1, le=1 << 20)
    contrastive_head: ContrastiveHead | None = None
    label_banks: dict[str, Labels] = Field(default_factory=dict)

    def role_names(self) -> tuple[str, ...]:
        """Return the encoders' roles."""
        return tuple(self.encoders.values())

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield the embedding's size, how cosines become scores, and the label banks."""
        yield "embedding", f"{self.embedding_dim} dimensions"
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
