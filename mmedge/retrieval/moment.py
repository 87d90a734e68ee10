"""An index as it was at one moment, for what reads it several times."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mmedge.retrieval import storing
from mmedge.retrieval.items import Item
from mmedge.retrieval.schema import read_about

__all__ = ["Moment"]

_TEXTS = frozenset({"id", "source", "text", "metadata", "content_hash", "origin"})


class Moment:
    """What an index holds in one read transaction; see IndexReader.moment.

    Args:
        connection: In that transaction.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._about = read_about(connection)

    @property
    def dim(self) -> int:
        """D, the length of a vector."""
        return self._about.dim

    @property
    def space(self) -> str | None:
        """Embedding-space fingerprint of the vectors; None for vectors of unknown origin."""
        return self._about.space

    def items(self) -> Iterator[Item]:
        """Yield all items in the order in which they were added.

        Raises:
            IndexCorruptedError: If an item is damaged.
        """
        after = 0
        while rows := storing.items_after(self._connection, after, vectors=True):
            after = rows[-1].key
            yield from (row.item for row in rows)

    def counts(self) -> NDArray[np.int32]:
        """Return the (N,) numbers of the items' vectors, in the order of `items`."""
        found = self._connection.execute(
            "SELECT count(*) FROM vectors WHERE epoch = ? GROUP BY key ORDER BY key",
            (self._about.epoch,),
        )
        return np.fromiter((count for (count,) in found), np.int32)

    def texts(self, column: str) -> Iterator[str]:
        """Yield a text of each item, in the order of `items`; "" where it has none.

        Args:
            column: id, source, text, metadata (JSON), content_hash or origin.
        """
        assert column in _TEXTS  # noqa: S101, it becomes part of the statement
        for (text,) in self._connection.execute(f"SELECT {column} FROM items ORDER BY key"):  # noqa: S608
            yield text or ""
