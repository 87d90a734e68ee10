"""K-means over rotated vectors, rounded to int8: the centroids of inverted lists."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmedge.retrieval.codes import Rotation
from mmedge.retrieval.scanning import ByteRows

__all__ = ["cluster"]

_SAMPLES = 32  # vectors a list, that k-means looks at
_ROUNDS = 8
_BLOCK = 1024
_MAX_LISTS = 65_536
_IN_A_LIST = 128  # vectors, on average, of a large index


def cluster(
    vectors: NDArray[np.float16], rotation: Rotation
) -> tuple[NDArray[np.int8], float, NDArray[np.int64], NDArray[np.int64]]:
    """Cluster vectors, the same for the same vectors.

    Args:
        vectors: (N, D), L2-normalised.
        rotation: Of them, so that no coordinate is much larger than others.

    Returns:
        (C, P) centroids, rotated; the step in which they are given; (N,) the order in which the
        vectors of one cluster lie together; and (C + 1,) where in that order each cluster begins.
    """
    size = len(vectors)
    count = min(max(1, round(4 * size**0.5), size // _IN_A_LIST), _MAX_LISTS, max(1, size))
    random = np.random.default_rng(0)
    chosen = np.sort(random.choice(size, min(size, _SAMPLES * count), replace=False))
    first = rotation.apply(vectors[chosen[:_BLOCK]].astype(np.float32))
    step = max(1.5 * float(np.abs(first).max()) / 127, float(np.finfo(np.float32).tiny))
    sample = _rounded(vectors, chosen, rotation, step)
    centroids = sample[random.choice(len(sample), count, replace=False)]
    for _ in range(_ROUNDS):
        nearest = _nearest(sample, centroids)
        order, starts = _sorted(nearest, count)
        sizes = np.diff(starts)
        for number in np.flatnonzero(sizes):
            members = sample[order[starts[number] : starts[number + 1]]]
            centroids[number] = members.mean(axis=0, dtype=np.float32).round()
        empty = np.flatnonzero(sizes == 0)
        centroids[empty] = sample[random.choice(len(sample), len(empty), replace=False)]
    del sample
    nearest = np.empty(size, np.int64)
    for start in range(0, size, 64 * _BLOCK):
        some = np.arange(start, min(size, start + 64 * _BLOCK))
        nearest[some] = _nearest(_rounded(vectors, some, rotation, step), centroids)
    return centroids, step, *_sorted(nearest, count)


def _rounded(
    vectors: NDArray[np.float16], places: NDArray[np.int64], rotation: Rotation, step: float
) -> NDArray[np.int8]:
    found = np.empty((len(places), rotation.length), np.int8)
    for start in range(0, len(places), _BLOCK):
        block = vectors[places[start : start + _BLOCK]].astype(np.float32)
        rotated = rotation.apply(block) / np.float32(step)
        found[start : start + _BLOCK] = rotated.round().clip(-127, 127)
    return found


def _nearest(vectors: NDArray[np.int8], centroids: NDArray[np.int8]) -> NDArray[np.int64]:
    """Return the centroid nearest to each vector by Euclidean distance."""
    found = np.empty(len(vectors), np.int64)
    rows = ByteRows(centroids)
    half = np.square(centroids, dtype=np.int32).sum(axis=1, dtype=np.int32) // 2
    for start in range(0, len(vectors), _BLOCK):
        products = rows.products(vectors[start : start + _BLOCK])
        products -= half
        found[start : start + _BLOCK] = np.argmax(products, axis=1)
    return found


def _sorted(nearest: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = np.argsort(nearest, kind="stable")
    return order, np.searchsorted(nearest[order], np.arange(count + 1)).astype(np.int64)
