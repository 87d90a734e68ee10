"""Inner products of one query with many fp16 vectors."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmedge.specs import Float32Array

__all__ = ["ScanQuery", "has_kernels"]

_BLOCK_BYTES = 1 << 20  # of fp32 copies, so that they stay in the processor's cache


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
    """Whether vectors are scanned by numkong's kernels; numpy does it about ten times slower."""
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
        found = np.empty(len(vectors), np.float32)
        if len(vectors) and (kernels := _kernels()) is not None:
            found[:] = np.asarray(kernels(self.rounded, vectors, "dot"))[0]
            return found
        step = max(1, _BLOCK_BYTES // (4 * max(1, vectors.shape[1])))
        for start in range(0, len(vectors), step):
            block = vectors[start : start + step]
            found[start : start + step] = block.astype(np.float32) @ self.vector
        return found
