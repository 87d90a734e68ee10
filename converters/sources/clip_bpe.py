"""open_clip's own tokenizer, CLIP's byte-pair encoding, as a `tokenizer.json`.

open_clip ships its list of merges; a checkpoint's folder has the same list as `merges.txt`, in
`tokenizer.json`, or as open_clip's own file.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmedge.converters.sources.config import read_fields
from mmedge.errors import SourceError
from mmedge.files.json_file import read_file

__all__ = ["END", "START", "clip_bpe_json"]

START, END = "<start_of_text>", "<end_of_text>"
_GZIPPED, _MERGES, _TOKENIZER = "bpe_simple_vocab_16e6.txt.gz", "merges.txt", "tokenizer.json"
_MAX_BYTES = 16 << 20
_MOST_MERGES = 49_152 - 256 - 2  # OpenAI's full list is longer; CLIP was trained with these
# SimpleTokenizer's pattern. Its special tokens are left out: written in a text they are letters.
_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip_bpe_json(folder: Path, rows: int) -> tuple[str, int]:
    """Return open_clip's SimpleTokenizer as a `tokenizer.json`, and the id that closes a text.

    Args:
        folder: Of the checkpoint.
        rows: Of the embedding table.

    Raises:
        SourceError: If the list of merges is missing or damaged, or the table has other rows.
    """
    letters = list(_byte_letters())
    merges = _read_merges(folder)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    parts = {part for pair in merges for part in pair}
    if len(vocabulary) != len(tokens) or not parts <= vocabulary.keys():
        raise SourceError(
            f"{folder}: its list of merges is not CLIP's: a merge repeats another, or joins what "
            f"none has made. Fetch {_MERGES} of openai/clip-vit-base-patch32."
        )
    if len(tokens) != rows:
        raise SourceError(
            f"{folder}: {len(merges)} merges give {len(tokens)} tokens, but text_cfg.vocab_size is "
            f"{rows}. Put the tokenizer's files of this model into the folder."
        )
    document: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _PATTERN},
                    "behavior": "Removed",
                    "invert": True,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": START, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": END, "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {
                token: {"id": token, "ids": [vocabulary[token]], "tokens": [token]}
                for token in (START, END)
            },
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [list(pair) for pair in merges],
        },
    }
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n", vocabulary[END]


def _byte_letters() -> Iterator[str]:
    """Yield the letter of each byte, in the order of CLIP's vocabulary."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    yield from map(chr, shown)
    yield from (chr(0x100 + index) for index in range(256 - len(shown)))


def _read_merges(folder: Path) -> list[tuple[str, str]]:
    """Return the pairs that are joined, in order."""
    if (folder / _GZIPPED).is_file():
        place = folder / _GZIPPED
        data = read_file(place, max_bytes=_MAX_BYTES, error=SourceError)
        try:
            with gzip.open(place) as file:
                content = file.read(_MAX_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            raise SourceError(f"{place} ({len(data)} bytes) is damaged: {error}.") from error
        lines: Sequence[object] = content.decode("utf-8", "replace").split("\n")[1:]
    elif (folder / _MERGES).is_file():
        place = folder / _MERGES
        content = read_file(place, max_bytes=_MAX_BYTES, error=SourceError)
        lines = content.decode("utf-8", "replace").split("\n")
        lines = lines[1:] if str(lines[0]).startswith("#version") else lines
    elif (folder / _TOKENIZER).is_file():
        place = folder / _TOKENIZER
        model = read_fields(place).section("model")
        listed = None if model is None else model.values.get("merges")
        lines = listed if isinstance(listed, list) else []
    else:
        raise SourceError(
            f"{folder} has no vocabulary: open_clip takes the one that it ships. Put {_MERGES} of "
            f"openai/clip-vit-base-patch32, or open_clip's own {_GZIPPED}, into the folder."
        )
    pairs = [_pair(place, line) for line in lines[:_MOST_MERGES] if line != ""]
    if not pairs:
        raise SourceError(f"{place} holds no merges. Fetch it again.")
    return pairs


def _pair(place: Path, line: object) -> tuple[str, str]:
    parts = line.split() if isinstance(line, str) else line
    if isinstance(parts, list) and len(parts) == 2 and all(isinstance(each, str) for each in parts):
        return parts[0], parts[1]
    raise SourceError(f"{place}: got {str(line)[:40]!r}, expected a pair to join. Fetch it again.")
