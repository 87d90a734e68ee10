"""Bootstrap intervals: per-sample values, resampled many times.

The percentile bootstrap (B. Efron and R. J. Tibshirani, An Introduction to the Bootstrap, 1993,
chapter 13): samples are drawn with replacement, the figure is computed for each draw, and the
interval spans the middle 95 % of the results. Only the values of samples are resampled; what
they were searched in stays as it is, since a draw that holds a sample twice would tie with itself.

The draws depend on the number of samples and the seed alone. Figures of the same samples therefore
see the same draws, and the interval of a difference is that of paired differences.

Where every sample has the same value the interval has no width, however few they are; and no draw
has a smaller minimum than the samples, so the interval of a minimum opens upwards only.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mmedge.bundle.quality import Figure
from mmedge.errors import ShapeError
from mmedge.specs import Array

__all__ = ["CONFIDENCE", "RESAMPLES", "mean_figure", "mean_figures", "percentile_figure"]

CONFIDENCE = 0.95
RESAMPLES = 2000

# Counts in memory at once: 8 MB.
_BLOCK = 1_000_000


def mean_figure(values: Array, seed: int = 0) -> Figure:
    """Return the mean over samples, with its interval.

    Args:
        values: (N,), N >= 1, finite.
        seed: Of the draws.

    Raises:
        ShapeError: If there are no values, or not one for each sample.
    """
    return mean_figures({"": values}, seed)[""]


def mean_figures(values: dict[str, Array], seed: int = 0) -> dict[str, Figure]:
    """Return several means over the same samples at the cost of one.

    Args:
        values: (N,) by name, all of one N >= 1, finite.
        seed: Of the draws.

    Raises:
        ShapeError: If there are no values, or not the same number of each.
    """
    if not values:
        return {}
    shapes = {np.shape(column) for column in values.values()}
    if len(shapes) != 1:
        raise ShapeError(f"Values of samples: got {sorted(shapes)}, expected one shape (N,).")
    _check(next(iter(shapes)))
    table = np.stack([np.asarray(column, np.float64) for column in values.values()], axis=1)
    count = len(table)
    drawn = np.concatenate([draws @ table / count for draws in _draws(count, seed)])
    low, high = np.percentile(drawn, _ends(), axis=0)
    means = table.mean(axis=0)
    return {
        # Rounding alone can carry the mean of equal values past the ends.
        name: Figure(value=mean, low=min(lowest, mean), high=max(highest, mean))
        for name, mean, lowest, highest in zip(
            values, means.tolist(), low.tolist(), high.tolist(), strict=True
        )
    }


def percentile_figure(values: Array, percent: float, seed: int = 0) -> Figure:
    """Return a percentile over samples, with its interval.

    Args:
        values: (N,), N >= 1, finite.
        percent: 0 for the minimum; interpolated linearly between samples.
        seed: Of the draws.

    Raises:
        ShapeError: If there are no values.
    """
    _check(np.shape(values))
    order = np.argsort(values)
    ranked = np.asarray(values, np.float64)[order]
    position = (len(ranked) - 1) * percent / 100
    below = int(position)
    drawn = []
    for draws in _draws(len(ranked), seed):
        reached = draws[:, order].cumsum(axis=1)
        lower = ranked[(reached > below).argmax(axis=1)]
        upper = ranked[(reached > min(below + 1, len(ranked) - 1)).argmax(axis=1)]
        drawn.append(lower + (upper - lower) * (position - below))
    value = float(np.percentile(ranked, percent))
    low, high = np.percentile(np.concatenate(drawn), _ends()).tolist()
    return Figure(value=value, low=min(low, value), high=max(high, value))


def _check(shape: tuple[int, ...]) -> None:
    if len(shape) != 1 or not shape[0]:
        raise ShapeError(
            f"Values of samples: got {shape}, expected (N,) of at least one. Evaluate on more."
        )


def _ends() -> tuple[float, float]:
    tail = 50 * (1 - CONFIDENCE)
    return tail, 100 - tail


def _draws(count: int, seed: int) -> Iterator[Array]:
    """Yield how often each sample is in each draw: blocks of (b, count), RESAMPLES rows in all."""
    rng = np.random.default_rng(seed)
    at_once = max(1, min(RESAMPLES, _BLOCK // count))
    for start in range(0, RESAMPLES, at_once):
        rows = min(at_once, RESAMPLES - start)
        chosen = rng.integers(count, size=(rows, count))
        chosen += count * np.arange(rows)[:, None]
        yield np.bincount(chosen.ravel(), minlength=rows * count).reshape(rows, count)
