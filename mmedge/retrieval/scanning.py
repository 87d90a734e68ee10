"""Inner products of one query with many fp16 vectors."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmedge.retrieval import exact
from mmedge.specs import Float32Array

__all__ = ["ScanQuery", "has_kernels"]


@functools.cache
def _kernels() -> Callable[..., Any] | None:
    """Return numkong's products of fp16 rows, or None where it is not installed."""
    try:
        module = importlib.import_module("numkong")
    except ImportError:
        return None
    products: Callable[..., Any] = module.cdist
    return products


def has_kernels() -> bool:
    """Whether vectors are scanned by numkong's kernels; numpy takes some four times as long."""
    return _kernels() is not None


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
        # 1.01 for lengths that fp16 rounds up, and as much again as fp32 sums may lose.
        self.error = 1.01 * float(np.linalg.norm(difference)) + 1e-6

    def products(self, vectors: NDArray[np.float16]) -> Float32Array:
        """Return the (N,) inner products with (N, D) contiguous vectors, within `error`."""
        kernels = _kernels()
        if kernels is None or not len(vectors):
            return exact.products(self.vector, vectors)
        found = np.empty(len(vectors), np.float32)
        found[:] = np.asarray(kernels(self.rounded, vectors, "dot"))[0]
        return found

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
