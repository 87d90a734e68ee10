"""A text that is read while it is generated."""

from __future__ import annotations

from collections.abc import Iterator

from mmedge.closing import Closing
from mmedge.errors import InputError
from mmedge.generation.decoding import Decoding
from mmedge.generation.rows import Completion, Row

__all__ = ["TextStream"]


class TextStream(Closing, Iterator[str]):
    """Pieces of a text as they are certain: whole characters, no part of a stop text.

    The next token is computed when the next piece is requested; closing the stream ends the
    generation. One thread at a time.

    Args:
        row: What is generated.
        steps: Advances it by a token.
        decoding: Closed with the stream; None where it is used again.
    """

    def __init__(self, row: Row, steps: Iterator[None], decoding: Decoding | None) -> None:
        self._row = row
        self._steps = steps
        self._decoding = decoding

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        while not self._row.ended:
            if piece := self._advance():
                return piece
        raise StopIteration

    def _advance(self) -> str:
        """Generate a token and return the text that it adds."""
        try:
            next(self._steps)
        except BaseException:
            self.close()
            raise
        if self._row.ended:
            self._free()
        return self._row.piece

    @property
    def completion(self) -> Completion:
        """The whole text, once it has ended or the stream is closed.

        Raises:
            InputError: If it goes on.
        """
        if not self._row.ended:
            raise InputError("The stream has not ended. Read it to its end, or close it.")
        return self._row.completion()

    def read(self) -> Completion:
        """Read to the end and return the whole text."""
        for _ in self:
            pass
        return self.completion

    def close(self) -> None:
        """End the generation. Closing twice is allowed."""
        if not self._row.ended:
            self._row.end("cancelled")
        self._free()

    def _free(self) -> None:
        if self._decoding is not None:
            self._decoding.close()
