"""SigLIP, SigLIP 2: sigmoid scores, text pooled at its last token (Zhai et al., 2023)."""

from __future__ import annotations

from typing import Any

from mmedge.bundle.kinds import ContrastiveHead
from mmedge.converters.families.loading import read_part
from mmedge.converters.families.naflex import naflex_role
from mmedge.converters.families.towers import ImageTextFamily, TextEncoder, Tower, text_role
from mmedge.converters.sources.config import Fields
from mmedge.converters.sources.reference_processors import read_patch_preprocessing
from mmedge.converters.sources.sentencepiece import is_sentencepiece, unigram_json
from mmedge.converters.sources.source import Source
from mmedge.converters.sources.tokenizer import (
    backend_json,
    check_tokenizer,
    load_tokenizer,
    tokenizer_fields,
)
from mmedge.preprocess.config import ImageConfig, TextConfig
from mmedge.preprocess.steps import MAX_PATCHES

__all__ = ["FAMILY", "NAFLEX"]

_MASK = "attention_mask"


class Siglip(ImageTextFamily):
    """SigLIP at a fixed resolution; the image tower has an attention head of its own."""

    name = "siglip"

    def model_class(self, source: Source) -> str | None:
        """Return the class of one tower."""
        if source.model_type == self.name:
            return None
        part = "Vision" if self._has(source, "vision") else "Text"
        return f"{self.name.capitalize()}{part}Model"

    def dim(self, model: Any) -> int:  # noqa: ANN401, transformers is untyped
        """Return the width of the vision tower, which the text head projects to."""
        config = getattr(model.config, "text_config", model.config)
        return int(getattr(config, "projection_size", config.hidden_size))

    def head(self, model: Any) -> ContrastiveHead:  # noqa: ANN401
        """Return a sigmoid for each pair."""
        return ContrastiveHead(
            activation="sigmoid",
            logit_scale=float(model.logit_scale.exp()),
            logit_bias=float(model.logit_bias),
        )

    def image_config(self, source: Source) -> ImageConfig:
        """Return the source's own preprocessing."""
        _check_head(read_part(source, "vision_config"))
        return super().image_config(source)

    def text_config(self, source: Source, tokenizer: Any) -> TextConfig:  # noqa: ANN401
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
            cleaning="siglip" if is_sentencepiece(tokenizer) else None,
        )

    def text_tower(self, source: Source, model: Any, dim: int) -> Tower:  # noqa: ANN401
        """Return the text tower, masked only where its tokenizer emits a mask."""
        tokenizer = load_tokenizer(source)
        processor = self.text_config(source, tokenizer)
        config = getattr(model.config, "text_config", model.config)
        content = (unigram_json if processor.cleaning else backend_json)(source, tokenizer)
        masked, encoder = processor.attention_mask is not None, TextEncoder(model)
        closing = tokenizer.eos_token_id
        end = processor.pad_id if closing is None else int(closing)
        return Tower(
            role=lambda: text_role(
                encoder, config, dim, dynamic_sequence=False, masked=masked, end=end
            ),
            processor=processor,
            reference=getattr(model, "get_text_features", model.forward),
            files={"tokenizer.json": content.encode()},
        )


class Naflex(Siglip):
    """SigLIP 2 NaFlex: images as patches of a budget, at about their own aspect ratio."""

    name = "siglip2"

    def image_config(self, source: Source) -> ImageConfig:
        """Return the source's own preprocessing, with the budget of its processor."""
        vision = read_part(source, "vision_config")
        _check_head(vision)
        size = vision.integer("patch_size", 1, 1 << 10)
        return read_patch_preprocessing(source, size, MAX_PATCHES)

    def image_tower(self, source: Source, model: Any, dim: int) -> Tower:  # noqa: ANN401
        """Return the image tower, its positions interpolated to each image's patches."""
        processor = self.image_config(source)
        return Tower(
            role=lambda: naflex_role(model, processor, dim),
            processor=processor,
            reference=getattr(model, "get_image_features", model.forward),
        )


def _check_head(vision: Fields) -> None:
    if vision.values.get("vision_use_head", True) is not True:
        raise vision.error("vision_use_head", "true: the head's output is the embedding")


FAMILY = Siglip()
NAFLEX = Naflex()
