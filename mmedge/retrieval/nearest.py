"""The nearest items to one query: an exact scan, or a scan of the nearest inverted lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmedge.retrieval.exact import Nearest
from mmedge.retrieval.filter_sql import KeyMask, allowed
from mmedge.retrieval.lists import ListQuery, Lists
from mmedge.retrieval.ranking import Hits
from mmedge.retrieval.scanning import ScanQuery
from mmedge.retrieval.view import Segment, View
from mmedge.retrieval.widths import Width
from mmedge.specs import Float32Array

__all__ = ["Probing", "nearest_items"]

_FEW = 20_000  # allowed items up to which an exact scan of these is quick


@dataclass(frozen=True, slots=True)
class Probing:
    """How much of each segment a search looks at.

    Attributes:
        kind: Of the query ("text", "image", ...); None for a vector of unknown kind.
        recall: Share of the true nearest to find on average; 1 for an exact search.
    """

    kind: str | None = None
    recall: float = 1.0

    def width(self, segment: Segment, n: int, mask: KeyMask | None) -> Width | None:
        """Return how much of a segment to look at; None for all of its vectors.

        A filter that allows a share f of the items leaves each list f of its vectors, so 1/f as
        many lists are scanned.
        """
        if segment.lists is None or segment.widths is None or self.recall >= 1:
            return None
        width = segment.widths.width(self.kind, self.recall, n)
        if width is None:
            return None
        lists = width.lists
        if mask is not None:
            held = np.count_nonzero(mask)
            if held <= _FEW:
                return None
            lists = round(lists * max(1.0, len(segment.rows) / held))
        if 2 * lists >= len(segment.lists.centroids):
            return None
        return Width(lists, width.candidates)


def nearest_items(
    view: View, query: Float32Array, n: int, mask: KeyMask | None, *, probing: Probing
) -> Hits:
    """Return the n nearest items, best first, ties in the order in which they were added.

    A segment is scanned whole where it has no lists, where these do not reach the recall, where a
    filter leaves few items, or where the scanned lists hold fewer than n.

    Args:
        view: What is searched.
        query: (D,) float32, L2-normalised.
        n: Items, at most.
        mask: Which items are allowed; None for all.
        probing: How much of each segment is looked at.
    """
    scans = [_Scan(view, segment, mask) for segment in view.segments if len(segment.rows)]
    wanted = ScanQuery(query)
    vectors = n
    while True:
        found = [(scan.segment, scan.best(wanted, vectors, probing)) for scan in scans]
        hits = _one_an_item(found, n)
        # No vector that is in none of the results is nearer than the last one of its result.
        unseen = [each.scores[-1] for _, each in found if len(each.places) == vectors]
        if not unseen or (len(hits.keys) == n and hits.scores[-1] >= max(unseen)):
            return hits
        vectors *= 4  # several of these are of one item


def _one_an_item(found: Sequence[tuple[Segment, Nearest]], n: int) -> Hits:
    """Return the n best items of the nearest vectors, each with its best vector."""
    if not found:
        none = np.empty(0, np.int64)
        return Hits(none, np.empty(0, np.float64), none.astype(np.int32), none)
    keys = np.concatenate([segment.keys[nearest.places] for segment, nearest in found])
    scores = np.concatenate([nearest.scores for _, nearest in found]).astype(np.float64)
    parts = np.concatenate([segment.parts[nearest.places] for segment, nearest in found])
    rows = np.concatenate([segment.rows[nearest.places] for segment, nearest in found])
    order = np.lexsort((rows, keys, -scores))
    _, firsts = np.unique(keys[order], return_index=True)
    best = order[np.sort(firsts)[:n]]
    return Hits(keys[best], scores[best], parts[best], rows[best])


class _Scan:
    """One segment, and which of its rows count; kept while a search widens."""

    def __init__(self, view: View, segment: Segment, mask: KeyMask | None) -> None:
        self.segment = segment
        self._alive = view.alive if view.last_gone else None
        self._mask = mask
        self._whole: tuple[NDArray[np.int64] | None] | None = None

    def best(self, query: ScanQuery, n: int, probing: Probing) -> Nearest:
        """Return the n nearest vectors."""
        lists, width = self.segment.lists, probing.width(self.segment, n, self._mask)
        if width is not None and lists is not None:
            found = self._probe(query, n, lists, width)
            if len(found.places) == n:
                return found
        if self._whole is None:
            counts = self._counts(slice(None))
            self._whole = (None if counts is None else np.flatnonzero(counts),)
        return query.scan(self.segment.vectors, n, self._whole[0])

    def _probe(self, query: ScanQuery, n: int, lists: Lists, width: Width) -> Nearest:
        listed = ListQuery(lists, query.vector)
        everything = self._alive is None and self._mask is None
        places = listed.candidates(
            listed.nearest(width.lists), width.candidates, None if everything else self._counting
        )
        vectors = self.segment.vectors
        return query.nearest(vectors, places, query.products(vectors[places]), n)

    def _counting(self, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        counts = self._counts(places)
        return np.ones(len(places), np.bool_) if counts is None else counts

    def _counts(self, places: slice | NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Return which of some places count; None for all."""
        counts = None
        if self._alive is not None:
            counts = self._alive.has(self.segment.rows[places])
        if self._mask is not None:
            held = allowed(self._mask, self.segment.keys[places])
            counts = held if counts is None else counts & held
        return counts
