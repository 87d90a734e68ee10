"""Distances between reference and candidate outputs."""

from __future__ import annotations

import numpy as np

from mmedge.errors import ShapeError
from mmedge.specs import Array, Float32Array

__all__ = ["cosines"]


def cosines(reference: Float32Array, candidate: Float32Array) -> Array:
    """Return the cosine of each row with its reference: (N,) float64.

    Raises:
        ShapeError: If the shapes differ.
    """
    if reference.shape != candidate.shape or reference.ndim != 2:
        raise ShapeError(
            f"Embeddings: got {candidate.shape} against {reference.shape}, expected equal (N, D)."
        )
    left, right = reference.astype(np.float64), candidate.astype(np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        values: Array = (left * right).sum(axis=1) / norms
    # A zero or NaN embedding agrees with nothing.
    return np.where(np.isfinite(values), values, -1.0)
