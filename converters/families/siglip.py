"""SigLIP: sigmoid scores, text of fixed length pooled at the last token (Zhai et al., 2023)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from mmedge.bundle.kinds import ContrastiveHead
from mmedge.converters.families.base import ModelSpec, RoleSpec
from mmedge.converters.families.loading import load_model, read_part
from mmedge.converters.families.towers import Tower, dual_encoder, image_role, text_role
from mmedge.converters.sources.reference_processors import read_image_preprocessing
from mmedge.converters.sources.sentencepiece import is_sentencepiece, unigram_json
from mmedge.converters.sources.source import Source
from mmedge.converters.sources.tokenizer import (
    backend_json,
    check_tokenizer,
    load_tokenizer,
    tokenizer_fields,
)
from mmedge.preprocess.config import ImageConfig, TextConfig
from mmedge.specs import Modality

__all__ = ["FAMILY"]

_MASK = "attention_mask"


class _ImageEncoder(nn.Module):
    """pixel_values (B, 3, H, W) float32 -> embedding (B, D) float32, L2-normalised."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401, transformers is untyped
        super().__init__()
        self.tower = getattr(model, "vision_model", model)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # Pooled by the tower's own attention head.
        return nn.functional.normalize(self.tower(pixel_values).pooler_output, dim=-1)


class _TextEncoder(nn.Module):
    """input_ids (B, T) int64, T the context length -> embedding (B, D) float32, L2-normalised.

    The model was trained to see its padding, and is masked only where its tokenizer emits a mask.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401, transformers is untyped
        super().__init__()
        self.tower = getattr(model, "text_model", model)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        pooled = self.tower(input_ids, attention_mask=attention_mask).pooler_output
        return nn.functional.normalize(pooled, dim=-1)


class Siglip:
    """The SigLIP family of transformers, fixed resolution: both towers, or one alone."""

    name = "siglip"

    def matches(self, source: Source) -> bool:
        """Return whether a source is a SigLIP or a tower of one."""
        return source.model_type in {"siglip", "siglip_vision_model", "siglip_text_model"}

    def load(self, source: Source) -> nn.Module:
        """Load SiglipModel, or the class of its one tower, in fp32; unreadable files raise."""
        if source.model_type != "siglip_text_model":
            _image_config(source)
        if source.model_type != "siglip_vision_model":
            _text_config(source, load_tokenizer(source))
        if source.model_type == "siglip":
            return load_model(source)
        part = "Vision" if source.model_type == "siglip_vision_model" else "Text"
        return load_model(source, model_class=f"Siglip{part}Model")

    def describe(self, source: Source, model: nn.Module | None) -> ModelSpec:
        """Describe the encoders, normalisation inside, and a sigmoid for each pair."""
        siglip = cast(Any, model)
        config = getattr(siglip.config, "text_config", siglip.config)
        # The text head projects to the width of the vision tower.
        dim = int(getattr(config, "projection_size", config.hidden_size))
        towers = {}
        if source.model_type != "siglip_text_model":
            towers[Modality.IMAGE] = _image_tower(source, siglip, dim)
        if source.model_type != "siglip_vision_model":
            towers[Modality.TEXT] = _text_tower(source, siglip, dim)
        if len(towers) == 1:
            return dual_encoder(towers, dim, None)
        head = ContrastiveHead(
            activation="sigmoid",
            logit_scale=float(siglip.logit_scale.exp()),
            logit_bias=float(siglip.logit_bias),
        )
        return dual_encoder(towers, dim, head)


def _image_tower(source: Source, siglip: Any, dim: int) -> Tower:  # noqa: ANN401
    config = getattr(siglip.config, "vision_config", siglip.config)
    return Tower(
        role=lambda: image_role(_ImageEncoder(siglip), config, dim),
        processor=_image_config(source),
        reference=getattr(siglip, "get_image_features", siglip.forward),
    )


def _text_tower(source: Source, siglip: Any, dim: int) -> Tower:  # noqa: ANN401
    tokenizer = load_tokenizer(source)
    processor = _text_config(source, tokenizer)
    config = getattr(siglip.config, "text_config", siglip.config)
    folds = is_sentencepiece(tokenizer)
    content = unigram_json(source, tokenizer) if folds else backend_json(source, tokenizer)

    def role() -> RoleSpec:
        masked = processor.attention_mask is not None
        return text_role(_TextEncoder(siglip), config, dim, dynamic_sequence=False, masked=masked)

    return Tower(
        role=role,
        processor=processor,
        reference=getattr(siglip, "get_text_features", siglip.forward),
        files={"tokenizer.json": content.encode()},
    )


def _image_config(source: Source) -> ImageConfig:
    vision = read_part(source, "vision_config")
    if vision.values.get("vision_use_head", True) is not True:
        raise vision.error("vision_use_head", "true: the head's output is the embedding")
    return read_image_preprocessing(source, vision.integer("image_size", 1, 1 << 14))


def _text_config(source: Source, tokenizer: Any) -> TextConfig:  # noqa: ANN401
    """Return padding to the context length, which the model was trained with."""
    text = read_part(source, "text_config")
    rows = text.integer("vocab_size", 1, 1 << 24)
    check_tokenizer(source, tokenizer, rows)
    return TextConfig(
        max_length=text.integer("max_position_embeddings", 1, 1 << 20),
        padding="max_length",
        # transformers masks the padding where the tokenizer gives a mask, as its default does.
        attention_mask=_MASK if _MASK in tokenizer.model_input_names else None,
        pad_id=tokenizer_fields(source, tokenizer).integer("pad_token_id", 0, rows - 1),
        # SigLIP 2 at a fixed resolution is of this family with a tokenizer that folds itself.
        canonicalize=is_sentencepiece(tokenizer),
    )


FAMILY = Siglip()
