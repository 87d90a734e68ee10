"""Exact scores of fp16 vectors, and the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmedge.specs import Float32Array

__all__ = ["Nearest", "merge", "products", "scores", "select"]

_BLOCK_BYTES = 512 << 10  # fp32 vectors of a block: small enough for the second cache
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


def _scaled(query: Float32Array) -> Float32Array:
    """Return a query that makes up for the scale of `_widened` vectors.

    A product of fp16's bits, moved into fp32's places, is too small by it. numpy's own conversion
    takes five times as long.
    """
    return (query.astype(np.float64) * _SCALE).astype(np.float32)


def _widened(vectors: NDArray[np.float16], bits: NDArray[np.int32]) -> Float32Array:
    """Return finite fp16 vectors as float32 divided by the scale; exact, in the given memory."""
    bits = bits[: len(vectors)]
    np.copyto(bits, vectors.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, _SIGN_AND_VALUE, out=bits)
    return bits.view(np.float32)
