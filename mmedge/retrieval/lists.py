"""Inverted lists: vectors in clusters, of which a search scans the nearest few.

The layout is IVF (Jégou, Douze, Schmid: Product Quantization for Nearest Neighbor Search, 2011,
section IV) with the vectors themselves in the lists, and no codes: what a list holds is compared
exactly, so a search misses only what lies in lists that it does not scan. How many lists it takes
is measured on the user's own data, for each kind of query: a text query does not lie where image
vectors lie, and needs more of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmedge.errors import IndexCorruptedError
from mmedge.retrieval.scanning import ScanQuery
from mmedge.specs import Float32Array

__all__ = ["Lists", "Widths", "build_lists", "list_ranks"]

_SAMPLES = 64  # vectors a list, that k-means looks at
_ROUNDS = 8
_BLOCK = 4096
_MAX_LISTS = 65_536
_TEXT_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Lists:
    """The clusters of a snapshot, whose vectors lie in the order of the lists.

    Attributes:
        centroids: (C, D) float16.
        starts: (C + 1,) int64, ascending; list i holds the vectors starts[i] to starts[i + 1].
    """

    centroids: NDArray[np.float16]
    starts: NDArray[np.int64]

    def nearest(self, query: ScanQuery, count: int) -> NDArray[np.int64]:
        """Return the lists whose centroids have the largest products with a query, unordered."""
        if count >= len(self.centroids):
            return np.arange(len(self.centroids))
        products = query.products(self.centroids)
        return np.argpartition(-products, count - 1)[:count]


@dataclass(frozen=True, slots=True)
class Widths:
    """How many lists reach which recall, by kind of query and number of matches.

    Attributes:
        curves: By kind of query ("text", "image", ...), by k: (lists, recall) pairs, ascending; the
            recall is the queries' mean less one standard error.
        queries: How many queries of each kind were measured.
    """

    curves: Mapping[str, Mapping[int, tuple[tuple[int, float], ...]]]
    queries: Mapping[str, int]

    def lists(self, kind: str | None, recall: float, k: int) -> int | None:
        """Return the fewest lists that reach a recall; None if only an exact search does.

        Args:
            kind: Of the query; None for a vector of unknown kind, which gets the most that any kind
                needs.
            recall: Share of the true k nearest to find on average.
            k: Matches.
        """
        kinds = list(self.curves) if kind is None else [kind]
        needed: list[int] = []
        for name in kinds:
            curves = self.curves.get(name, {})
            measured = min((size for size in curves if size >= k), default=None)
            if measured is None:
                return None
            enough = [lists for lists, reached in curves[measured] if reached >= recall]
            if not enough:
                return None
            needed.append(min(enough))
        return max(needed, default=None)

    def to_json(self) -> str:
        """Return a text for `from_json`."""
        return json.dumps({"curves": self.curves, "queries": self.queries})

    @classmethod
    def from_json(cls, text: str) -> Widths:
        """Read what `to_json` wrote.

        Raises:
            IndexCorruptedError: If it is something else.
        """
        try:
            if len(text) > _TEXT_CHARACTERS:
                raise ValueError(f"{len(text)} characters")  # noqa: TRY301
            read = json.loads(text)
            curves = {
                str(kind): {
                    int(k): tuple((_positive(lists), float(reached)) for lists, reached in curve)
                    for k, curve in by_k.items()
                }
                for kind, by_k in read["curves"].items()
            }
            queries = {str(kind): int(count) for kind, count in read["queries"].items()}
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
            ArithmeticError,
        ) as error:
            raise IndexCorruptedError(
                f"The search widths of a snapshot are damaged ({error}). Run 'mmedge index "
                "compact', which measures them again."
            ) from error
        return cls(curves, queries)


def _positive(lists: int) -> int:
    if int(lists) < 1:
        raise ValueError(f"{lists} lists")
    return int(lists)


def build_lists(vectors: NDArray[np.float16]) -> tuple[Lists, NDArray[np.int64]]:
    """Cluster vectors by k-means, the same for the same vectors.

    Args:
        vectors: (N, D), L2-normalised.

    Returns:
        The lists, and the (N,) order in which their vectors lie: place i holds
        vectors[order[i]].
    """
    count = min(max(1, round(4 * len(vectors) ** 0.5)), _MAX_LISTS, max(1, len(vectors)))
    random = np.random.default_rng(0)
    chosen = random.choice(len(vectors), min(len(vectors), _SAMPLES * count), replace=False)
    sample = vectors[np.sort(chosen)]
    centroids = sample[random.choice(len(sample), count, replace=False)].astype(np.float32)
    for _ in range(_ROUNDS):
        nearest = _assigned(sample, centroids)
        order = np.argsort(nearest, kind="stable")
        starts = np.searchsorted(nearest[order], np.arange(count + 1))
        sizes = np.diff(starts)
        for number in np.flatnonzero(sizes):
            members = sample[order[starts[number] : starts[number + 1]]]
            centroids[number] = members.mean(axis=0, dtype=np.float32)
        empty = np.flatnonzero(sizes == 0)
        centroids[empty] = sample[random.choice(len(sample), len(empty), replace=False)]
    rounded = centroids.astype(np.float16)
    nearest = _assigned(vectors, rounded.astype(np.float32))
    order = np.argsort(nearest, kind="stable")
    starts = np.searchsorted(nearest[order], np.arange(count + 1))
    return Lists(rounded, starts.astype(np.int64)), order


def _assigned(vectors: NDArray[np.float16], centroids: Float32Array) -> NDArray[np.int64]:
    """Return the centroid nearest to each vector by Euclidean distance."""
    found = np.empty(len(vectors), np.int64)
    half = 0.5 * (centroids * centroids).sum(axis=1)
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[start : start + _BLOCK].astype(np.float32)
        found[start : start + _BLOCK] = np.argmax(block @ centroids.T - half, axis=1)
    return found


def list_ranks(lists: Lists, query: ScanQuery, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many lists a search scans before the one that holds each of these places."""
    products = query.products(lists.centroids)
    ranks = np.empty(len(products), np.int64)
    ranks[np.argsort(-products, kind="stable")] = np.arange(len(products))
    return ranks[np.searchsorted(lists.starts, places, side="right") - 1]
