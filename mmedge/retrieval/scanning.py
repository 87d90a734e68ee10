"""Inner products of one query with many vectors, and differing bits of its code with theirs."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmedge.retrieval import exact
from mmedge.specs import Float32Array

__all__ = ["ByteRows", "ScanQuery", "byte_products", "differing_bits", "has_kernels"]

_AT_ONCE = 1 << 16  # vectors whose products are in memory, and which a filter may have copied
_CALL_BYTES = 1 << 20  # of vectors in a call: at 8 MiB numkong 7.8 takes ten times as long a vector
_ONES = np.array([value.bit_count() for value in range(256)], np.uint8)


@functools.cache
def _kernels() -> Any:  # noqa: ANN401, an extra that need not be there
    """Return numkong, or None where it is not installed."""
    try:
        return importlib.import_module("numkong")
    except ImportError:
        return None


def has_kernels() -> bool:
    """Whether vectors are scanned by numkong's kernels; numpy takes several times as long."""
    return _kernels() is not None


class ByteRows:
    """Rows of int8, ready for inner products.

    Args:
        rows: (C, D) int8.
    """

    def __init__(self, rows: NDArray[np.int8]) -> None:
        kernels = _kernels()
        self._packed = None if kernels is None else kernels.dots_pack(rows)
        self._rows = rows.T.astype(np.float32) if kernels is None else None

    def products(self, vectors: NDArray[np.int8]) -> NDArray[np.int32]:
        """Return the (N, C) inner products with (N, D) vectors, exact below 2^24."""
        if self._rows is not None:
            return (vectors.astype(np.float32) @ self._rows).astype(np.int32)
        return np.asarray(_kernels().dots_packed(vectors, self._packed))


def byte_products(query: NDArray[np.int8], vectors: NDArray[np.int8]) -> Float32Array:
    """Return the (N,) inner products of a (D,) query with (N, D) vectors, exact below 2^24."""
    found = np.empty((1, len(vectors)), np.int32)
    kernels, rows = _kernels(), max(1, _CALL_BYTES // len(query))
    for first in range(0, len(vectors), rows):
        some = slice(first, first + rows)
        if kernels is None:
            found[0, some] = vectors[some].astype(np.float32) @ query.astype(np.float32)
        else:
            kernels.cdist(query[None], vectors[some], "dot", out=found[:, some])
    products: Float32Array = found[0].astype(np.float32)
    return products


def differing_bits(planes: NDArray[np.uint8], codes: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Return in how many bits (B, W) packed planes differ from (N, W) packed codes: (B, N)."""
    found = np.empty((len(planes), len(codes)), np.uint32)
    kernels, rows = _kernels(), max(1, _CALL_BYTES // planes.shape[1])
    for first in range(0, len(codes), rows):
        some = slice(first, first + rows)
        if kernels is not None:
            kernels.cdist(planes, codes[some], "hamming", dtype="uint1", out=found[:, some])
            continue
        for plane, counts in zip(planes, found[:, some], strict=True):
            _ONES[codes[some] ^ plane].sum(axis=1, dtype=np.uint32, out=counts)
    return found


class ScanQuery:
    """One query, ready to be compared with fp16 vectors.

    Attributes:
        vector: (D,) float32.
        rounded: (1, D) float16, the same.
        error: Largest difference between a product of `rounded` and one of `vector`, for vectors of
            length 1.
    """

    __slots__ = ("error", "rounded", "vector")

    def __init__(self, vector: Float32Array) -> None:
        self.vector = vector
        self.rounded = vector.astype(np.float16)[None]
        difference = vector - self.rounded[0].astype(np.float32)
        # 1.01 for lengths that fp16 rounds up, and more than fp32 sums lose.
        self.error = 1.01 * float(np.linalg.norm(difference)) + 5e-6

    def products(self, *blocks: NDArray[np.float16]) -> Float32Array:
        """Return the (N,) inner products with blocks of vectors, within `error`."""
        found: Float32Array = np.empty((1, sum(map(len, blocks))), np.float32)
        kernels, start = _kernels(), 0
        rows = max(1, _CALL_BYTES // self.rounded.nbytes)
        for block in blocks:
            into = found[:, start : start + len(block)]
            start += len(block)
            if kernels is None:
                into[0] = exact.products(self.vector, block)
                continue
            for first in range(0, len(block), rows):
                some = slice(first, first + rows)
                kernels.cdist(self.rounded, block[some], "dot", out=into[:, some])
        products: Float32Array = found[0]
        return products

    def nearest(
        self,
        vectors: NDArray[np.float16],
        places: NDArray[np.int64],
        products: Float32Array,
        n: int,
    ) -> exact.Nearest:
        """Return the n best of the vectors at some places, by exact scores.

        Args:
            vectors: (N, D), L2-normalised.
            places: (K,) positions in the vectors.
            products: (K,) of these vectors, from `products`.
            n: Vectors, at most.
        """
        if len(products) > n:
            least = np.partition(products, len(products) - n)[len(products) - n]
            # What lies below by more than twice the error cannot be among the best.
            places = places[products >= least - 2 * self.error]
        return exact.select(self.vector, vectors, places, n)

    def scan(
        self, vectors: NDArray[np.float16], n: int, places: NDArray[np.int64] | None = None
    ) -> exact.Nearest:
        """Return the n best of all vectors, in bounded memory.

        Scores depend on the query and the vector alone: a copy of a vector has its score, wherever
        it is stored.

        Args:
            vectors: (N, D), finite and L2-normalised; may be mapped.
            n: Vectors, at most; at least 1.
            places: (K,) positions that are searched, ascending and distinct; None for all.
        """
        best = exact.Nearest(np.empty(0, np.int64), np.empty(0, np.float32))
        for start in range(0, len(vectors) if places is None else len(places), _AT_ONCE):
            if places is None:
                block = vectors[start : start + _AT_ONCE]
                here = np.arange(start, start + len(block))
            else:
                here = places[start : start + _AT_ONCE]
                block = _taken(vectors, here)
            found = self.nearest(vectors, here, self.products(block), n)
            best = exact.merge([best, found], n)
        return best


def _taken(vectors: NDArray[np.float16], places: NDArray[np.int64]) -> NDArray[np.float16]:
    first, last = int(places[0]), int(places[-1])
    if last - first == len(places) - 1:  # none is left out between them: no copy
        return vectors[first : last + 1]
    return vectors[places]
