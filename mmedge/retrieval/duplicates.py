"""Near-duplicates: a camera sees the same wall a thousand times."""

from __future__ import annotations

from collections import OrderedDict, deque

import numpy as np
from numpy.typing import NDArray

from mmedge.errors import InputError
from mmedge.specs import Array, Float32Array

__all__ = ["RecentVectors", "checked_cosine", "distinct_hits"]


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


class RecentVectors:
    """The last items of each source, against which new ones are compared.

    Args:
        window: Items kept of a source.
        sources: Sources kept, the last used ones.
    """

    def __init__(self, window: int = 32, sources: int = 256) -> None:
        self._window = window
        self._sources = sources
        self._recent: OrderedDict[str, deque[tuple[str, Float32Array]]] = OrderedDict()

    def knows(self, source: str) -> bool:
        """Return whether a source was seen."""
        return source in self._recent

    def remember(self, source: str, id_: str, vectors: Float32Array) -> None:
        """Take up an item with its (V, D) vectors as the newest of its source."""
        recent = self._recent.setdefault(source, deque(maxlen=self._window))
        self._recent.move_to_end(source)
        recent.append((id_, vectors))
        if len(self._recent) > self._sources:
            self._recent.popitem(last=False)

    def nearest(self, source: str, vectors: Float32Array, cosine: float) -> str | None:
        """Return the newest item of a source that is as near as a cosine; None if none is.

        An item of several vectors is near another if each of its vectors is near one of the
        other's.

        Args:
            source: Of the item.
            vectors: (V, D) float32, L2-normalised.
            cosine: From this similarity on it is near.
        """
        for id_, others in reversed(self._recent.get(source, ())):
            if (vectors @ others.T).max(axis=1).min() >= cosine:
                return id_
        return None
