"""Percentiles and intervals that a sample of latencies supports.

**The rule.** A percentile appears only where at least five samples are expected beyond it,
n * (1 - p) >= 5: p50 needs 10 runs, p90 50, p95 100, p99 500. With five expected beyond it, the
chance that no sample at all lies beyond the true percentile is below 1 % (p**n, about exp(-5)), so
the largest samples really do bound it, and no single outlier decides the figure.

Every figure comes with its 95 % interval from order statistics, which assumes nothing about the
distribution's form: the number of samples below the true percentile is binomial(n, p), so the
ranks that enclose it with 95 % follow from the binomial distribution alone (David and Nagaraja,
Order Statistics, 3rd ed., section 7.1). It does assume that runs are independent; on a machine
whose load drifts they are not, and the noise warnings say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmedge.errors import ProfileError
from mmedge.profiling.result import Latency, Percentile, Ratio

__all__ = [
    "PERCENTILES",
    "SAMPLES_BEYOND",
    "median_ratio",
    "quantile_interval",
    "required_samples",
    "summarize",
]

PERCENTILES = (50, 90, 95, 99)
SAMPLES_BEYOND = 5
_CONFIDENCE = 0.95
_CURVE = np.linspace(0.0, 1.0, 41)


def required_samples(percent: int) -> int:
    """Return the minimum number of runs for a percentile.

    Args:
        percent: 0 < percent < 100.
    """
    beyond = min(percent, 100 - percent)
    return math.ceil(SAMPLES_BEYOND * 100 / beyond)


def quantile_interval(ordered: Sequence[float] | NDArray[Any], p: float) -> tuple[float, float]:
    """Return the distribution-free 95 % interval of a quantile.

    Args:
        ordered: The sample in ascending order.
        p: The quantile, 0 < p < 1.

    Returns:
        Two members of the sample between which the true quantile lies with at least 95 %.

    Raises:
        ProfileError: If the sample is too small to have such an interval.
    """
    n = len(ordered)
    tail = (1.0 - _CONFIDENCE) / 2
    below = _binomial_cumulative(n, p)  # below[k] = P(at most k samples lie under the quantile)
    # x_(i), counting from one, lies above the quantile when at most i - 1 samples lie under it.
    low = int(np.searchsorted(below, tail, side="right"))
    high = int(np.searchsorted(below, 1.0 - tail, side="left")) + 1
    if low < 1 or high > n:
        raise ProfileError(
            f"A sample of {n} has no 95 % interval for the quantile {p:g}. Measure more runs."
        )
    return float(ordered[low - 1]), float(ordered[high - 1])


def _binomial_cumulative(n: int, p: float) -> NDArray[np.float64]:
    """Return P(X <= k) for k = 0..n, X binomial(n, p), in logarithms to avoid overflow."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(n + 1)
    log_choose = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
    mass = np.exp(log_choose + k * math.log(p) + (n - k) * math.log1p(-p))
    cumulative: NDArray[np.float64] = np.minimum(np.cumsum(mass), 1.0)
    return cumulative


def summarize(wall_ns: Sequence[int], cpu_ns: Sequence[int]) -> Latency:
    """Summarize the runs of one cell.

    Args:
        wall_ns: Wall-clock time of each run.
        cpu_ns: CPU time of the process over each run, all threads together.

    Returns:
        Percentiles that the sample supports, each with its interval, and the rest.

    Raises:
        ProfileError: If there is no run.
    """
    if not wall_ns:
        raise ProfileError("Nothing was measured: got 0 runs, expected at least 1.")
    # Rounded to the clock's resolution, so that the document has no meaningless digits.
    ordered = np.round(np.sort(np.asarray(wall_ns, dtype=np.float64)) / 1e6, 6)
    n = len(ordered)
    percentiles: dict[str, Percentile] = {}
    for percent in PERCENTILES:
        if n >= required_samples(percent):
            low, high = quantile_interval(ordered, percent / 100)
            value = round(float(np.quantile(ordered, percent / 100)), 6)
            percentiles[f"p{percent}"] = Percentile(value_ms=value, low_ms=low, high_ms=high)
    quarter, middle, three_quarters = (float(q) for q in np.quantile(ordered, (0.25, 0.5, 0.75)))
    return Latency(
        n=n,
        mean_ms=round(float(ordered.mean()), 6),
        min_ms=float(ordered[0]),
        max_ms=float(ordered[-1]),
        percentiles=percentiles,
        cpu_ms=round(float(np.mean(np.asarray(cpu_ns, dtype=np.float64))) / 1e6, 6),
        relative_iqr=round((three_quarters - quarter) / middle, 4) if middle else 0.0,
        curve_ms=tuple(round(float(x), 6) for x in np.quantile(ordered, _CURVE)),
    )


def median_ratio(ours_ns: Sequence[int], theirs_ns: Sequence[int]) -> Ratio:
    """Return the ratio of two latencies measured in pairs.

    The ratio is taken within each pair, whose two runs lie next to one another in time, so that
    a drift of the machine cancels; the median over the pairs has the order-statistic interval.

    Args:
        ours_ns: One wall-clock time a pair.
        theirs_ns: The other of each pair.

    Returns:
        ours / theirs: below 1 where ours is faster.

    Raises:
        ProfileError: If there are fewer pairs than a median needs.
    """
    pairs, needed = len(ours_ns), required_samples(50)
    if pairs < needed:
        raise ProfileError(
            f"A ratio needs {needed} interleaved pairs: got {pairs}. Raise --min-runs."
        )
    ratios = np.sort(np.asarray(ours_ns, dtype=np.float64) / np.asarray(theirs_ns))
    low, high = quantile_interval(ratios, 0.5)
    return Ratio(pairs=pairs, median=float(np.median(ratios)), low=low, high=high)
