"""Int8 range of an activation, chosen from a histogram of its values.

Clipping the tails costs the outliers and gives the other values finer steps. Methods:

- percentile: clip values outside the central 99.99 %.
- mse: the range whose quantizer has the smallest mean squared error. The error is that of uint8
  (or symmetric int8) as `Range.affine` sets it up, taken exactly over the histogram, whose values
  count as spread evenly within a bin.
- entropy: the range whose quantized distribution is nearest to the original one: the smallest
  Kullback-Leibler divergence between the two. After S. Migacz, "8-bit inference with TensorRT",
  NVIDIA GTC 2017, which treats int8 with 2048 bins of |x| for 128 levels: 16 bins a level. Here the
  levels are those of the quantizer itself, on both sides of zero, so that uint8 is treated too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mmedge.converters.methods.configs import RangeMethod
from mmedge.converters.numerics.int8_rounding import Range
from mmedge.specs import Array

__all__ = ["BINS", "Histogram", "choose_range", "span_of", "squared_error"]

BINS = 8192
"""Enough that a cut to a hundredth of the extremes still finds some dozens of bins to choose by."""
_PERCENTILE = 99.99
_ENTROPY_BINS = 4096  # both sides of zero, for 256 levels
_EPSILON = 1e-4  # of one value
_SMALLEST_FACTOR = 1 / 256
_COARSE_STEPS = 16
_FINE_RATIOS = (0.84, 0.92, 0.96, 0.98, 0.99, 0.995)


@dataclass(frozen=True)
class Histogram:
    """Counts of values in equal bins.

    Attributes:
        counts: (B,) int64.
        low: Where the first bin begins.
        high: Where the last bin ends, above `low`.
    """

    counts: Array
    low: float
    high: float

    def edges(self) -> Array:
        """Return the (B + 1,) float64 ends of the bins."""
        return np.linspace(self.low, self.high, self.counts.size + 1)


def span_of(extreme: Range, *, symmetric: bool) -> tuple[float, float]:
    """Return the span of a histogram of values between the extremes.

    For a symmetric quantizer that is as far below zero as above.
    """
    if not symmetric:
        return extreme.low, extreme.high
    largest = max(abs(extreme.low), abs(extreme.high))
    return -largest, largest


def choose_range(
    histogram: Histogram, extreme: Range, method: RangeMethod, *, symmetric: bool = False
) -> Range:
    """Return the int8 range.

    Args:
        histogram: Counts over `span_of(extreme)`, an even number of bins.
        extreme: Smallest and largest value.
        method: See the module; "minmax" keeps everything.
        symmetric: For int8 with zero point 0 instead of uint8.

    Returns:
        A range within `extreme`.
    """
    if method == "minmax":
        return extreme
    if method == "percentile":
        return _central(histogram, extreme, symmetric=symmetric)

    def cost(quantizer: Range) -> float:
        if method == "mse":
            return squared_error(histogram, quantizer, symmetric=symmetric)
        return _divergence(merged, quantizer, symmetric=symmetric)

    merged = _without_zeros(_merge(histogram, _ENTROPY_BINS))
    return _search(cost, extreme, symmetric=symmetric)


def squared_error(histogram: Histogram, quantizer: Range, *, symmetric: bool = False) -> float:
    """Return the mean squared quantization error of a histogram.

    Args:
        histogram: Values, taken as spread evenly within each bin.
        quantizer: The quantizer's range.
        symmetric: For int8 with zero point 0 instead of uint8.
    """
    scale, first, last = _grid(quantizer, symmetric=symmetric)
    # The integral of the squared error from 0 to each edge; over one step it is scale^3 / 12.
    edges = histogram.edges()
    values = np.clip(np.rint(edges / scale), first, last)
    errors = edges - values * scale
    integral = values * (scale**3 / 12) + errors * errors * errors / 3
    width = (histogram.high - histogram.low) / histogram.counts.size
    return float(histogram.counts @ np.diff(integral) / (width * histogram.counts.sum()))


def _grid(quantizer: Range, *, symmetric: bool) -> tuple[float, int, int]:
    """Return the quantizer's scale, and its first and last multiple of it."""
    if symmetric:
        return float(np.float32(max(abs(quantizer.low), abs(quantizer.high)) / 127.0)), -128, 127
    scale, zero_point = quantizer.affine()
    return scale, -zero_point, 255 - zero_point


def _divergence(histogram: Histogram, quantizer: Range, *, symmetric: bool) -> float:
    """Return the Kullback-Leibler divergence of the quantized distribution from the original."""
    edges, counts = histogram.edges(), histogram.counts
    middles = (edges[:-1] + edges[1:]) / 2
    reach = max(abs(quantizer.low), abs(quantizer.high))
    low, high = (-reach, reach) if symmetric else (quantizer.low, quantizer.high)
    begin, end = np.searchsorted(middles, (low, high))
    inside = counts[begin:end].astype(np.float64)
    # Cut almost everything off, and the little that stays is described without any divergence.
    if inside.sum() * 2 < counts.sum():
        return np.inf
    # What is cut off comes out as the outermost levels, but was never there.
    original = inside.copy()
    original[0] += counts[:begin].sum()
    original[-1] += counts[end:].sum()
    scale, first, last = _grid(quantizer, symmetric=symmetric)
    levels = np.clip(np.rint(middles[begin:end] / scale), first, last)
    starts = np.flatnonzero(np.diff(levels, prepend=levels[0] - 1))
    filled = original > 0
    sizes = np.diff(starts, append=levels.size)
    mean = np.add.reduceat(inside, starts) / np.maximum(
        np.add.reduceat(filled, starts, dtype=int), 1
    )
    quantized = np.repeat(mean, sizes)[filled] / inside.sum()
    # A level that holds nothing but what was cut off would be infinitely far: Migacz's epsilon.
    quantized = np.maximum(quantized, _EPSILON / inside.sum())
    original = original[filled] / original.sum()
    return float(original @ np.log(original / quantized))


def _merge(histogram: Histogram, bins: int) -> Histogram:
    if histogram.counts.size <= bins:
        return histogram
    counts = histogram.counts.reshape(bins, -1).sum(axis=1)
    return Histogram(counts, histogram.low, histogram.high)


def _without_zeros(histogram: Histogram) -> Histogram:
    """Reduce the bin that holds zero to its neighbours.

    Zero is exact in every range, so the zeros of a ReLU do not matter. Left in, they
    alone would decide: their spike spread over one level is all divergence.
    """
    if not histogram.low <= 0 < histogram.high:
        return histogram
    counts = histogram.counts.copy()
    place = int(np.searchsorted(histogram.edges(), 0.0, side="right")) - 1
    neighbours = [counts[i] for i in (place - 1, place + 1) if 0 <= i < counts.size]
    counts[place] = min(counts[place], max(neighbours))
    return Histogram(counts, histogram.low, histogram.high)


def _central(histogram: Histogram, extreme: Range, *, symmetric: bool) -> Range:
    counts, edges = histogram.counts, histogram.edges()
    outside = counts.sum() * (1.0 - _PERCENTILE / 100.0)
    if symmetric:
        half = counts.size // 2
        reached = (counts[half:] + counts[half - 1 :: -1]).cumsum()
        last = int(np.searchsorted(reached, reached[-1] - outside, side="left"))
        return _within(extreme, -edges[half + last + 1], edges[half + last + 1])
    reached = counts.cumsum()
    first = int(np.searchsorted(reached, outside / 2, side="right"))
    last = int(np.searchsorted(reached, reached[-1] - outside / 2, side="left"))
    return _within(extreme, edges[first], edges[last + 1])


def _within(extreme: Range, low: float, high: float) -> Range:
    return Range(max(extreme.low, float(low)), min(extreme.high, float(high)))


def _search(cost: Callable[[Range], float], extreme: Range, *, symmetric: bool) -> Range:
    """Return the range of the smallest cost: a coarse search over both ends, then a fine one."""
    reach = max(abs(extreme.low), abs(extreme.high))

    def scaled(low_factor: float, high_factor: float) -> Range:
        if symmetric:
            return _within(extreme, -reach * high_factor, reach * high_factor)
        # An end on the other side of zero is no end of the quantizer's range, which holds zero.
        low = extreme.low * low_factor if extreme.low < 0 else extreme.low
        high = extreme.high * high_factor if extreme.high > 0 else extreme.high
        return Range(low, high)

    coarse = np.geomspace(1.0, _SMALLEST_FACTOR, _COARSE_STEPS).tolist()
    lows = coarse if extreme.low < 0 and not symmetric else [1.0]
    highs = coarse if extreme.high > 0 or symmetric else [1.0]
    # The first of equals, so that nothing is cut off without gain.
    costs = {(low, high): cost(scaled(low, high)) for low in lows for high in highs}
    best = min(costs, key=costs.__getitem__)
    smallest = costs[best]
    for ratio in _FINE_RATIOS:
        better = True
        while better:
            better = False
            for low, high in ((ratio, 1.0), (1 / ratio, 1.0), (1.0, ratio), (1.0, 1 / ratio)):
                trial = min(best[0] * low, 1.0), min(best[1] * high, 1.0)
                if trial in costs:
                    continue
                costs[trial] = cost(scaled(*trial))
                if costs[trial] < smallest:
                    best, smallest, better = trial, costs[trial], True
    return scaled(*best)
