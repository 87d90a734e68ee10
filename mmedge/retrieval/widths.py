"""How many inverted lists reach which recall, measured for each kind of query."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mmedge.errors import IndexCorruptedError
from mmedge.retrieval.lists import Widths, list_ranks
from mmedge.retrieval.scanning import ScanQuery
from mmedge.retrieval.view import Segment
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


def measure_widths(
    segment: Segment, record: sqlite3.Connection, queries: Mapping[str, Float32Array]
) -> Widths:
    """Search for queries exactly, and count in which lists what they find lies.

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
    measured = {kind: _ranks(segment, sample) for kind, sample in {**stored, **given}.items()}
    enough = {kind: np.array(ranks) for kind, ranks in measured.items() if len(ranks) >= _ENOUGH}
    curves = {
        kind: {k: _curve(ranks[:, :k], segment) for k in _SIZES} for kind, ranks in enough.items()
    }
    return Widths(curves, {kind: len(ranks) for kind, ranks in enough.items()})


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


def _ranks(segment: Segment, sample: Sequence[tuple[Float32Array, int]]) -> list[NDArray[np.int64]]:
    """Return for each query in which list, in the order of the scan, each true match lies.

    A query whose own item leaves fewer vectors than there are matches is left out.
    """
    assert segment.lists is not None  # noqa: S101, the caller's
    most = _SIZES[-1]
    ranks = []
    for vector, key in sample:
        query = ScanQuery(vector)
        products = query.products(segment.vectors)
        others = np.flatnonzero(segment.keys != key)
        best = query.nearest(segment.vectors, others, products[others], most)
        if len(best.places) == most:
            ranks.append(list_ranks(segment.lists, query, best.places))
    return ranks


def _curve(ranks: NDArray[np.int64], segment: Segment) -> tuple[tuple[int, float], ...]:
    assert segment.lists is not None  # noqa: S101, the caller's
    curve: list[tuple[int, float]] = []
    lists = 1
    while lists <= len(segment.lists.centroids) and (not curve or curve[-1][1] < 1):
        shares = np.mean(ranks < lists, axis=1)
        # Less one standard error: what some queries reach by luck, others do not.
        reached = float(shares.mean() - shares.std() / len(shares) ** 0.5)
        curve.append((lists, reached))
        lists = max(lists + 1, round(1.25 * lists))
    return tuple(curve)
