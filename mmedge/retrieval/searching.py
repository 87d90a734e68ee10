"""A search in one view of an index: filter, nearest vectors, one hit an item, their fields."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from functools import partial

from mmedge.errors import IndexCorruptedError
from mmedge.retrieval.filter_sql import AllowedItems
from mmedge.retrieval.filters import Filter, check_fields
from mmedge.retrieval.items import Match
from mmedge.retrieval.nearest import Probing, nearest_items
from mmedge.retrieval.ranking import Ranking, rank
from mmedge.retrieval.rows import Fields, read_fields
from mmedge.retrieval.view import View
from mmedge.specs import Float32Array

__all__ = ["search_view"]


def search_view(
    view: View,
    record: sqlite3.Connection,
    queries: Float32Array,
    k: int,
    *,
    where: Filter | None,
    probing: Probing,
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
        probing: Kind of the queries, and the recall to reach.
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
        rank(
            ranking,
            k,
            partial(nearest_items, view, query, probing=probing),
            view.vectors_of,
            record,
            mask,
        )
        for query, ranking in zip(queries, rankings, strict=True)
    ]
    keys = {key for hits in found for key in hits.keys.tolist()}
    items = read_fields(record, keys)
    if missing := keys - items.keys():
        raise IndexCorruptedError(
            f"A snapshot holds vectors of {len(missing)} items that the record does not have. Run "
            "'mmedge index verify --repair', which makes it again from the record."
        )
    return [
        [
            _match(items[key], score, part)
            for key, score, part in zip(
                hits.keys.tolist(), hits.scores.tolist(), hits.parts.tolist(), strict=True
            )
        ]
        for hits in found
    ]


def _match(fields: Fields, score: float, part: int) -> Match:
    name, seconds, source, text, metadata = fields
    return Match(name, score, metadata, seconds, source, text, part)
