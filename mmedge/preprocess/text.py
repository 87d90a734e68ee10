"""Text preprocessing to token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from mmedge.errors import TextError
from mmedge.preprocess.cleaning import clean
from mmedge.preprocess.config import TextConfig
from mmedge.preprocess.tokenizer import BoundedTokenizer
from mmedge.specs import Array, Modality

__all__ = ["MAX_TEXT_BYTES", "TextProcessor", "check_tokens", "checked_texts"]

MAX_TEXT_BYTES = 1_000_000
"""Longer texts are rejected: the tokenizer's time grows with the length."""


class TextProcessor:
    """Tokenize, truncate and pad as transformers' tokenizers do, id for id.

    A processor may be used from several threads at once.

    Args:
        config: The bundle's frozen configuration.
        tokenizer_file: A `tokenizer.json`.

    Raises:
        IntegrityError: If the file is missing.
        BundleError: If the tokenizer is refused: see BoundedTokenizer.
    """

    modality: ClassVar[Modality] = Modality.TEXT
    _max_bytes = MAX_TEXT_BYTES

    def __init__(self, config: TextConfig, tokenizer_file: Path) -> None:
        self.config = config
        self._tokenizer = BoundedTokenizer(tokenizer_file, config.max_length)
        self._max_bytes = min(self._max_bytes, self._tokenizer.max_text_bytes)

    @classmethod
    def open(cls, config: TextConfig, folder: Path) -> TextProcessor:
        """Open with the tokenizer in a bundle's folder."""
        return cls(config, folder / config.tokenizer_file)

    def example(self) -> str:
        """Return a text of the model's length, at most some 1024 tokens."""
        return "a photo of a red circle " * (1 + min(self.config.max_length, 1024) // 6)

    @property
    def largest_id(self) -> int:
        """The largest token id of the tokenizer, or of the padding if larger."""
        return max(*self._tokenizer.vocabulary().values(), self.config.pad_id)

    def tokenize(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the token ids of each text, special tokens included, truncated, not padded.

        Args:
            texts: At least one text. Text that is longer than max_length tokens is truncated.

        Raises:
            TextError: If there is no text, or one of them is not a str, is empty or blank, holds
                lone surrogates, is larger than MAX_TEXT_BYTES or has no token that the tokenizer
                knows; its position is named.
            BundleError: If the tokenizer fails on one of them.
        """
        checked = [self.check(text, i) for i, text in enumerate(checked_texts(texts))]
        if not checked:
            raise TextError("Texts: got none, expected at least one.")
        ids = self.encode(checked)
        for position, tokens in enumerate(ids):
            check_tokens(tokens, position)
        return ids

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of checked texts: see tokenize and check_tokens.

        Raises:
            BundleError: If the tokenizer fails on one of them.
        """
        return self._tokenizer.encode(texts)

    def prompt(self, text: str, *, special: bool = True) -> list[int]:
        """Return all token ids of a text, however many.

        Args:
            text: Not empty.
            special: Whether to add the tokenizer's special tokens.

        Raises:
            TextError: As for tokenize.
            BundleError: If the tokenizer fails on it.
        """
        checked = self.check(text, 0)
        (ids,) = self._tokenizer.encode([checked], special=special, truncate=False)
        check_tokens(ids, 0)
        return ids

    def pad(self, ids: Sequence[Sequence[int]]) -> dict[str, Array]:
        """Pad token ids into the graph's input arrays.

        Args:
            ids: As tokenize returns them, N texts.

        Returns:
            By input name: ids (N, S) int64 and, where the graph takes one, the attention mask
            (N, S) int64. S is the longest of these texts, or max_length, as the config says.
        """
        config = self.config
        longest = max(map(len, ids))
        length = config.max_length if config.padding == "max_length" else longest
        padded = np.full((len(ids), length), config.pad_id, np.int64)
        mask = np.zeros((len(ids), length), np.int64)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        feed: dict[str, Array] = {config.input: padded}
        if config.attention_mask is not None:
            feed[config.attention_mask] = mask
        if config.positions is not None:
            feed[config.positions] = np.tile(np.arange(length)[::-1], (len(ids), 1))
        return feed

    def __call__(self, items: Iterable[str]) -> dict[str, Array]:
        """Tokenize and pad texts: see tokenize and pad.

        Raises:
            TextError: As for tokenize.
        """
        return self.pad(self.tokenize(items))

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of token ids, without special tokens.

        Raises:
            BundleError: If the tokenizer fails on one of them.
        """
        return self._tokenizer.decode(ids)

    def check(self, text: object, position: int) -> str:
        """Return a text as it is tokenized: cleaned, where the model requires it.

        Raises:
            TextError: As for tokenize; `position` is named.
        """
        if not isinstance(text, str):
            if isinstance(text, bytes):
                raise TextError(f"Text {position}: got bytes. {_decoding_advice(text)}")
            raise TextError(f"Text {position}: got {type(text).__name__}, expected str.")
        try:
            size_bytes = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise TextError(
                f"Text {position}: not valid Unicode, a lone surrogate stands at character "
                f"{error.start}. Decode the source as UTF-8, or replace it with "
                "text.encode('utf-8', 'replace').decode()."
            ) from error
        if size_bytes > self._max_bytes:
            raise TextError(
                f"Text {position}: {size_bytes} bytes, more than the {self._max_bytes} allowed. "
                f"The model reads {self.config.max_length} tokens: pass the part that matters."
            )
        if not text.strip():
            raise TextError(f"Text {position}: empty. Leave it out, or describe something.")
        if self.config.cleaning is None:
            return text
        cleaned = clean(text, self.config.cleaning)
        if cleaned is None:
            raise TextError(
                f"Text {position}: its HTML escapes are nested too deep. Unescape it first: "
                "html.unescape(text)."
            )
        if not cleaned:
            raise TextError(
                f"Text {position}: nothing is left once it is cleaned as this model's texts are "
                f"({self.config.cleaning}). Leave it out, or describe something in words."
            )
        return cleaned


def check_tokens(tokens: Sequence[int], position: int) -> None:
    """Check that a text has tokens.

    Raises:
        TextError: If there is no token; `position` is named.
    """
    if not tokens:
        raise TextError(
            f"Text {position}: the tokenizer knows no part of it, so no token is left. "
            "Leave it out, or describe something in words."
        )


def checked_texts(texts: Iterable[str]) -> Iterable[str]:
    """Return texts unchanged, rejecting a single text and other types.

    Raises:
        TextError: If they are a str, bytes or nothing that can be iterated.
    """
    if isinstance(texts, str):
        raise TextError("Texts: got a single text, expected several. Pass [text].")
    kind = type(texts).__name__
    if kind in {"bytes", "bytearray"}:  # to a type checker an iterable of str is never one
        raise TextError(f"Texts: got {kind}, expected str. Decode it: data.decode('utf-8').")
    if not isinstance(texts, Iterable):
        raise TextError(f"Texts: got {kind}, expected several str.")
    return texts


def _decoding_advice(text: bytes) -> str:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        return (
            f"They are not UTF-8 either (byte {error.start}): find out their encoding and decode "
            "with text.decode(encoding)."
        )
    return "Decode it with text.decode('utf-8')."
