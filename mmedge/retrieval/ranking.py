"""What stands between the nearest vectors and the matches: words, time decay, near-duplicates.

All of it works on a pool of the nearest items, which grows until the k best are certain: no item
outside the pool could come before them. Only fusion with words is by definition of two rankings of
a stated length.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mmedge.retrieval.duplicates import distinct_hits
from mmedge.retrieval.filter_sql import KeyMask, allowed
from mmedge.retrieval.fusion import fuse_rankings
from mmedge.retrieval.recency import decayed, oldest_that_counts
from mmedge.retrieval.words import search_words

__all__ = ["Hits", "Nearest", "Ranking", "rank"]

_POOL = 64
"""Items first looked at; at least four for each wanted."""
_FUSED = 256
"""Length of the rankings that are fused; at least four times k."""


@dataclass(frozen=True, slots=True, eq=False)
class Hits:
    """Items that were found, best first, each of them once.

    Attributes:
        keys: (N,) int64.
        scores: (N,) float64, descending.
        parts: (N,) int32, which of an item's vectors is nearest.
        rows: (N,) int64, row of that vector.
    """

    keys: NDArray[np.int64]
    scores: NDArray[np.float64]
    parts: NDArray[np.int32]
    rows: NDArray[np.int64]

    def take(self, places: NDArray[np.int64], scores: NDArray[np.float64] | None = None) -> Hits:
        """Return some hits, with other scores if given."""
        chosen = self.scores[places] if scores is None else scores
        return Hits(self.keys[places], chosen, self.parts[places], self.rows[places])


class Nearest(Protocol):
    """Finds the items nearest to one query."""

    def __call__(self, n: int, mask: KeyMask | None) -> Hits:
        """Return the n nearest items that a mask allows, or all if there are fewer."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """How matches are ranked beyond similarity.

    Attributes:
        words: Words of the items' texts, fused with similarity; None for similarity alone.
        half_life_s: After so many seconds an item's score has halved; None for no decay.
        now: Seconds since 1970 from which ages are counted.
        distinct: From this cosine on to a better match an item is left out; None for none.
    """

    words: str | None = None
    half_life_s: float | None = None
    now: float = 0.0
    distinct: float | None = None

    @property
    def by_similarity_alone(self) -> bool:
        """Whether the nearest items are the matches."""
        return self.words is None and self.half_life_s is None and self.distinct is None


def rank(
    ranking: Ranking,
    k: int,
    nearest: Nearest,
    vectors: Callable[[NDArray[np.int64]], NDArray[np.float16]],
    record: sqlite3.Connection,
    mask: KeyMask | None,
) -> Hits:
    """Return the k best items for one query.

    Args:
        ranking: What counts beside similarity.
        k: Items, at most.
        nearest: Finds the nearest items.
        vectors: Returns the (N, D) vectors of rows.
        record: The index's SQLite file, in a read transaction.
        mask: Which items are allowed; None for all.

    Raises:
        InputError: If there is no usable word among the words.
    """
    if ranking.by_similarity_alone:
        return nearest(k, mask)
    size = max(_POOL if ranking.words is None else _FUSED, 4 * k)
    while True:
        pool = nearest(size, mask)
        complete = len(pool.keys) < size
        if ranking.words is not None:
            pool = _fused(pool, search_words(record, ranking.words, size, mask), nearest)
        scores, order = _decayed(pool, ranking, record)
        best = _distinct(pool, order, ranking, k, vectors)
        if complete or (len(best) == k and (ranking.words or ranking.half_life_s is None)):
            return pool.take(best, scores[best])
        if len(best) == k:
            last = pool.keys[best[-1]]
            more = nearest(size, _newer(pool, best[-1], ranking, record, mask))
            pool = _joined(pool, more)
            scores, order = _decayed(pool, ranking, record)
            best = _distinct(pool, order, ranking, k, vectors)
            # A newer item may hide some of the best as its near-duplicates; those that move up
            # then must still come before what was not looked at.
            worst_rank = np.flatnonzero(pool.keys[order] == last)[0]
            if len(more.keys) < size and len(best) == k and best[-1] in order[: worst_rank + 1]:
                return pool.take(best, scores[best])
        size *= 4


def _decayed(
    pool: Hits, ranking: Ranking, record: sqlite3.Connection
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the scores of a pool and the order of its items."""
    if ranking.half_life_s is None:
        return pool.scores, np.arange(len(pool.keys))
    times = _times(record, pool.keys)
    return decayed(pool.scores, times, ranking.now, ranking.half_life_s)


def _distinct(
    pool: Hits,
    order: NDArray[np.int64],
    ranking: Ranking,
    k: int,
    vectors: Callable[[NDArray[np.int64]], NDArray[np.float16]],
) -> NDArray[np.int64]:
    """Return the places of the k best items of an ordered pool."""
    if ranking.distinct is None:
        return order[:k]
    return order[distinct_hits(vectors(pool.rows[order]), ranking.distinct, k)]


def _newer(
    pool: Hits,
    last: np.int64,
    ranking: Ranking,
    record: sqlite3.Connection,
    mask: KeyMask | None,
) -> KeyMask | None:
    """Return the items that are young enough to come before one of a pool."""
    assert ranking.half_life_s is not None  # noqa: S101, only then is it called
    (time,) = _times(record, pool.keys[last : last + 1])
    since = oldest_that_counts(
        pool.scores[-1], pool.scores[last], time, ranking.now, ranking.half_life_s
    )
    if since is None:
        return mask
    found = record.execute("SELECT key FROM items WHERE time >= ?", (since,))
    keys = np.fromiter((key for (key,) in found), np.int64)
    return _mask_of(keys if mask is None else keys[allowed(mask, keys)])


def _fused(pool: Hits, by_words: NDArray[np.int64], nearest: Nearest) -> Hits:
    """Return a pool and the items that words found, scored by the fusion of both rankings."""
    missing = np.setdiff1d(by_words, pool.keys)
    held = _joined(pool, nearest(len(missing), _mask_of(missing))) if len(missing) else pool
    keys, scores = fuse_rankings([pool.keys, by_words])
    sorter = np.argsort(held.keys)
    return held.take(sorter[np.searchsorted(held.keys, keys, sorter=sorter)], scores)


def _joined(pool: Hits, more: Hits) -> Hits:
    """Return the items of a pool and the others of a second one."""
    new = ~np.isin(more.keys, pool.keys)
    return Hits(
        np.concatenate([pool.keys, more.keys[new]]),
        np.concatenate([pool.scores, more.scores[new]]),
        np.concatenate([pool.parts, more.parts[new]]),
        np.concatenate([pool.rows, more.rows[new]]),
    )


def _mask_of(keys: NDArray[np.int64]) -> KeyMask:
    mask = np.zeros(keys.max(initial=-1) + 1, np.bool_)
    mask[keys] = True
    return mask


def _times(record: sqlite3.Connection, keys: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the time of each item, NaN where it has none."""
    found = dict(
        record.execute(
            "SELECT key, time FROM items WHERE key IN (SELECT value FROM json_each(?))",
            (json.dumps(keys.tolist()),),
        )
    )
    times = (found.get(key) for key in keys.tolist())
    return np.array([np.nan if time is None else time for time in times], np.float64)
