"""Near-duplicates: a camera sees the same wall a thousand times."""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mmedge.errors import InputError
from mmedge.retrieval.items import Item
from mmedge.retrieval.rows import read_items
from mmedge.specs import Array

__all__ = ["RECENT", "checked_cosine", "distinct_hits", "near_recent", "recent_items"]

RECENT = 32
"""Items of a source that a new one is compared with."""

_LOOKED_AT = 4096  # last items of the index among which those of a source are looked for


def checked_cosine(cosine: float, what: str) -> float:
    """Return a limit of similarity.

    Raises:
        InputError: If it is not a number above 0 and at most 1.
    """
    if isinstance(cosine, bool) or not isinstance(cosine, int | float) or not 0 < cosine <= 1:
        raise InputError(f"{what}: got {cosine!r}, expected a cosine above 0 and at most 1.")
    return float(cosine)


def distinct_hits(vectors: Array, cosine: float, k: int) -> NDArray[np.int64]:
    """Return the first k hits that are not near-duplicates of an earlier one of them.

    Args:
        vectors: (N, D) float16 or float32, L2-normalised, of the hits, best first.
        cosine: From this similarity on two are near-duplicates.
        k: At most so many are returned.

    Returns:
        Places in the hits, ascending; fewer than k if there are not so many.
    """
    left = np.ones(len(vectors), bool)
    kept: list[int] = []
    place = 0
    while len(kept) < k and place < len(vectors):
        kept.append(place)
        rest = vectors[place + 1 :].astype(np.float32) @ vectors[place].astype(np.float32)
        left[place + 1 :] &= rest < cosine
        following = np.flatnonzero(left[place + 1 :])
        if not len(following):
            break
        place += 1 + int(following[0])
    return np.array(kept, np.int64)


def near_recent(
    items: Iterable[Item], recent: Mapping[str | None, Sequence[Item]], cosine: float
) -> dict[str, str]:
    """Return the new items that are near-duplicates of a recent one of the same source.

    An item of several vectors is near another if each of its vectors is near one of the other's.
    Items without a source count as one source.

    Args:
        items: New items, the oldest first.
        recent: Items that are there, by source, the oldest first.
        cosine: From this similarity on an item is near.

    Returns:
        By id of a new item the id of the newest one that it is near to. An item that is returned
        is not compared with those that follow.
    """
    last = {source: deque(known, maxlen=RECENT) for source, known in recent.items()}
    near: dict[str, str] = {}
    for item in items:
        known = last.setdefault(item.source, deque(maxlen=RECENT))
        for other in reversed(known):
            if (item.vectors @ other.vectors.T).max(axis=1).min() >= cosine:
                near[item.id] = other.id
                break
        else:
            known.append(item)
    return near


def recent_items(
    record: sqlite3.Connection, sources: Iterable[str | None]
) -> dict[str | None, list[Item]]:
    """Return the last items of some sources, the oldest first.

    Args:
        record: The index's SQLite file, in a transaction.
        sources: None for items without one.

    Raises:
        IndexCorruptedError: If a row is damaged.
    """
    found: dict[str | None, list[Item]] = {}
    for source in set(sources):
        keys = record.execute(
            """SELECT key FROM (SELECT key, source FROM items ORDER BY key DESC LIMIT ?)
            WHERE source IS ? LIMIT ?""",
            (_LOOKED_AT, source, RECENT),
        )
        rows = read_items(record, (key for (key,) in keys), vectors=True)
        found[source] = [rows[key].item for key in sorted(rows)]
    return found
