"""How wide a search in inverted lists is for a recall, measured for each kind of query."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mmedge.errors import IndexCorruptedError
from mmedge.retrieval.lists import ListQuery
from mmedge.retrieval.view import Segment
from mmedge.retrieval.widths import Width, Widths
from mmedge.specs import Float32Array, Modality

__all__ = [
    "MAX_QUERIES",
    "is_query",
    "keep_queries",
    "kept_queries",
    "measure_widths",
    "sample_texts",
]

MAX_QUERIES = 200  # of a kind
_SIZES = (10, 100)  # matches
_ENOUGH = 20  # queries of a kind; with fewer it is not measured
_UNKNOWN = "vector"  # kind of stored vectors that nobody named
_BLOCK = 4096
_CONFIDENCE = 1.645  # standard errors below the mean: the lower bound of 95 % of a normal one
_CANDIDATES = tuple(round(10 * 1.4**power) for power in range(18))  # 10 to 3048
# What a list, a code and a candidate take, in nanoseconds: they choose among widths that reach a
# recall, of which the quickest is taken.
_LIST_NS, _CODE_NS, _CANDIDATE_NS = 1500.0, 20.0, 500.0


def measure_widths(
    segment: Segment, record: sqlite3.Connection, queries: Mapping[str, Float32Array]
) -> Widths:
    """Search for queries exactly and with several widths, and compare.

    Stored vectors are queries as well, of the kind that they were encoded from; what belongs to
    the same item does not count as found.

    Args:
        segment: With lists.
        record: The index's SQLite file, in a read transaction.
        queries: (Q, D) float32, L2-normalised, by kind.
    """
    given: dict[str, list[tuple[Float32Array, int]]] = {
        kind: [(vector, -1) for vector in vectors[:MAX_QUERIES]]
        for kind, vectors in queries.items()
    }
    stored: dict[str, list[tuple[Float32Array, int]]] = {}
    for kind, place in _sampled(segment, record):
        vector = segment.vectors[place].astype(np.float32)
        vector /= max(float(np.linalg.norm(vector)), 1e-6)
        stored.setdefault(kind, []).append((vector, int(segment.keys[place])))
    curves, counts = {}, {}
    for kind, sample in {**stored, **given}.items():
        if len(sample) < _ENOUGH:
            continue
        needed = _needed(segment, sample)
        if len(needed) >= _ENOUGH:
            curves[kind] = {k: _curve(needed[:, :, :k], segment) for k in _SIZES}
            counts[kind] = len(needed)
    return Widths(curves, counts)


def kept_queries(record: sqlite3.Connection, dim: int) -> dict[str, Float32Array]:
    """Return the queries with which lists were last measured: (Q, D) float32 by kind.

    Raises:
        IndexCorruptedError: If these are no queries.
    """
    found: dict[str, list[bytes]] = {}
    most = MAX_QUERIES * len(Modality)
    for kind, vector in record.execute("SELECT kind, vector FROM queries LIMIT ?", (most,)):
        if not is_query(kind, vector, dim):
            raise IndexCorruptedError(
                f"A query with which lists were measured is damaged ({kind!r}). Run 'mmedge index "
                "compact' with queries, which measures them again."
            )
        found.setdefault(kind, []).append(vector)
    return {
        kind: np.frombuffer(b"".join(each), "<f4").reshape(-1, dim).astype(np.float32)
        for kind, each in found.items()
    }


def is_query(kind: object, vector: object, dim: int) -> bool:
    """Return whether a row of `queries` is one."""
    known = kind in {modality.value for modality in Modality}
    return known and isinstance(vector, bytes) and len(vector) == 4 * dim


def keep_queries(record: sqlite3.Connection, queries: Mapping[str, Float32Array]) -> None:
    """Keep queries in place of those before, for lists that are made again without any."""
    record.execute("DELETE FROM queries")
    record.executemany(
        "INSERT INTO queries VALUES (?, ?)",
        [
            (kind, vector.astype("<f4").tobytes())
            for kind, vectors in queries.items()
            for vector in vectors[:MAX_QUERIES]
        ],
    )


def sample_texts(record: sqlite3.Connection) -> list[str]:
    """Return texts of items, in place of what users search for."""
    found = record.execute(
        "SELECT DISTINCT text FROM items WHERE text <> '' ORDER BY revision LIMIT ?",
        (MAX_QUERIES,),
    )
    return [str(text) for (text,) in found]


def _sampled(segment: Segment, record: sqlite3.Connection) -> list[tuple[str, int]]:
    """Return the kind and the place of random vectors."""
    random = np.random.default_rng(0)
    places = random.permutation(len(segment.rows))[: 2 * MAX_QUERIES]
    found = []
    for place in places.tolist():
        key = int(segment.keys[place])
        row = record.execute("SELECT modality FROM items WHERE key = ?", (key,)).fetchone()
        if row is not None:
            found.append((_UNKNOWN if row[0] is None else str(row[0]), place))
    return found[:MAX_QUERIES]


def _needed(segment: Segment, sample: Sequence[tuple[Float32Array, int]]) -> NDArray[np.int32]:
    """Return how many candidates it takes until each true match is one of them.

    A query whose own item leaves fewer vectors than there are matches is left out.

    Returns:
        (Q, L, K): for each query, number of lists and match.
    """
    lists, most = segment.lists, _SIZES[-1]
    assert lists is not None  # noqa: S101, the caller's
    steps = _list_steps(len(lists.centroids))
    truths = _true_matches(segment, sample, most)
    found = []
    for (vector, key), truth in zip(sample, truths, strict=True):
        if truth is None:
            continue
        query = ListQuery(lists, vector)
        order = np.argsort(-query.products, kind="stable")[: steps[-1]]
        estimates = query.estimates(order)
        ends = np.cumsum(lists.starts[order + 1] - lists.starts[order])
        ranks = np.full(len(lists.centroids), len(order))
        ranks[order] = np.arange(len(order))
        homes = np.searchsorted(lists.starts, truth, side="right") - 1
        within = ranks[homes]
        seen = within < len(order)
        values = np.zeros(most, np.float32)
        starts = ends[within[seen]] - lists.starts[homes[seen] + 1]
        values[seen] = estimates[starts + truth[seen]]
        if key >= 0:
            keys = np.concatenate(
                [segment.keys[lists.starts[i] : lists.starts[i + 1]] for i in order]
            )
            estimates[keys == key] = -np.inf
        found.append(_candidates_needed(estimates, ends, steps, within, values))
    return np.array(found, np.int32).reshape(-1, len(steps), most)


def _candidates_needed(
    estimates: Float32Array,
    ends: NDArray[np.int64],
    steps: Sequence[int],
    within: NDArray[np.int64],
    values: Float32Array,
) -> NDArray[np.int32]:
    """Return (L, K): candidates until each true match is one, for each number of lists."""
    most, start = _CANDIDATES[-1], 0
    best = np.empty(0, np.float32)
    needed = np.full((len(steps), len(values)), np.iinfo(np.int32).max, np.int32)
    for row, lists in enumerate(steps):
        best = np.concatenate([best, estimates[start : ends[lists - 1]]])
        start = ends[lists - 1]
        best = np.sort(best)[-(most + 1) :]  # one more, so that what lies below is not within
        held = within < lists
        needed[row, held] = len(best) - np.searchsorted(best, values[held], side="left")
    return needed


def _list_steps(count: int) -> list[int]:
    steps = [1]
    while steps[-1] < (count + 1) // 2:
        steps.append(max(steps[-1] + 1, round(1.25 * steps[-1])))
    return [step for step in steps if step <= max(1, (count + 1) // 2)]


def _true_matches(
    segment: Segment, sample: Sequence[tuple[Float32Array, int]], k: int
) -> list[NDArray[np.int64] | None]:
    """Return the (k,) places of the vectors nearest to each query, best first, but of its item's.

    None for a query whose own item leaves fewer.
    """
    queries = np.stack([vector for vector, _ in sample])
    own = np.array([key for _, key in sample])[:, None]
    values = np.empty((len(sample), 0), np.float32)
    places = np.empty((len(sample), 0), np.int64)
    for start in range(0, len(segment.vectors), _BLOCK):
        block = segment.vectors[start : start + _BLOCK].astype(np.float32)
        products = queries @ block.T
        products[own == segment.keys[start : start + _BLOCK]] = -np.inf
        here = np.broadcast_to(np.arange(start, start + len(block)), products.shape)
        values = np.concatenate([values, products], axis=1)
        places = np.concatenate([places, here], axis=1)
        best = np.argpartition(-values, min(k, values.shape[1] - 1), axis=1)[:, :k]
        values = np.take_along_axis(values, best, axis=1)
        places = np.take_along_axis(places, best, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    places = np.take_along_axis(places, order, axis=1)
    values = np.take_along_axis(values, order, axis=1)
    enough = values.shape[1] == k
    return [
        row if enough and last > -np.inf else None
        for row, last in zip(places, values[:, -1], strict=True)
    ]


def _curve(needed: NDArray[np.int32], segment: Segment) -> tuple[tuple[Width, float], ...]:
    """Return widths and the recall that each reaches, those that a quicker one does not reach."""
    lists = segment.lists
    assert lists is not None  # noqa: S101, the caller's
    steps = _list_steps(len(lists.centroids))
    size, k = len(segment.vectors) / len(lists.centroids), needed.shape[2]
    measured = []
    for row, count in enumerate(steps):
        for candidates in _CANDIDATES:
            if candidates < k:
                continue
            shares = np.mean(needed[:, row] <= candidates, axis=1)
            reached = shares.mean() - _CONFIDENCE * shares.std(ddof=1) / len(shares) ** 0.5
            cost = count * (_LIST_NS + _CODE_NS * size) + candidates * _CANDIDATE_NS
            measured.append((cost, Width(count, candidates), float(reached)))
    curve: list[tuple[Width, float]] = []
    for _, width, reached in sorted(measured):
        if not curve or reached > curve[-1][1]:
            curve.append((width, reached))
    return tuple(curve)
