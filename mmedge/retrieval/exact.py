"""Exact search over fp16 vectors in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmedge.specs import Float32Array

__all__ = ["Nearest", "merge", "products", "scores", "select", "top_k"]

_BLOCK_BYTES = 512 << 10  # fp32 vectors of a block: small enough for the second cache
_SCORES_AT_ONCE = 1 << 22  # scores in memory before the best are kept: 16 MiB
_ROUNDING = 1e-5  # more than float32 sums of products of unit vectors differ by
_SIGN_AND_VALUE = np.int32(-0x70002000)  # 0x8FFFE000
_SCALE = 2.0**112  # between fp16's exponent bias and fp32's: 127 - 15


@dataclass(frozen=True, slots=True, eq=False)
class Nearest:
    """The vectors nearest to one query, best first; equal scores in ascending order of place.

    Attributes:
        places: (K,) int64, positions in the searched vectors.
        scores: (K,) float32, cosine similarity in [-1, 1].
    """

    places: NDArray[np.int64]
    scores: Float32Array


def top_k(
    queries: Float32Array,
    vectors: NDArray[np.float16],
    k: int,
    *,
    places: NDArray[np.int64] | None = None,
    threads: int = 1,
) -> list[Nearest]:
    """Return the k vectors nearest to each query.

    Scores depend on the query and the vector alone, not on the block, the thread or the other
    queries: a copy of a vector has its score, wherever it is stored.

    Args:
        queries: (Q, D) float32, L2-normalised.
        vectors: (N, D) float16, finite and L2-normalised; may be mapped.
        k: Vectors a query, at most; at least 1.
        places: Positions that are searched, ascending and distinct; None for all.
        threads: Threads that scan. numpy's matrix product may use more for several queries.
    """
    count = len(vectors) if places is None else len(places)
    if not count or not len(queries):
        nothing = Nearest(np.empty(0, np.int64), np.empty(0, np.float32))
        return [nothing for _ in queries]
    share = -(-count // max(1, threads))
    starts = range(0, count, share)

    def scan(start: int) -> list[Nearest]:
        return _scan(queries, vectors, k, places, start, min(count, start + share))

    if len(starts) == 1:
        return scan(0)
    with ThreadPoolExecutor(len(starts)) as pool:
        parts = list(pool.map(scan, starts))
    return [merge(found, k) for found in zip(*parts, strict=True)]


def merge(found: Sequence[Nearest], k: int) -> Nearest:
    """Return the k best of several results of one query whose places do not overlap."""
    if len(found) == 1:
        return Nearest(found[0].places[:k], found[0].scores[:k])
    places = np.concatenate([each.places for each in found])
    values = np.concatenate([each.scores for each in found])
    order = np.lexsort((places, -values))[:k]
    return Nearest(places[order], values[order])


def products(query: Float32Array, vectors: NDArray[np.float16]) -> Float32Array:
    """Return the inner products of a (D,) query with (N, D) vectors, as exact as float32 sums."""
    dim = vectors.shape[1]
    rows = max(1, _BLOCK_BYTES // (4 * dim))
    scaled = _scaled(query)
    bits = np.empty((min(rows, len(vectors)), dim), np.int32)
    found = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), rows):
        block = _widened(vectors[start : start + rows], bits)
        np.dot(block, scaled, out=found[start : start + rows])
    return found


def scores(query: Float32Array, vectors: NDArray[np.float16]) -> Float32Array:
    """Return the cosine similarity of a (D,) query with each of the (N, D) vectors.

    Each is summed in float64 by itself, so it does not depend on its neighbours.
    """
    products = vectors.astype(np.float64)
    products *= query.astype(np.float64)
    similarity: Float32Array = products.sum(axis=1).clip(-1, 1).astype(np.float32)
    return similarity


def select(
    query: Float32Array,
    vectors: NDArray[np.float16],
    places: NDArray[np.int64],
    k: int,
) -> Nearest:
    """Return the k best of the vectors at some places, ascending or not, by their exact scores."""
    values = scores(query, vectors[places])
    order = np.lexsort((places, -values))[:k]
    return Nearest(places[order], values[order])


def _scan(
    queries: Float32Array,
    vectors: NDArray[np.float16],
    k: int,
    places: NDArray[np.int64] | None,
    start: int,
    end: int,
) -> list[Nearest]:
    """Search positions start to end of `places`, or of the vectors."""
    dim = vectors.shape[1]
    rows = max(1, min(end - start, _BLOCK_BYTES // (4 * dim)))
    at_once = max(rows, min(end - start, _SCORES_AT_ONCE // len(queries)))
    scaled = _scaled(queries)
    bits = np.empty((rows, dim), np.int32)
    values = np.empty((at_once, len(queries)), np.float32)
    best: list[list[Nearest]] = [[] for _ in queries]
    for chunk in range(start, end, at_once):
        size = min(at_once, end - chunk)
        for block in range(chunk, chunk + size, rows):
            stop = min(block + rows, chunk + size)
            widened = _widened(_taken(vectors, places, block, stop), bits)
            into = values[block - chunk : stop - chunk]
            if len(queries) == 1:
                np.dot(widened, scaled[0], out=into[:, 0])
            else:
                np.dot(widened, scaled.T, out=into)
        for query, column, found in zip(queries, values[:size].T, best, strict=True):
            likely = _likely(column, k) + chunk
            likely = likely if places is None else places[likely]
            found.append(select(query, vectors, likely, k))
            if len(found) > 1:
                found[:] = [merge(found, k)]
    return [found[0] for found in best]


def _taken(
    vectors: NDArray[np.float16], places: NDArray[np.int64] | None, start: int, stop: int
) -> NDArray[np.float16]:
    if places is None:
        return vectors[start:stop]
    first, last = int(places[start]), int(places[stop - 1])
    if last - first == stop - 1 - start:  # none is left out between them: no copy
        return vectors[first : last + 1]
    return vectors[places[start:stop]]


def _scaled(queries: Float32Array) -> Float32Array:
    """Return queries that make up for the scale of `_widened` vectors.

    A product of fp16's bits, moved into fp32's places, is too small by it. numpy's own conversion
    takes five times as long.
    """
    return (queries.astype(np.float64) * _SCALE).astype(np.float32)


def _widened(vectors: NDArray[np.float16], bits: NDArray[np.int32]) -> Float32Array:
    """Return finite fp16 vectors as float32 divided by the scale; exact, in the given memory."""
    bits = bits[: len(vectors)]
    np.copyto(bits, vectors.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, _SIGN_AND_VALUE, out=bits)
    return bits.view(np.float32)


def _likely(values: Float32Array, k: int) -> NDArray[np.int64]:
    """Return the places of the k largest values, and of those that rounding may have kept out."""
    if len(values) <= k:
        return np.arange(len(values))
    least = np.partition(values, len(values) - k)[len(values) - k]
    return np.flatnonzero(values >= least - _ROUNDING)
