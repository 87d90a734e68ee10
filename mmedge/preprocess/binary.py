"""Binary file objects of the caller: any class with read()."""

from __future__ import annotations

import io
from typing import IO, Any, Protocol

from mmedge.errors import InputError

__all__ = ["BinaryFile", "seekable"]


class BinaryFile(Protocol):
    """An open file, a buffer, or a server's response."""

    def read(self, size: int = -1, /) -> bytes:
        """Return `size` bytes at most, all by default."""
        ...


def seekable(file: Any, name: str, error: type[InputError]) -> IO[bytes]:  # noqa: ANN401
    """Return a file at its start; a file that cannot seek is read whole.

    Args:
        file: Any object with read().
        name: What messages call it.
        error: Raised if it cannot be read.

    Raises:
        InputError: If it was opened as text, or cannot be read (`error`).
    """
    try:
        if hasattr(file, "seekable") and file.seekable():
            file.seek(0)
            opened: IO[bytes] = file
            content: object = file.read(0)
        else:
            content = file.read()
            opened = io.BytesIO(content if isinstance(content, bytes) else b"")
    except (OSError, ValueError) as reason:  # ValueError: a closed file, or text that is no UTF-8
        raise error(f"{name}: cannot be read ({reason}).") from reason
    if not isinstance(content, bytes):
        raise InputError(f"{name}: opened as text, expected a binary file. Open it with mode 'rb'.")
    return opened
