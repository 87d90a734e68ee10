"""Dual encoders: encoders of two modalities, or one, into one embedding space."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmedge.bundle.kinds.embedding import EmbeddingKind, Label
from mmedge.bundle.tensors import RoleFeed, RoleName
from mmedge.specs import Compare, Modality, Task

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
        prompter: Role that adapts the embeddings of labels to a video before they are compared with
            the video's (X-CLIP): inputs `projected` (labels, D), of the text encoder, and `context`
            (batch, P, D), of the video encoder; output (batch, labels, D). None where labels are
            compared as they are.
    """

    type: Literal["dual_encoder"] = "dual_encoder"
    contrastive_head: ContrastiveHead | None = None
    label_banks: dict[str, Labels] = Field(default_factory=dict)
    prompter: RoleName | None = None

    def role_names(self) -> tuple[str, ...]:
        """Return the encoders' roles, and the prompter if there is one."""
        return (*super().role_names(), *(() if self.prompter is None else (self.prompter,)))

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
        if self.prompter is not None:
            self._check_prompter(self.prompter, manifest)

    def _check_prompter(self, name: str, manifest: Manifest) -> None:
        role = manifest.roles[name]
        fed = {entry.name: entry.feed for entry in role.inputs}
        expected = {
            "projected": self.encoders.get(Modality.TEXT),
            "context": self.encoders.get(Modality.VIDEO),
        }
        given = {key: isinstance(f, RoleFeed) and (f.role, f.output) for key, f in fed.items()}
        if given != {key: (encoder, key) for key, encoder in expected.items()}:
            raise ValueError(
                f"{name}: expected inputs 'projected' of the text encoder and 'context' of the "
                "video encoder"
            )
        output = role.outputs[0]
        if output.compare is not Compare.ROWS or output.shape[2:] != (self.embedding_dim,):
            raise ValueError(
                f"{name}: its first output is {output.shape} compared by {output.compare.value}, "
                f"expected embeddings (batch, labels, {self.embedding_dim}) compared by rows"
            )
