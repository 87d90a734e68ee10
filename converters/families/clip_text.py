"""What dual encoders share whose text tower is causal and pooled at a text's end, as CLIP's."""

from __future__ import annotations

from typing import Any

import torch

from mmedge.converters.families.loading import read_part
from mmedge.converters.families.towers import ImageTextFamily, TextEncoder, Tower, text_role
from mmedge.converters.sources.config import foreign_errors
from mmedge.converters.sources.source import Source
from mmedge.converters.sources.tokenizer import (
    backend_json,
    check_tokenizer,
    load_tokenizer,
    longest_text,
)
from mmedge.errors import SourceError
from mmedge.preprocess.config import TextConfig

__all__ = ["ClipFamily"]

# A config.json from before transformers corrected it: pool at the highest id instead.
_LEGACY_EOS = 2


class ClipFamily(ImageTextFamily):
    """Both towers, or one, with or without its projection."""

    class_prefix: str
    """With which transformers' names of its classes begin."""
    pools_at_highest = False
    """Whether the text tower pools at the highest token id, whatever config.json says."""

    def model_class(self, source: Source) -> str | None:
        """Return the class of one tower, with its projection where the weights have one."""
        if source.model_type == self.name:
            return None
        part = "Vision" if self._has(source, "vision") else "Text"
        projected = any(name.endswith("_projection.weight") for name in source.shapes)
        return f"{self.class_prefix}{part}Model" + "WithProjection" * projected

    def dim(self, model: Any) -> int:  # noqa: ANN401, transformers is untyped
        """Return the width of the projection, if any, else of the tower."""
        projected = hasattr(model, "visual_projection") or hasattr(model, "text_projection")
        return int(model.config.projection_dim if projected else model.config.hidden_size)

    def text_config(self, source: Source, tokenizer: Any) -> TextConfig:  # noqa: ANN401
        """Return truncation to the context length and padding to the longest text of a call."""
        text = read_part(source, "text_config")
        rows = text.integer("vocab_size", 1, 1 << 24)
        check_tokenizer(source, tokenizer, rows)
        longest = text.integer("max_position_embeddings", 1, 1 << 20)
        length = longest_text(source, tokenizer, longest)
        eos = _LEGACY_EOS if self.pools_at_highest else text.integer("eos_token_id", 0, rows - 1)
        closing = _check_end_token(source, tokenizer, eos)
        return TextConfig(
            max_length=length,
            padding="longest",
            # Without a padding token any will do: nothing behind the end token counts.
            pad_id=closing if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id),
        )

    def text_tower(self, source: Source, model: Any, dim: int) -> Tower:  # noqa: ANN401
        """Return the text tower, without an attention mask.

        It is causal and reads the first end token, so what stands behind it cannot change the
        output.
        """
        tokenizer = load_tokenizer(source)
        config = getattr(model.config, "text_config", model.config)

        eos = _LEGACY_EOS if self.pools_at_highest else int(config.eos_token_id)
        end = int(config.vocab_size) - 1 if eos == _LEGACY_EOS else eos

        def close(ids: torch.Tensor) -> None:
            """End every row with the token that the tower pools at, and nowhere else."""
            ids[ids == end] = 0 if end else 1
            ids[:, -1] = end

        encoder = TextEncoder(model)
        return Tower(
            role=lambda: text_role(
                encoder, config, dim, dynamic_sequence=True, close=close, end=end
            ),
            processor=self.text_config(source, tokenizer),
            reference=getattr(model, "get_text_features", model.forward),
            files={"tokenizer.json": backend_json(source, tokenizer).encode()},
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
