"""A search in one view of an index: filter, nearest vectors, one hit an item, their fields."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from functools import partial

import numpy as np

from mmedge.retrieval.exact import Nearest, top_k
from mmedge.retrieval.filter_sql import AllowedItems, KeyMask, allowed
from mmedge.retrieval.filters import Filter, check_fields
from mmedge.retrieval.items import Item, Match
from mmedge.retrieval.ranking import Hits, Ranking, rank
from mmedge.retrieval.rows import read_items
from mmedge.retrieval.view import Segment, View
from mmedge.specs import Float32Array

__all__ = ["search_view"]


def search_view(
    view: View,
    record: sqlite3.Connection,
    queries: Float32Array,
    k: int,
    *,
    where: Filter | None,
    recall: float,  # noqa: ARG001, this scan is exact
    rankings: Sequence[Ranking],
    filters: AllowedItems,
) -> list[list[Match]]:
    """Return the k best items for each query, best first.

    Args:
        view: What is searched.
        record: In the read transaction of the view.
        queries: (Q, D) float32, L2-normalised.
        k: Items a query, at most.
        where: Condition on the items.
        recall: Share of the true k nearest to be found on average.
        rankings: What counts beside similarity, for each query.
        filters: Keeps what recent filters allow.

    Raises:
        InputError: If the filter is malformed or names a field that no item has, or there is no
            usable word among the words of a ranking.
    """
    mask = None
    if where is not None:
        check_fields(where, (name for (name,) in record.execute("SELECT name FROM fields")))
        about = view.about
        mask = filters.mask(record, where, of=f"{about.uuid} {about.generation}", seq=about.seq)
    found = [
        rank(ranking, k, partial(_nearest, view, query), view.vectors_of, record, mask)
        for query, ranking in zip(queries, rankings, strict=True)
    ]
    keys = {int(key) for hits in found for key in hits.keys}
    items = {key: row.item for key, row in read_items(record, keys, vectors=False).items()}
    return [
        [
            _match(items[int(key)], float(score), int(part))
            for key, score, part in zip(hits.keys, hits.scores, hits.parts, strict=True)
        ]
        for hits in found
    ]


def _match(item: Item, score: float, part: int) -> Match:
    return Match(item.id, score, item.metadata, item.time, item.source, item.text, part)


def _nearest(view: View, query: Float32Array, n: int, mask: KeyMask | None) -> Hits:
    """Return the n nearest items, by an exact scan."""
    searched = []
    for segment in view.segments:
        counts = view.alive.has(segment.rows)
        if mask is not None:
            counts &= allowed(mask, segment.keys)
        searched.append((segment, None if counts.all() else np.flatnonzero(counts)))
    vectors = n
    while True:
        found = [
            (segment, top_k(query[None], segment.vectors, vectors, places=places)[0])
            for segment, places in searched
        ]
        hits = _one_an_item(found, n)
        # No vector that is in none of the lists is nearer than the last one of its list.
        unseen = [each.scores[-1] for _, each in found if len(each.places) == vectors]
        if not unseen or (len(hits.keys) == n and hits.scores[-1] >= max(unseen)):
            return hits
        vectors *= 4  # several of these are of one item


def _one_an_item(found: Sequence[tuple[Segment, Nearest]], n: int) -> Hits:
    """Return the n best items of the nearest vectors, each with its best vector."""
    keys = np.concatenate([segment.keys[nearest.places] for segment, nearest in found])
    scores = np.concatenate([nearest.scores for _, nearest in found]).astype(np.float64)
    parts = np.concatenate([segment.parts[nearest.places] for segment, nearest in found])
    rows = np.concatenate([segment.rows[nearest.places] for segment, nearest in found])
    order = np.lexsort((rows, keys, -scores))
    _, firsts = np.unique(keys[order], return_index=True)
    best = order[np.sort(firsts)[:n]]
    return Hits(keys[best], scores[best], parts[best], rows[best])
