"""What dual encoders share whose text tower is a BERT, masked, and pooled at its first token."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmedge.converters.families.loading import read_part
from mmedge.converters.families.towers import ImageTextFamily, Tower, text_role
from mmedge.converters.sources.source import Source
from mmedge.converters.sources.tokenizer import (
    backend_json,
    check_tokenizer,
    load_tokenizer,
    longest_text,
    tokenizer_fields,
)
from mmedge.preprocess.config import TextConfig

__all__ = ["BertTextFamily"]

_MASK = "attention_mask"


class _TextEncoder(nn.Module):
    """input_ids and attention_mask (B, T) int64 -> embedding (B, D) float32, L2-normalised."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401, transformers is untyped
        super().__init__()
        self.tower = model.text_model
        self.projection = model.text_projection

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.tower(input_ids, attention_mask=attention_mask).last_hidden_state
        return nn.functional.normalize(self.projection(hidden[:, 0]), dim=-1)


class BertTextFamily(ImageTextFamily):
    """Both towers, in transformers' class of their own."""

    first_position = 0
    """Position of the first token; a RoBERTa counts from behind its padding token's id."""

    def matches(self, source: Source) -> bool:
        """Return whether a source is of this family; one tower alone is not taken."""
        return source.model_type == self.name

    def model_class(self, source: Source) -> str | None:  # noqa: ARG002
        """Return the usual class."""
        return None

    def dim(self, model: Any) -> int:  # noqa: ANN401, transformers is untyped
        """Return the width of the text projection."""
        return int(model.text_projection.out_features)

    def text_config(self, source: Source, tokenizer: Any) -> TextConfig:  # noqa: ANN401
        """Return truncation to the model's positions and padding to the longest text of a call."""
        text = read_part(source, "text_config")
        rows = text.integer("vocab_size", 1, 1 << 24)
        check_tokenizer(source, tokenizer, rows)
        positions = text.integer("max_position_embeddings", self.first_position + 1, 1 << 20)
        return TextConfig(
            max_length=longest_text(source, tokenizer, positions - self.first_position),
            padding="longest",
            attention_mask=_MASK,
            pad_id=tokenizer_fields(source, tokenizer).integer("pad_token_id", 0, rows - 1),
        )

    def text_tower(self, source: Source, model: Any, dim: int) -> Tower:  # noqa: ANN401
        """Return the text tower; its padding is masked, and its token types are all zero."""
        tokenizer = load_tokenizer(source)
        processor, encoder = self.text_config(source, tokenizer), _TextEncoder(model)
        return Tower(
            role=lambda: text_role(
                encoder,
                model.config.text_config,
                dim,
                dynamic_sequence=True,
                masked=True,
                longest=processor.max_length,
            ),
            processor=processor,
            reference=model.get_text_features,
            files={"tokenizer.json": backend_json(source, tokenizer).encode()},
        )
