"""Opening an untrusted `tokenizer.json`, with bounds on its memory and time.

The tokenizers library runs whatever the file asks for: replacements that multiply the text,
patterns that are searched for hours, words compared piece by piece. So the file is checked before
the library sees it. Of steps, only kinds are allowed whose output has a bound that is known from
the length of the text; the bound of all of them decides how long a text may be.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from mmedge.errors import BundleError, IntegrityError, MmedgeError
from mmedge.files.json_file import parse_json, read_file
from mmedge.preprocess.patterns import check_pattern

__all__ = ["BoundedTokenizer", "check_tokenizer"]

_MAX_FILE_BYTES = 64 << 20
_MAX_NORMALIZED_BYTES = 16 << 20  # at most as many tokens, of some 100 bytes each
_MIN_TEXT_BYTES = 1 << 12  # text that a tokenizer must accept in any case
_MAX_STEPS = 64
_MAX_AFFIX = 64  # characters; looked up with every piece of a word
_MAX_PIECE = 1024  # characters; a unigram model tries all lengths, and a decoder writes them
_MAX_WORD = 1000  # characters; WordPiece takes the square of it
_MAX_SPECIALS = 64
_MAX_DECODED = 64

_Json: TypeAlias = dict[str, Any]
_Error: TypeAlias = Callable[[str], MmedgeError]

# Largest growth of a step in bytes per byte, for the library's Unicode version.
_NORMALIZERS = {
    "BertNormalizer": 12,
    "ByteLevel": 2,
    "Lowercase": 2,
    "NFC": 3,
    "NFD": 3,
    "NFKC": 11,
    "NFKD": 11,
    "Nmt": 1,
    "Strip": 1,
    "StripAccents": 1,
}
_PRE_TOKENIZERS = {
    "BertPreTokenizer": 1,
    "ByteLevel": 2,
    "CharDelimiterSplit": 1,
    "Digits": 1,
    "FixedLength": 1,
    "Metaspace": 4,
    "Punctuation": 1,
    "Split": 1,
    "UnicodeScripts": 1,
    "Whitespace": 1,
    "WhitespaceSplit": 1,
}
_POST_PROCESSORS = {"BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"}
_DECODERS = {
    "BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Strip", "WordPiece",
}  # fmt: skip
_MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")


class BoundedTokenizer:
    """A tokenizer whose work is bounded by the length of a text.

    It may be used from several threads at once.

    Args:
        path: A `tokenizer.json`.
        max_length: Tokens of a text at most, special ones included; more are cut off.

    Attributes:
        max_text_bytes: Longer texts are not to be passed.

    Raises:
        IntegrityError: If the file cannot be read.
        BundleError: If it is not a tokenizer, asks for steps without a known bound, has no
            vocabulary, or adds max_length special tokens or more.
    """

    def __init__(self, path: Path, max_length: int) -> None:
        from tokenizers import Tokenizer

        self._path = path
        data = read_file(path, max_bytes=_MAX_FILE_BYTES, error=IntegrityError)
        growth = check_tokenizer(data, path, error=_refused)
        self.max_text_bytes = _MAX_NORMALIZED_BYTES // growth
        with _panics(lambda reason: _refused(f"{path}: not a tokenizer ({reason}).")):
            self._tokenizer = Tokenizer.from_str(data.decode("utf-8"))
            special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if max_length <= special:
            raise BundleError(
                f"{path}: adds {special} special tokens, which leaves no room for a text of "
                f"max_length {max_length}. Convert the model again."
            )
        # Padding and truncation in the file are ignored: the manifest defines them.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._max_length, self._room = max_length, max_length - special

    def vocabulary(self, *, added: bool = True) -> dict[str, int]:
        """Return the ids by token.

        Args:
            added: Whether tokens that were added to the model's own are among them.
        """
        with _panics(self._failed):
            return dict(self._tokenizer.get_vocab(with_added_tokens=added))

    def encode(
        self, texts: Sequence[str], *, special: bool = True, truncate: bool = True
    ) -> list[list[int]]:
        """Return the token ids of each text.

        Args:
            texts: Each of max_text_bytes at most.
            special: Whether to add the special tokens of the file's post-processor.
            truncate: Whether to cut texts to max_length, in front of the closing special token.

        Raises:
            BundleError: If the tokenizer fails on one of them.
        """
        with _panics(self._failed):
            found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)
            ids: list[list[int]] = [encoding.ids for encoding in found]
            for at, row in enumerate(ids):
                if truncate and len(row) > self._max_length:
                    whole = self._tokenizer.encode(texts[at], add_special_tokens=False)
                    whole.truncate(self._room if special else self._max_length)
                    ids[at] = self._tokenizer.post_process(whole, None, special).ids
            return ids

    def token(self, index: int) -> str | None:
        """Return the token of an id, None where there is none."""
        with _panics(self._failed):
            found: str | None = self._tokenizer.id_to_token(index)
            return found

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each row of token ids, without special tokens.

        Raises:
            BundleError: If the tokenizer fails on one of them.
        """
        with _panics(self._failed):
            return self._tokenizer.decode_batch([list(row) for row in rows])

    def _failed(self, reason: str) -> BundleError:
        return BundleError(
            f"{self._path}: the tokenizer failed on a text ({reason}). Shorten the text, or "
            "convert the model again with another tokenizer."
        )


def check_tokenizer(data: bytes, place: object, *, error: _Error) -> int:
    """Check that a `tokenizer.json` has only steps with bounded work.

    Args:
        data: Its content.
        place: Where it came from, for messages.
        error: Makes the error from its message.

    Returns:
        How many bytes its steps make of one byte of a text at most.

    Raises:
        MmedgeError: `error`.
    """
    document = parse_json(data, place, error=error)
    try:
        return _checked(document)
    except (KeyError, TypeError, ValueError, AttributeError) as failure:
        reason = f"it lacks {failure}" if isinstance(failure, KeyError) else str(failure)[:200]
        message = f"{place}: not a tokenizer that mmedge opens: {reason}."
        raise error(message) from failure


def _refused(reason: str) -> BundleError:
    return BundleError(
        f"{reason} It is not a tokenizer that can be used: convert the model again, with a "
        "tokenizer of ordinary steps."
    )


@contextmanager
def _panics(error: _Error) -> Iterator[None]:
    """Turn the library's bare Exceptions and Rust panics into an MmedgeError.

    A panic is a BaseException of a class that cannot be imported.
    """
    try:
        yield
    except BaseException as raised:
        if type(raised) is not Exception and type(raised).__name__ != "PanicException":
            raise
        raise error(str(raised)[:200]) from raised


def _checked(document: Any) -> int:  # noqa: ANN401, JSON of any shape
    """Check every part of a tokenizer and return its largest growth in bytes per byte.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: If a part is missing, of another type, or
            refused.
    """
    if not isinstance(document, dict):
        raise TypeError("no JSON object")
    growth = 1
    for part, step_growth in (("normalizer", _normalizer), ("pre_tokenizer", _pre_tokenizer)):
        for step in _steps(document.get(part), part.replace("_", "") + "s"):
            growth *= step_growth(step)
            if growth > _MAX_NORMALIZED_BYTES // _MIN_TEXT_BYTES:
                raise ValueError(f"its {part} can make a text {growth} times as long")
    for step in _steps(document.get("post_processor"), "processors"):
        _check_post_processor(step)
    decoded = 1
    for step in _steps(document.get("decoder"), "decoders"):
        if step["type"] == "Replace":
            decoded *= _normalizer(step)
        elif step["type"] not in _DECODERS:
            raise ValueError(f"a decoder of the unknown kind {step['type']!r}")
        if decoded > _MAX_DECODED:
            raise ValueError(f"its decoder can make a token {decoded} times as long")
    for token in document.get("added_tokens") or ():
        _check_piece(token["content"])
    _check_model(document["model"])
    return growth


def _steps(part: _Json | None, key: str, depth: int = 0) -> Iterator[_Json]:
    """Yield the steps of a part, including nested sequences."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    if depth > 8 or len(part[key]) > _MAX_STEPS:
        raise ValueError(f"more than {_MAX_STEPS} {key}, or more than 8 levels of them")
    for inner in part[key]:
        yield from _steps(inner, key, depth + 1)


def _normalizer(step: _Json) -> int:
    kind = step["type"]
    if kind == "Replace":
        content, pattern = len(_text(step["content"]).encode()), step["pattern"]
        if "Regex" in pattern:
            shortest = check_pattern(_text(pattern["Regex"]))
        else:
            shortest = len(_text(pattern["String"]).encode())
        # An empty match is replaced before every character and at the end.
        return max(1, -(-content // shortest)) if shortest else 2 * content + 1
    if kind == "Prepend":
        return 1 + len(_text(step["prepend"]).encode())
    if kind == "Precompiled":
        return _longest_replacement(base64.b64decode(step["precompiled_charsmap"], validate=True))
    if kind not in _NORMALIZERS:
        raise ValueError(f"a normalizer of the unknown kind {kind!r}")
    return _NORMALIZERS[kind]


def _longest_replacement(table: bytes) -> int:
    """Return the longest text in SentencePiece's table: size, trie, then the texts."""
    trie_bytes = int.from_bytes(table[:4], "little")
    if len(table) < 4 or trie_bytes % 4 or trie_bytes > len(table) - 4:
        raise ValueError("a precompiled table that is cut off")
    return max(1, *map(len, table[4 + trie_bytes :].split(b"\0")))


def _pre_tokenizer(step: _Json) -> int:
    kind = step["type"]
    if kind not in _PRE_TOKENIZERS:
        raise ValueError(f"a pre-tokenizer of the unknown kind {kind!r}")
    if kind == "Split" and "Regex" in step["pattern"]:
        check_pattern(_text(step["pattern"]["Regex"]))
    return _PRE_TOKENIZERS[kind]


def _check_post_processor(step: _Json) -> None:
    if step["type"] not in _POST_PROCESSORS:
        raise ValueError(f"a post-processor of the unknown kind {step['type']!r}")
    if step["type"] == "TemplateProcessing":
        texts = [piece for piece in step["single"] if "Sequence" in piece]
        if len(step["single"]) > _MAX_SPECIALS or len(texts) != 1:
            raise ValueError(
                f"its post-processor repeats the text {len(texts)} times among "
                f"{len(step['single'])} pieces, expected once among {_MAX_SPECIALS} at most"
            )
        if any(len(each["ids"]) > _MAX_SPECIALS for each in step["special_tokens"].values()):
            raise ValueError(f"a special token of more than {_MAX_SPECIALS} ids")


def _check_model(model: _Json) -> None:
    vocabulary = model["vocab"]
    if not vocabulary:
        raise ValueError("an empty vocabulary")
    kind = model.get("type") or _untyped(model)
    if kind not in _MODELS:
        raise ValueError(f"a model of the unknown kind {kind!r}, expected one of {_MODELS}")
    if kind in {"WordLevel", "WordPiece"} and model["unk_token"] not in vocabulary:
        raise ValueError(f"the unknown token {model['unk_token']!r}, not in its vocabulary")
    if kind == "WordPiece" and not 0 < int(model["max_input_chars_per_word"]) <= _MAX_WORD:
        raise ValueError(f"words of {model['max_input_chars_per_word']} characters")
    if kind == "Unigram" and model["unk_id"] is None and not model.get("byte_fallback"):
        raise ValueError("no unknown token")
    for piece in vocabulary:
        _check_piece(piece[0] if isinstance(vocabulary, list) else piece)
    if model.get("dropout"):
        raise ValueError("dropout, which gives other tokens at every call")
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(model.get(affix) or "") > _MAX_AFFIX:
            raise ValueError(f"a {affix} of more than {_MAX_AFFIX} characters")


def _check_piece(piece: object) -> None:
    if len(_text(piece)) > _MAX_PIECE:
        raise ValueError(f"a token of more than {_MAX_PIECE} characters")


def _untyped(model: _Json) -> str:
    """Return the kind of a model in older files without a type, as the library infers it."""
    if "merges" in model:
        return "BPE"
    if isinstance(model["vocab"], list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} in place of a string")
    return value
