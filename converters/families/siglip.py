"""SigLIP: sigmoid scores, text of fixed length pooled at the last token (Zhai et al., 2023)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from mmedge.bundle.kinds import ContrastiveHead, DualEncoderKind
from mmedge.converters.families.base import ModelSpec
from mmedge.converters.families.loading import load_model, read_part
from mmedge.converters.families.towers import image_role, text_role
from mmedge.converters.sources.reference_processors import read_image_preprocessing
from mmedge.converters.sources.sentencepiece import is_sentencepiece, unigram_json
from mmedge.converters.sources.source import Source
from mmedge.converters.sources.tokenizer import (
    backend_json,
    check_tokenizer,
    load_tokenizer,
    tokenizer_fields,
)
from mmedge.preprocess.config import TextConfig
from mmedge.specs import Modality, Task

__all__ = ["FAMILY"]


class _ImageEncoder(nn.Module):
    """pixel_values (B, 3, H, W) float32 -> embedding (B, D) float32, L2-normalised."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401, SiglipModel; transformers is untyped
        super().__init__()
        self.tower = model.vision_model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # Pooled by the tower's own attention head.
        return nn.functional.normalize(self.tower(pixel_values).pooler_output, dim=-1)


class _TextEncoder(nn.Module):
    """input_ids (B, T) int64, T the context length -> embedding (B, D) float32, L2-normalised.

    No attention mask: the model was trained to see its padding.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401, SiglipModel; transformers is untyped
        super().__init__()
        self.tower = model.text_model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.tower(input_ids).pooler_output, dim=-1)


class Siglip:
    """The SigLIP family of transformers (`model_type` "siglip", fixed resolution)."""

    name = "siglip"

    def matches(self, source: Source) -> bool:
        """Tell whether a source is a SigLIP."""
        return source.model_type == "siglip"

    def load(self, source: Source) -> nn.Module:
        """Load SiglipModel in fp32."""
        return load_model(source)

    def describe(self, source: Source, model: nn.Module | None) -> ModelSpec:
        """Describe both encoders, normalisation inside, and a sigmoid for each pair."""
        siglip = cast(Any, model)
        # The width of the vision tower, which the text head projects to.
        dim = int(siglip.config.vision_config.hidden_size)
        tokenizer = load_tokenizer(source)
        folds = is_sentencepiece(tokenizer)
        content = unigram_json(source, tokenizer) if folds else backend_json(source, tokenizer)
        side = read_part(source, "vision_config").integer("image_size", 1, 1 << 14)
        return ModelSpec(
            kind=DualEncoderKind(
                encoders={Modality.IMAGE: "image_encoder", Modality.TEXT: "text_encoder"},
                embedding_dim=dim,
                contrastive_head=ContrastiveHead(
                    activation="sigmoid",
                    logit_scale=float(siglip.logit_scale.exp()),
                    logit_bias=float(siglip.logit_bias),
                ),
            ),
            tasks=(Task.RETRIEVAL, Task.ZERO_SHOT_CLASSIFICATION),
            roles={
                "image_encoder": lambda: image_role(_ImageEncoder(siglip), siglip.config, dim),
                "text_encoder": lambda: text_role(
                    _TextEncoder(siglip), siglip.config, dim, dynamic_sequence=False
                ),
            },
            processors={
                "image": read_image_preprocessing(source, side),
                "text": _text_config(source, tokenizer),
            },
            files={"tokenizer.json": content.encode()},
        )


def _text_config(source: Source, tokenizer: Any) -> TextConfig:  # noqa: ANN401
    """Return padding to the context length, which the model was trained with."""
    text = read_part(source, "text_config")
    rows = text.integer("vocab_size", 1, 1 << 24)
    check_tokenizer(source, tokenizer, rows)
    return TextConfig(
        max_length=text.integer("max_position_embeddings", 1, 1 << 20),
        padding="max_length",
        pad_id=tokenizer_fields(source, tokenizer).integer("pad_token_id", 0, rows - 1),
        # SigLIP 2 at a fixed resolution is of this family with a tokenizer that folds itself.
        canonicalize=is_sentencepiece(tokenizer),
    )


FAMILY = Siglip()
