"""A sentencepiece unigram model as a `tokenizer.json`, so that a device needs no sentencepiece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmedge.converters.sources.config import foreign_errors
from mmedge.converters.sources.source import Source
from mmedge.errors import SourceError

__all__ = ["is_sentencepiece", "unigram_json"]

_UNIGRAM = 1
_UNDERLINE = "▁"


def is_sentencepiece(tokenizer: Any) -> bool:  # noqa: ANN401, transformers is untyped
    """Return whether a tokenizer runs sentencepiece itself."""
    return getattr(tokenizer, "sp_model", None) is not None


def unigram_json(source: Source, tokenizer: Any) -> str:  # noqa: ANN401, transformers is untyped
    """Convert a sentencepiece unigram model that closes every text with its end token.

    Raises:
        SourceError: If the model is of another kind.
    """
    with foreign_errors(
        f"{source.name}: its sentencepiece model cannot be converted",
        "Put a tokenizer.json into the folder.",
    ):
        return _convert(source, tokenizer)


def _convert(source: Source, tokenizer: Any) -> str:  # noqa: ANN401, transformers is untyped
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((source.folder / Path(tokenizer.vocab_file).name).read_bytes())
    if proto.trainer_spec.model_type != _UNIGRAM:
        raise SourceError(
            f"{source.name}: its sentencepiece model is not a unigram model. Put a tokenizer.json "
            "into the folder."
        )
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    unigram = Tokenizer(models.Unigram(pieces, proto.trainer_spec.unk_id, byte_fallback=False))
    steps: list[Any] = []
    if proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    if proto.normalizer_spec.remove_extra_whitespaces:
        # The character map drops characters, control codes among them, and leaves their spaces.
        steps += [
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Strip(left=False, right=True),
        ]
    unigram.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _UNDERLINE)])
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_UNDERLINE, prepend_scheme="always", split=False
    )
    end = str(tokenizer.eos_token)
    unigram.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, int(tokenizer.eos_token_id))]
    )
    return json.dumps(json.loads(unigram.to_str()), ensure_ascii=False, indent=1) + "\n"
