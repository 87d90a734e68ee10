"""A search in one view of an index: filter, nearest vectors, one hit an item, their fields."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mmedge.retrieval.filter_sql import AllowedItems, KeyMask, allowed
from mmedge.retrieval.filters import Filter, check_fields
from mmedge.retrieval.items import Item, Match
from mmedge.retrieval.ranking import Hits, Ranking, rank
from mmedge.retrieval.rows import read_items
from mmedge.retrieval.view import View
from mmedge.specs import Float32Array

__all__ = ["search_view"]

_BLOCK_ROWS = 8192


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
        mask = filters.mask(record, where, of=view.about.uuid, seq=view.about.seq)
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
    keys = [np.empty(0, np.int64)]
    scores = [np.empty(0, np.float32)]
    parts = [np.empty(0, np.int32)]
    rows: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    for segment in view.segments:
        counts = view.alive.has(segment.rows)
        if mask is not None:
            counts &= allowed(mask, segment.keys)
        places = np.flatnonzero(counts)
        for start in range(0, len(places), _BLOCK_ROWS):
            some = places[start : start + _BLOCK_ROWS]
            scores.append(segment.vectors[some].astype(np.float32) @ query)
            keys.append(segment.keys[some])
            parts.append(segment.parts[some])
            rows.append(segment.rows[some])
    all_keys, all_scores = np.concatenate(keys), np.concatenate(scores)
    order = np.lexsort((all_keys, -all_scores))
    _, firsts = np.unique(all_keys[order], return_index=True)
    best = order[np.sort(firsts)[:n]]
    found = all_scores[best].clip(-1, 1).astype(np.float64)
    return Hits(all_keys[best], found, np.concatenate(parts)[best], np.concatenate(rows)[best])
