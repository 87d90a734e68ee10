"""Differences between outputs and references."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmedge.errors import ShapeError
from mmedge.specs import Array, Compare

__all__ = ["Difference", "cosines", "difference"]


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """Difference of one output from its reference.

    Attributes:
        cosines: (R,) float64, one for each row; NaN where a row is not finite.
        max_abs_error: Largest difference of a value; NaN where one is not finite.
        scale: Largest absolute value of the reference, at least 1.
        agreements: (R,) bool, whether a row's largest value stands at the same place; None unless
            compared by tokens.
    """

    cosines: Array
    max_abs_error: float
    scale: float
    agreements: Array | None = None


def difference(expected: Array, got: Array, compare: Compare) -> Difference:
    """Compare an output with its reference.

    Args:
        expected: The reference, of any shape.
        got: The output.
        compare: Rows are vectors along the last axis for ROWS and TOKENS, and whole samples along
            the first axis otherwise.

    Raises:
        ShapeError: If the shapes differ.
    """
    if got.shape != expected.shape:
        raise ShapeError(f"Outputs differ in shape: got {got.shape}, expected {expected.shape}.")
    if compare in (Compare.ROWS, Compare.TOKENS):
        a, b = (array.reshape(-1, array.shape[-1]) for array in (expected, got))
    else:
        a, b = (
            array.reshape(max(len(array) if array.ndim else 1, 1), -1) for array in (expected, got)
        )
    left, right = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(all="ignore"):  # non-finite values become NaN without a warning
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        equal = (left == right).all(axis=1)  # two zero rows agree, although they have no cosine
        values = np.where(equal, 1.0, np.clip((left * right).sum(axis=1) / norms, -1, 1))
        errors = np.abs(left - right)
    agreements = (a.argmax(axis=1) == b.argmax(axis=1)) if compare is Compare.TOKENS else None
    finite = np.abs(left[np.isfinite(left)])
    return Difference(
        cosines=values,
        max_abs_error=float(errors.max(initial=0.0)),
        scale=max(1.0, float(finite.max(initial=0.0))),
        agreements=agreements,
    )


def cosines(expected: Array, got: Array) -> Array:
    """Return the cosine of each row with its reference: (N,) float64.

    A zero or non-finite row agrees with nothing: its cosine is -1.

    Args:
        expected: (N, D).
        got: (N, D).

    Raises:
        ShapeError: If the shapes differ.
    """
    if expected.ndim != 2:
        raise ShapeError(f"Embeddings: got {got.shape} against {expected.shape}, expected (N, D).")
    found = difference(expected, got, Compare.ROWS).cosines
    zero = ~np.asarray(expected).any(axis=1) & ~np.asarray(got).any(axis=1)
    return np.where(np.isfinite(found) & ~zero, found, -1.0)
