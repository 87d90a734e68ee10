"""Time decay: of two items as similar to the query, the newer one comes first."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mmedge.errors import InputError

__all__ = ["checked_half_life", "decayed", "oldest_that_counts"]

Float64Array = NDArray[np.float64]


def checked_half_life(half_life_s: float) -> float:
    """Return a half-life in seconds.

    Raises:
        InputError: If it is not a positive number.
    """
    if (
        isinstance(half_life_s, bool)
        or not isinstance(half_life_s, int | float)
        or not (0 < half_life_s < math.inf)
    ):
        raise InputError(
            f"half_life_s: got {half_life_s!r}, expected a positive number of seconds."
        )
    return float(half_life_s)


def decayed(
    scores: Float64Array, times: Float64Array, now: float, half_life_s: float
) -> tuple[Float64Array, NDArray[np.int64]]:
    """Return scores that lose half of their worth in each half-life, and their order.

    A score s at an age of h half-lives becomes s * 2**-h; one below 0, which half of it would
    raise, becomes s * (2 - 2**-h). An item of the future has age 0, and one without a time counts
    as older than all others.

    Args:
        scores: (N,).
        times: (N,) seconds since 1970, NaN where an item has none.
        now: Seconds since 1970 at which an item's age is 0.
        half_life_s: Half-life in seconds.

    Returns:
        (N,) scores and (N,) int64 the order, best first, which is right also where scores have
        become too small for a float.
    """
    ages = np.where(np.isnan(times), np.inf, np.maximum(now - times, 0) / half_life_s)
    left = np.exp2(-ages)
    lowered = np.where(scores > 0, scores * left, scores * (2 - left))
    with np.errstate(divide="ignore"):
        logarithms = np.where(scores > 0, np.log2(np.where(scores > 0, scores, 1)) - ages, -np.inf)
    order = np.lexsort((-scores, -lowered, -logarithms, scores <= 0))
    return lowered, order


def oldest_that_counts(
    best_left: float, score: float, time: float, now: float, half_life_s: float
) -> float | None:
    """Return the time before which no item can come before a given one.

    Args:
        best_left: Largest score that the others may have before decay.
        score: The given item's before decay.
        time: The given item's, NaN if it has none.
        now: As for decayed.
        half_life_s: As for decayed.

    Returns:
        Seconds since 1970, infinite if no item could; None if items of any age could.
    """
    if score <= 0 or math.isnan(time):
        return None
    if best_left <= 0:
        return math.inf
    age = max(now - time, 0) / half_life_s
    return now - half_life_s * (age + math.log2(best_left / score))
