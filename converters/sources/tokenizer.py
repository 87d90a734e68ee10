"""The tokenizer of a source, as transformers loads it, and its `tokenizer.json`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mmedge.converters.sources.clean import clean_copy
from mmedge.converters.sources.config import Fields, foreign_errors
from mmedge.converters.sources.source import Source
from mmedge.errors import SourceError
from mmedge.files.json_file import read_file, read_json

__all__ = [
    "CHAT_TEMPLATE",
    "backend_json",
    "chat_template",
    "check_tokenizer",
    "load_tokenizer",
    "longest_text",
    "template_tokens",
    "tokenizer_fields",
]

CHAT_TEMPLATE = "chat_template.jinja"
"""File of a source, and of its bundle, that holds the chat template."""

_ADVICE = "Put tokenizer.json, or the vocabulary files of transformers, into the folder."
_VOCABULARY, _MERGES = "vocab.json", "merges.txt"
_MAX_BYTES = 64 << 20
_MAX_TEMPLATE_BYTES = 1 << 20


def load_tokenizer(source: Source) -> Any:  # noqa: ANN401, transformers is untyped
    """Load the tokenizer as transformers does, without remote code.

    Raises:
        SourceError: If there is none, or its files are of different vocabularies.
    """
    with clean_copy(source.folder) as folder:
        try:
            return _load(folder, source)
        except SourceError:
            if (folder / "tokenizer.json").exists() or not (folder / _MERGES).exists():
                raise
        lines = _fitting_merges(source.folder / _VOCABULARY, source.folder / _MERGES)
        (folder / _MERGES).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return _load(folder, source)


def _load(folder: Path, source: Source) -> Any:  # noqa: ANN401, transformers is untyped
    from transformers import AutoTokenizer

    with foreign_errors(f"{source.name}: its tokenizer cannot be loaded", _ADVICE):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _fitting_merges(vocabulary: Path, merges: Path) -> list[str]:
    """Return the lines of `merges.txt` up to the first whose result the vocabulary lacks.

    OpenAI's full list holds five times the merges that CLIP was trained with, in the same order.
    """
    tokens = read_json(vocabulary, max_bytes=_MAX_BYTES, error=SourceError)
    content = read_file(merges, max_bytes=_MAX_BYTES, error=SourceError)
    if not isinstance(tokens, dict):
        raise SourceError(f"{vocabulary}: got {type(tokens).__name__}, expected an object.")
    lines = content.decode("utf-8", "replace").strip().split("\n")
    kept, made = lines[:1], set[str]()
    for line in lines[1:]:
        token = line.replace(" ", "")
        if token not in tokens:
            break
        kept.append(line)
        made.add(token)
    whole = [token for token in tokens if len(token.removesuffix("</w>")) > 1]
    unmade = [token for token in whole if token not in made and not token.startswith("<|")]
    if unmade:
        raise SourceError(
            f"{merges} does not belong to {vocabulary.name}: none of its merges makes "
            f"{unmade[0]!r} and {len(unmade) - 1} other tokens. Fetch both files of one model."
        )
    return kept


def backend_json(source: Source, tokenizer: Any) -> str:  # noqa: ANN401, transformers is untyped
    """Return the `tokenizer.json` of a tokenizer that runs on the tokenizers library.

    Raises:
        SourceError: If it does not.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SourceError(
            f"{source.name}: {type(tokenizer).__name__} is not backed by a tokenizer.json. Save "
            "one with the tokenizers library and put it into the folder."
        )
    content = json.loads(backend.to_str())
    # Both belong to a call, not to the vocabulary; the manifest defines the padding.
    content["truncation"] = content["padding"] = None
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def tokenizer_fields(source: Source, tokenizer: Any) -> Fields:  # noqa: ANN401
    """Return a loaded tokenizer's settings, for typed reading."""
    values = {key: getattr(tokenizer, key, None) for key in ("model_max_length", "pad_token_id")}
    return Fields(source.folder / "tokenizer_config.json", values)


def chat_template(source: Source, tokenizer: Any) -> str | None:  # noqa: ANN401
    """Return the chat template of a source, the default one of several; None for none.

    Raises:
        SourceError: If it is larger than 1 MiB, or not UTF-8.
    """
    path = source.folder / CHAT_TEMPLATE
    if path.is_file():  # it counts before the settings' own, as in transformers
        data = read_file(path, max_bytes=_MAX_TEMPLATE_BYTES, error=SourceError)
        try:
            return data.decode("utf-8") or None
        except UnicodeDecodeError as error:
            raise SourceError(f"{path} is not UTF-8. Save it again.") from error
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict):
        found = found.get("default")
    if not isinstance(found, str) or not found:
        return None
    if len(found.encode()) > _MAX_TEMPLATE_BYTES:
        raise SourceError(
            f"{source.name}: its chat template is larger than {_MAX_TEMPLATE_BYTES} bytes. Remove "
            "it, or use a shorter one."
        )
    return found


def template_tokens(tokenizer: Any) -> dict[str, str]:  # noqa: ANN401, transformers is untyped
    """Return the special tokens that a chat template may use, by name."""
    return {
        name: str(token)
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }


def longest_text(source: Source, tokenizer: Any, context: int) -> int:  # noqa: ANN401
    """Return the maximum tokens of a text: the tokenizer's limit, or the model's if less."""
    limit = tokenizer_fields(source, tokenizer).number("model_max_length", 1, math.inf)
    return int(min(limit, context))


def check_tokenizer(source: Source, tokenizer: Any, rows: int) -> None:  # noqa: ANN401
    """Check that the embedding table has a row for every token.

    Args:
        source: The original.
        tokenizer: As load_tokenizer returns it.
        rows: Rows of the table.

    Raises:
        SourceError: If an id lies beyond it; the token is named.
    """
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: int(item[1]))
    if highest >= rows:
        raise SourceError(
            f"{source.name}: the tokenizer gives {token!r} the id {highest}, but the embedding "
            f"table has {rows} rows. Train with model.resize_token_embeddings(len(tokenizer)), or "
            "remove the token from the tokenizer's files."
        )
