"""The base of what is closed after use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Closing"]


class Closing(Protocol):
    """A context manager whose end is `close`."""

    def close(self) -> None:
        """Free what it holds."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
