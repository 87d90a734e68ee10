"""Inverted lists: vectors in clusters, of which a search scans the nearest few.

The layout is IVF (Jégou, Douze, Schmid: Product Quantization for Nearest Neighbor Search, 2011,
section IV) with codes of one bit a coordinate; see codes.py. What the codes estimate to be best is
compared by the vectors themselves. How many lists and candidates it takes is measured on the user's
own data, for each kind of query: a text query does not lie where image vectors lie, and needs more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmedge.retrieval.clustering import cluster
from mmedge.retrieval.codes import QUERY_BITS, Rotation, encode, rounded_query
from mmedge.retrieval.scanning import byte_products, differing_bits
from mmedge.specs import Float32Array

__all__ = ["ListQuery", "Lists", "build_lists", "largest"]

_BLOCK = 4096
_AT_ONCE = 1 << 16  # vectors whose estimates are in memory


@dataclass(frozen=True, slots=True, eq=False)
class Lists:
    """The clusters of a snapshot, whose vectors lie in the order of the lists.

    Attributes:
        starts: (C + 1,) int64, ascending; list i holds the vectors starts[i] to starts[i + 1].
        rotation: Of vectors, before they are coded.
        centroids: (C, P) int8, rotated, in units of `step`.
        step: See centroids.
        codes: (N, P / 8 + 8) uint8, of each vector the bits and two float32 factors; see
            codes.encode; may be mapped.
    """

    starts: NDArray[np.int64]
    rotation: Rotation
    centroids: NDArray[np.int8]
    step: float
    codes: NDArray[np.uint8]


class ListQuery:
    """One query, ready for the lists of one snapshot.

    Args:
        lists: That are searched.
        vector: (D,) float32.

    Attributes:
        products: (C,) float32, its inner products with the centroids.
    """

    __slots__ = ("_lists", "_planes", "_step", "products")

    def __init__(self, lists: Lists, vector: Float32Array) -> None:
        self._lists = lists
        rotated = lists.rotation.apply(vector[None])[0]
        self._planes, self._step = rounded_query(rotated)
        scale = max(float(np.abs(rotated).max()) / 127, float(np.finfo(np.float32).tiny))
        rounded = np.round(rotated / scale).astype(np.int8)
        self.products = byte_products(rounded, lists.centroids)
        self.products *= np.float32(scale * lists.step)

    def nearest(self, count: int) -> NDArray[np.int64]:
        """Return the lists with the largest products, unordered."""
        if count >= len(self.products):
            return np.arange(len(self.products))
        return np.argpartition(-self.products, count - 1)[:count]

    def estimates(self, chosen: NDArray[np.int64]) -> Float32Array:
        """Return the estimated products with the vectors of some lists, one list after another."""
        lists = self._lists
        starts, ends = lists.starts[chosen], lists.starts[chosen + 1]
        spans = zip(starts.tolist(), ends.tolist(), strict=True)
        codes = np.concatenate([lists.codes[start:end] for start, end in spans])
        bits = differing_bits(self._planes, codes[:, :-8])
        total = bits[-1]
        for plane in bits[-2::-1]:  # the highest bits first
            total <<= 1
            total += plane
        found: Float32Array = total.astype(np.float32)
        found *= np.float32(-self._step)
        found += np.float32(self._step * ((1 << QUERY_BITS) - 1) / 2 * lists.rotation.length)
        factors = codes[:, -8:].view(np.float32)
        found *= factors[:, 0]
        centroids = np.repeat(self.products[chosen], ends - starts)
        centroids *= factors[:, 1]
        found += centroids
        return found

    def candidates(
        self,
        chosen: NDArray[np.int64],
        count: int,
        counts: Callable[[NDArray[np.int64]], NDArray[np.bool_]] | None,
    ) -> NDArray[np.int64]:
        """Return the places of the vectors in some lists that are estimated to be best, ascending.

        Args:
            chosen: The lists.
            count: Places, at most.
            counts: Returns which of some places count; None if all do.
        """
        starts = self._lists.starts
        sizes = starts[chosen + 1] - starts[chosen]
        cuts = np.flatnonzero(np.diff(np.cumsum(sizes) // _AT_ONCE)) + 1
        places, values = [], []
        for some in np.split(chosen, cuts):
            found = self.estimates(some)
            ends = np.cumsum(starts[some + 1] - starts[some])
            if counts is None:
                best = largest(found, count)
            else:
                held = np.flatnonzero(counts(_places(starts, some, ends, np.arange(len(found)))))
                best = held[largest(found[held], count)]
            places.append(_places(starts, some, ends, best))
            values.append(found[best])
        best = largest(np.concatenate(values), count)
        return np.sort(np.concatenate(places)[best])


def _places(
    starts: NDArray[np.int64],
    chosen: NDArray[np.int64],
    ends: NDArray[np.int64],
    found: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return the places of vectors from their positions in lists that were scanned."""
    which = np.searchsorted(ends, found, side="right")
    return starts[chosen[which] + 1] - ends[which] + found


def largest(values: Float32Array, count: int) -> NDArray[np.int64]:
    """Return the positions of the largest values, unordered.

    numpy's partition of all values takes ten times as long: here the maxima of groups give a bound
    that at least `count` values reach.
    """
    if len(values) <= count:
        return np.arange(len(values))
    groups = 8 * count
    rest = len(values) % groups
    if len(values) < 2 * groups:
        return np.argpartition(-values, count - 1)[:count]
    maxima = values[rest:].reshape(-1, groups).max(axis=0)
    bound = np.partition(maxima, groups - count)[groups - count]
    reaching = np.flatnonzero(values >= bound)
    return reaching[np.argpartition(-values[reaching], count - 1)[:count]]


def build_lists(vectors: NDArray[np.float16]) -> tuple[Lists, NDArray[np.int64]]:
    """Cluster and code vectors, the same for the same vectors.

    Args:
        vectors: (N, D), L2-normalised.

    Returns:
        The lists, and the (N,) order in which their vectors lie: place i holds
        vectors[order[i]].
    """
    rotation = Rotation.random(vectors.shape[1])
    centroids, step, order, starts = cluster(vectors, rotation)
    codes = np.empty((len(order), rotation.length // 8 + 8), np.uint8)
    owners = np.repeat(np.arange(len(centroids)), np.diff(starts))
    for start in range(0, len(order), _BLOCK):
        some = slice(start, start + _BLOCK)
        owner = centroids[owners[some]] * np.float32(step)
        residuals = rotation.apply(vectors[order[some]].astype(np.float32)) - owner
        codes[some] = encode(residuals, owner)
    return Lists(starts, rotation, centroids, step, codes), order
