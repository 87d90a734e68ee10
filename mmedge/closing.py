"""Base class of objects that are closed after use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Closing"]


class Closing(Protocol):
    """A context manager that calls `close` on exit."""

    def close(self) -> None:
        """Release resources."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
