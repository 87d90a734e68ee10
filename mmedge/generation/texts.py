"""Text of new tokens as they come: whole characters, and no part of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["Decode", "TextBuilder"]

Decode = Callable[[Sequence[int]], str]
"""Returns the text of token ids, special tokens left out."""

_HALF = "\ufffd"  # what a decoder makes of bytes that are no whole character


class TextBuilder:
    """The text of a row, token by token.

    Args:
        decode: Of the tokenizer.
        stop: Texts that end the row.

    Attributes:
        stopped: Whether a stop text came.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._shown = self._read = 0  # tokens before the window, and tokens whose text is out
        self._pieces: list[str] = []
        self._held = ""  # may be the beginning of a stop text
        self.stopped = False

    @property
    def text(self) -> str:
        """All that `add` and `finish` returned."""
        return "".join(self._pieces)

    def add(self, token: int) -> str:
        """Return the new text that is certain after one more token."""
        self._tokens.append(token)
        # Decoded with the tokens before it, as many tokenizers write a space only between words.
        before = self._decode(self._tokens[self._shown : self._read])
        after = self._decode(self._tokens[self._shown :])
        if after.endswith(_HALF) or len(after) <= len(before):
            return ""
        self._shown, self._read = self._read, len(self._tokens)
        return self._show(after[len(before) :])

    def finish(self) -> str:
        """Return the text that was held back; half a character is left as U+FFFD."""
        if self.stopped:
            return ""
        before = self._decode(self._tokens[self._shown : self._read])
        rest = self._decode(self._tokens[self._shown :])[len(before) :]
        self._shown = self._read = len(self._tokens)
        piece = self._show(rest) if rest else ""
        held, self._held = self._held, ""
        self._pieces.append(held)
        return piece + held

    def _show(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            text = text[: min(found)]
        else:
            kept = _beginning(text, self._stop)
            text, self._held = text[: len(text) - kept], text[len(text) - kept :]
        self._pieces.append(text)
        return text


def _beginning(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest end of a text with which a stop text begins."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0
