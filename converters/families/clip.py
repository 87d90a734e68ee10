"""CLIP: two transformer towers, causal text pooled at the end token (Radford et al., 2021)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from mmedge.bundle.kinds import ContrastiveHead
from mmedge.converters.families.base import ModelSpec
from mmedge.converters.families.loading import load_model, read_part
from mmedge.converters.families.towers import Tower, dual_encoder, image_role, text_role
from mmedge.converters.sources.config import foreign_errors
from mmedge.converters.sources.reference_processors import read_image_preprocessing
from mmedge.converters.sources.source import Source
from mmedge.converters.sources.tokenizer import (
    backend_json,
    check_tokenizer,
    load_tokenizer,
    longest_text,
)
from mmedge.errors import SourceError
from mmedge.preprocess.config import ImageConfig, TextConfig
from mmedge.specs import Modality

__all__ = ["FAMILY"]

# A config.json from before transformers corrected it: pool at the highest id instead.
_LEGACY_EOS = 2


class _ImageEncoder(nn.Module):
    """pixel_values (B, 3, H, W) float32 -> embedding (B, D) float32, L2-normalised."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401, transformers is untyped
        super().__init__()
        self.tower = getattr(model, "vision_model", model)
        self.projection = getattr(model, "visual_projection", nn.Identity())

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pooled = self.tower(pixel_values=pixel_values).pooler_output
        return nn.functional.normalize(self.projection(pooled), dim=-1)


class _TextEncoder(nn.Module):
    """input_ids (B, T) int64 -> embedding (B, D) float32, L2-normalised.

    No attention mask: the tower is causal and reads the first end token, so what stands behind it
    cannot change the output.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401, transformers is untyped
        super().__init__()
        self.tower = getattr(model, "text_model", model)
        self.projection = getattr(model, "text_projection", nn.Identity())

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        pooled = self.tower(input_ids=input_ids).pooler_output
        return nn.functional.normalize(self.projection(pooled), dim=-1)


class Clip:
    """The CLIP family of transformers: both towers, or one alone with or without projection."""

    name = "clip"

    def matches(self, source: Source) -> bool:
        """Return whether a source is a CLIP or a tower of one."""
        return source.model_type in {"clip", "clip_vision_model", "clip_text_model"}

    def load(self, source: Source) -> nn.Module:
        """Load CLIPModel, or the class of its one tower, in fp32; unreadable files raise."""
        if source.model_type != "clip_text_model":
            _image_config(source)
        if source.model_type != "clip_vision_model":
            _text_config(source, load_tokenizer(source))
        if source.model_type == "clip":
            return load_model(source)
        part = "Vision" if source.model_type == "clip_vision_model" else "Text"
        projected = any(name.endswith("_projection.weight") for name in source.shapes)
        ending = "ModelWithProjection" if projected else "Model"
        return load_model(source, model_class=f"CLIP{part}{ending}")

    def describe(self, source: Source, model: nn.Module | None) -> ModelSpec:
        """Describe the encoders, projection and normalisation inside, and softmax over labels."""
        clip = cast(Any, model)
        projected = hasattr(clip, "visual_projection") or hasattr(clip, "text_projection")
        dim = int(clip.config.projection_dim if projected else clip.config.hidden_size)
        towers = {}
        if source.model_type != "clip_text_model":
            towers[Modality.IMAGE] = _image_tower(source, clip, dim)
        if source.model_type != "clip_vision_model":
            towers[Modality.TEXT] = _text_tower(source, clip, dim)
        if len(towers) == 1:
            return dual_encoder(towers, dim, None)
        scale = float(clip.logit_scale.exp())
        return dual_encoder(towers, dim, ContrastiveHead(activation="softmax", logit_scale=scale))


def _image_tower(source: Source, clip: Any, dim: int) -> Tower:  # noqa: ANN401
    config = getattr(clip.config, "vision_config", clip.config)
    return Tower(
        role=lambda: image_role(_ImageEncoder(clip), config, dim),
        processor=_image_config(source),
        reference=getattr(clip, "get_image_features", clip.forward),
    )


def _text_tower(source: Source, clip: Any, dim: int) -> Tower:  # noqa: ANN401
    tokenizer = load_tokenizer(source)
    processor = _text_config(source, tokenizer)
    config = getattr(clip.config, "text_config", clip.config)

    def close(ids: torch.Tensor) -> None:
        """End every row with the token that the tower pools at, and nowhere else."""
        eos = int(config.eos_token_id)
        end = int(config.vocab_size) - 1 if eos == _LEGACY_EOS else eos
        ids[ids == end] = 0 if end else 1
        ids[:, -1] = end

    return Tower(
        role=lambda: text_role(_TextEncoder(clip), config, dim, dynamic_sequence=True, close=close),
        processor=processor,
        reference=getattr(clip, "get_text_features", clip.forward),
        files={"tokenizer.json": backend_json(source, tokenizer).encode()},
    )


def _image_config(source: Source) -> ImageConfig:
    side = read_part(source, "vision_config").integer("image_size", 1, 1 << 14)
    return read_image_preprocessing(source, side)


def _text_config(source: Source, tokenizer: Any) -> TextConfig:  # noqa: ANN401
    """Return truncation to the context length and padding to the longest text of a call."""
    text = read_part(source, "text_config")
    rows = text.integer("vocab_size", 1, 1 << 24)
    check_tokenizer(source, tokenizer, rows)
    length = longest_text(source, tokenizer, text.integer("max_position_embeddings", 1, 1 << 20))
    closing = _check_end_token(source, tokenizer, text.integer("eos_token_id", 0, rows - 1))
    return TextConfig(
        max_length=length,
        padding="longest",
        # Without a padding token any will do: nothing behind the end token counts.
        pad_id=closing if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id),
    )


def _check_end_token(source: Source, tokenizer: Any, eos: int) -> int:  # noqa: ANN401
    """Return the token that closes every text, checked to be the one that the tower pools at."""
    with foreign_errors(f"{source.name}: its tokenizer rejects a text", "Correct its files."):
        closing = int((tokenizer("")["input_ids"] or [-1])[-1])
    pad = closing if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    if eos == _LEGACY_EOS:
        # Pooled at the highest id: right only if no other token has a higher one.
        if closing != len(tokenizer) - 1 or pad > closing:
            raise SourceError(
                f"{source.name}: config.json has the old eos_token_id {_LEGACY_EOS}, which pools "
                f"at the highest token id, but the closing token has id {closing} of "
                f"{len(tokenizer)}. Set text_config.eos_token_id to {closing}."
            )
    elif closing != eos:
        raise SourceError(
            f"{source.name}: the model pools at token id {eos}, but its tokenizer closes a text "
            f"with id {closing}. Correct text_config.eos_token_id or the tokenizer."
        )
    return closing


FAMILY = Clip()
