"""The contract of a place that holds items: an index on the device, or a database beyond it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mmedge.retrieval.filters import Filter
from mmedge.retrieval.items import Item, Match
from mmedge.specs import Float32Array

__all__ = ["Change", "SyncedStore", "VectorStore"]


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a store, in the order of its cursor; `get` returns the item.

    Attributes:
        cursor: Position in the store's order of changes; opaque, and passed back to `changes`.
        id: The item's.
        deleted: Whether the item was deleted.
        revision: Microseconds since 1970 of the change.
        origin: The index in which the change was made.
    """

    cursor: str
    id: str
    deleted: bool
    revision: int
    origin: str


class VectorStore(Protocol):
    """Items with vectors, searched by cosine similarity.

    Every method raises RetrievalError for what the store refuses, and StorageError or
    BackendUnavailableError for a disk or a server that fails.
    """

    @property
    def dim(self) -> int:
        """D, the length of a vector."""

    @property
    def space(self) -> str | None:
        """Embedding-space fingerprint of the vectors; None for vectors of unknown origin."""

    @property
    def identity(self) -> str:
        """Names this store's contents for good; a cursor of `changes` is good for this one only."""

    def upsert(self, items: Sequence[Item]) -> int:
        """Add or replace items and return when they are durable.

        An item older (by revision, then origin) than what is stored, a deletion included, changes
        nothing; one of revision 0 is a change made here and now and always counts. No id may come
        twice. Returns how many were written.
        """

    def delete(self, ids: Sequence[str], *, revision: int | None = None, origin: str = "") -> int:
        """Delete items, remembering the deletion for `changes`; return how many there were.

        Without a revision it is later than the item's. With one, an item later than it stays, and
        the deletion of an id that is not there is remembered too: an older item may still come.
        """

    def get(self, ids: Sequence[str]) -> list[Item | None]:
        """Return items by id, None for an id that is not there."""

    def search(
        self, vectors: Float32Array, k: int, /, *, where: Filter | None = None, recall: float = 0.95
    ) -> list[list[Match]]:
        """Return the k nearest items to each of the (Q, D) L2-normalised vectors, best first."""

    def changes(self, after: str | None, limit: int) -> list[Change]:
        """Return up to `limit` changes after a cursor, oldest first; None starts at the first."""

    def __len__(self) -> int:
        """How many items there are."""

    def close(self) -> None:
        """Release files and connections."""


class SyncedStore(VectorStore, Protocol):
    """The side of a push or pull that keeps how far it came: an index on the device."""

    def revisions(self, ids: Sequence[str]) -> list[tuple[int, str] | None]:
        """Return revision and origin of each item or of its deletion; None for an unknown id."""

    def cursor(self, name: str) -> str | None:
        """Return a cursor kept by `set_cursor`; None if there is none."""

    def set_cursor(self, name: str, cursor: str | None) -> None:
        """Keep a cursor as durably as the items; None forgets it."""
