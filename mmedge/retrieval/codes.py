"""One bit for each coordinate of a vector, from which inner products are estimated.

RaBitQ (Gao, Long: Quantizing High-Dimensional Vectors with a Theoretical Error Bound for
Approximate Nearest Neighbor Search, 2024): a vector less the centroid of its list is rotated at
random, and the signs of its coordinates are kept. A query is rounded to 4 bits a coordinate, so
that its product with the signs is a count of bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmedge.specs import Float32Array

__all__ = ["MAX_FACTOR", "QUERY_BITS", "Rotation", "encode", "rounded_query"]

QUERY_BITS = 4
MAX_FACTOR = 1000.0
"""Largest number that codes are made with: all but that of a tiny centroid are about 1 or less."""

_WIDTH = 64  # rotated vectors have a multiple of it as length


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """The Kronecker product of two random orthogonal matrices: it mixes all coordinates.

    Attributes:
        left: (64, 64) float32.
        right: (P / 64, P / 64) float32; P is the length of rotated vectors.
    """

    left: Float32Array
    right: Float32Array

    @classmethod
    def random(cls, dim: int) -> Rotation:
        """Return the rotation of vectors of length D, always the same on one machine."""
        random = np.random.default_rng(0)
        left, right = (
            np.linalg.qr(random.standard_normal((size, size)))[0].astype(np.float32)
            for size in (_WIDTH, -(-dim // _WIDTH))
        )
        return cls(left, right)

    @property
    def length(self) -> int:
        """P, the length of rotated vectors: D, rounded up to a multiple of 64."""
        return _WIDTH * len(self.right)

    def apply(self, vectors: Float32Array) -> Float32Array:
        """Rotate (N, D) vectors; returns (N, P)."""
        missing = self.length - vectors.shape[1]
        if missing:
            vectors = np.pad(vectors, ((0, 0), (0, missing)))
        rotated: Float32Array = self.right @ (vectors.reshape(len(vectors), -1, _WIDTH) @ self.left)
        return rotated.reshape(len(vectors), -1)


def encode(residuals: Float32Array, centroids: Float32Array) -> NDArray[np.uint8]:
    """Return the codes of vectors, and what makes estimates of them.

    The product of a query q and the vector is estimated as f0 <q, s> + f1 <q, c>, where s are the
    signs as -1 and 1. f0 makes the estimate of <q, residual> unbiased; f1 replaces the estimate
    along c by what it is, so that only the part of q that is orthogonal to c adds an error. Both
    are MAX_FACTOR at most, which only a centroid near zero reaches: <q, c> is as small.

    Args:
        residuals: (N, P) rotated vectors, less their centroid.
        centroids: (N, P) that centroid c, rotated.

    Returns:
        (N, P / 8 + 8) uint8, of each vector the signs and float32 f0, f1.
    """
    positive = residuals > 0
    sums = np.abs(residuals).sum(axis=1)
    squares = np.einsum("ij,ij->i", residuals, residuals)
    scales = squares / np.maximum(sums, np.finfo(np.float32).tiny)
    along = np.einsum("ij,ij->i", centroids, residuals)
    signed = 2 * np.einsum("ij,ij->i", centroids, positive) - centroids.sum(axis=1)
    lengths = np.einsum("ij,ij->i", centroids, centroids)
    shifts = np.divide(
        along - scales * signed, lengths, where=lengths > 1e-6, out=np.zeros_like(sums)
    )
    factors = np.stack([scales, 1 + shifts], axis=1).clip(-MAX_FACTOR, MAX_FACTOR)
    return np.concatenate([np.packbits(positive, axis=1), factors.view(np.uint8)], axis=1)


def rounded_query(rotated: Float32Array) -> tuple[NDArray[np.uint8], float]:
    """Round a rotated (P,) query to 4 bits a coordinate.

    Returns:
        (4, P / 8) uint8, the lowest bits first; and the step between two values. The query's
        product with signs is step * (7.5 P - sum of 2^j differing bits in plane j).
    """
    most = (1 << QUERY_BITS) - 1
    step = max(2 * float(np.abs(rotated).max()) / most, float(np.finfo(np.float32).tiny))
    values = np.round(rotated / step + most / 2).clip(0, most).astype(np.uint8)
    planes = values >> np.arange(QUERY_BITS, dtype=np.uint8)[:, None] & 1
    return np.packbits(planes, axis=1), step
