"""Activation statistics over calibration data, in constant memory.

The engine computes them where the activations are; what comes out is combined here in float64. A
statistic therefore depends neither on how the data is cut into batches nor on its order, but for
the rounding of the engine's own sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from mmedge.converters.graphs.probe import ProbeBuilder, open_probe
from mmedge.converters.methods.configs import RangeMethod
from mmedge.converters.numerics.int8_rounding import Range
from mmedge.converters.statistics.measures import (
    measure_channels,
    measure_extremes,
    measure_histogram,
    measure_moment,
    measure_shape,
)
from mmedge.converters.statistics.ranges import BINS, Histogram, choose_range, span_of
from mmedge.errors import CalibrationError, QuantizationError
from mmedge.specs import Array, Float32Array

__all__ = [
    "ChannelStatistics",
    "Feeds",
    "collect_channels",
    "collect_moments",
    "collect_ranges",
    "cut_ranges",
]

Feeds: TypeAlias = Callable[[], Iterable[Mapping[str, Array]]]

_MOMENTS_BUDGET_BYTES = 1 << 29
# Of one element of a moment matrix: the engine's output, its float64 copy, the running sum.
_MOMENT_BYTES = 4 + 8 + 8


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Statistics of each channel of a tensor: its last axis, over all other axes.

    Attributes:
        low: (C,) smallest value of each channel.
        high: (C,) largest value of each channel.
        mean: (C,) mean of each channel.
        rows: How many values of a channel were seen.
    """

    low: Float32Array
    high: Float32Array
    mean: Float32Array
    rows: int


def collect_ranges(
    model: Path,
    tensors: Sequence[str],
    feeds: Feeds,
    *,
    method: RangeMethod = "minmax",
    symmetric: bool = False,
) -> dict[str, Range]:
    """Run a model over calibration data and return the range of each named tensor.

    `minmax` reads the data once and keeps two numbers a tensor. The others read it a second time,
    count into a histogram between the extremes, and cut tails off as in ranges.py.

    Args:
        model: ONNX file in float32.
        tensors: Names of values in its main graph.
        feeds: Starts a stream of feeds; called once for each reading.
        method: How a range is chosen.
        symmetric: For int8 with zero point 0 instead of uint8: what is cut off, and the error that
            decides it, are those of [-t, t]. A range still never leaves the extremes.

    Raises:
        CalibrationError: If the stream is empty.
        QuantizationError: If an activation is NaN or infinite (the tensor is named), or there is no
            such tensor.
    """
    if not tensors:
        return {}  # an engine rejects a graph without outputs
    extremes = _extremes(model, tensors, feeds)
    return cut_ranges(model, extremes, feeds, method=method, symmetric=symmetric)


def cut_ranges(
    model: Path,
    extremes: Mapping[str, Range],
    feeds: Feeds,
    *,
    method: RangeMethod,
    symmetric: bool = False,
) -> dict[str, Range]:
    """Read the data once more and cut the tails of known extremes off; see collect_ranges.

    Args:
        model: ONNX file in float32.
        extremes: Smallest and largest value of each tensor, by name.
        feeds: Starts the stream of feeds; `minmax` does not.
        method: How a range is chosen.
        symmetric: See collect_ranges.

    Raises:
        QuantizationError: If there is no such tensor.
    """
    if method == "minmax":
        return dict(extremes)
    # Where all values are the same but for rounding, there are no tails to cut off.
    wide = {name: extreme for name, extreme in extremes.items() if not _is_narrow(extreme)}
    histograms = _count(model, wide, feeds, symmetric=symmetric) if wide else {}
    return {
        name: choose_range(histograms[name], extreme, method, symmetric=symmetric)
        if name in histograms
        else extreme
        for name, extreme in extremes.items()
    }


def collect_channels(
    model: Path, tensors: Sequence[str], feeds: Feeds
) -> dict[str, ChannelStatistics]:
    """Run a model over calibration data and return low, high and mean of each channel.

    The data is read once.

    Args:
        model: ONNX file in float32.
        tensors: Names of values in its main graph; the last axis of each is its channels.
        feeds: Starts a stream of feeds.

    Raises:
        CalibrationError: If the stream is empty.
        QuantizationError: If an activation is NaN or infinite, its last axis changes in size (the
            tensor is named), or there is no such tensor.
    """
    if not tensors:
        return {}
    lows: dict[str, Array] = {}
    highs: dict[str, Array] = {}
    sums: dict[str, Array] = {}
    rows = dict.fromkeys(tensors, 0)
    with open_probe(model, tensors, measure_channels) as probe:
        for feed in feeds():
            for name, found in probe.run(feed).items():
                _require_finite(name, *(found[what] for what in ("low", "high", "mean")))
                _require_same_channels(name, lows.get(name), found["low"])
                count = int(found["shape"][0])
                total = found["mean"].astype(np.float64) * count
                if rows[name]:
                    lows[name] = np.minimum(lows[name], found["low"])
                    highs[name] = np.maximum(highs[name], found["high"])
                    sums[name] += total
                else:
                    lows[name], highs[name], sums[name] = found["low"], found["high"], total
                rows[name] += count
    if not all(rows.values()):
        raise _no_data()
    return {
        name: ChannelStatistics(
            lows[name], highs[name], (sums[name] / rows[name]).astype(np.float32), rows[name]
        )
        for name in rows
    }


def collect_moments(
    model: Path,
    tensors: Sequence[str],
    feeds: Feeds,
    *,
    budget_bytes: int | None = None,
) -> dict[str, Float32Array]:
    """Run a model over calibration data and return the second moment of each tensor's channels.

    A tensor X of shape (..., C) counts as a matrix of rows; its moment is X^T X / rows, not
    centred. Products are the engine's in float32, one for each batch; they are added in float64.

    Args:
        model: ONNX file in float32.
        tensors: Names of values in its main graph.
        feeds: Starts a stream of feeds; called once for each group of tensors, whose sums fit the
            budget, and once more for its first feed.
        budget_bytes: What the sums of one group may take beside the results. A tensor that alone
            takes more is a group of its own. None takes as much as the results, 512 MiB at least:
            each group costs a reading.

    Returns:
        (C, C) for each name. All of them together may be large: ask for some tensors at a time.

    Raises:
        CalibrationError: If the stream is empty.
        QuantizationError: If an activation is NaN or infinite, its last axis changes in size (the
            tensor is named), or there is no such tensor.
    """
    if not tensors:
        return {}
    moments: dict[str, Float32Array] = {}
    channels = _channel_counts(model, tensors, feeds)
    if budget_bytes is None:
        results_bytes = sum(4 * count * count for count in channels.values())
        budget_bytes = max(_MOMENTS_BUDGET_BYTES, results_bytes)
    for group in _groups(channels, budget_bytes):
        moments.update(_group_moments(model, group, feeds))
    return {name: moments[name] for name in dict.fromkeys(tensors)}


def _extremes(model: Path, tensors: Sequence[str], feeds: Feeds) -> dict[str, Range]:
    lows = dict.fromkeys(tensors, np.inf)
    highs = dict.fromkeys(tensors, -np.inf)
    with open_probe(model, tensors, measure_extremes) as probe:
        for feed in feeds():
            for name, found in probe.run(feed).items():
                _require_finite(name, *found.values())
                lows[name] = min(lows[name], found["low"].item())
                highs[name] = max(highs[name], found["high"].item())
    if np.isinf(list(lows.values())).any():
        raise _no_data()
    return {name: Range(lows[name], highs[name]) for name in lows}


def _count(
    model: Path, extremes: Mapping[str, Range], feeds: Feeds, *, symmetric: bool
) -> dict[str, Histogram]:
    spans = {name: span_of(extreme, symmetric=symmetric) for name, extreme in extremes.items()}
    counts = {name: np.zeros(BINS, np.int64) for name in extremes}

    def measure(build: ProbeBuilder, name: str, value: ir.Value) -> dict[str, ir.Value]:
        return {"counts": measure_histogram(build, value, *spans[name])}

    with open_probe(model, list(extremes), measure) as probe:
        for feed in feeds():
            for name, found in probe.run(feed).items():
                counts[name] += found["counts"]
    return {name: Histogram(counts[name], *spans[name]) for name in extremes}


def _channel_counts(model: Path, tensors: Sequence[str], feeds: Feeds) -> dict[str, int]:
    """Return the number of channels of each tensor in the first feed."""
    with open_probe(model, tensors, measure_shape) as probe:
        for feed in islice(feeds(), 1):
            return {name: int(found["shape"][1]) for name, found in probe.run(feed).items()}
    raise _no_data()


def _groups(channels: Mapping[str, int], budget_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = []
    left = 0
    for name, count in channels.items():
        needed = count * count * _MOMENT_BYTES
        if not groups or needed > left:
            groups.append([])
            left = budget_bytes
        groups[-1].append(name)
        left -= needed
    return groups


def _group_moments(model: Path, group: Sequence[str], feeds: Feeds) -> dict[str, Float32Array]:
    sums: dict[str, Array] = {}
    rows = dict.fromkeys(group, 0)
    with open_probe(model, group, measure_moment) as probe:
        for feed in feeds():
            for name, found in probe.run(feed).items():
                # A value that is not finite makes its channel's own square so.
                _require_finite(name, found["product"].diagonal())
                _require_same_channels(name, sums.get(name), found["product"])
                rows[name] += int(found["shape"][0])
                if name in sums:
                    sums[name] += found["product"]
                else:
                    sums[name] = found["product"].astype(np.float64)
    if not all(rows.values()):
        raise _no_data()
    return {name: (sums.pop(name) / rows[name]).astype(np.float32) for name in group}


def _is_narrow(extreme: Range) -> bool:
    """Return whether a range is no wider than a few float32 steps for each bin: nothing to cut."""
    largest = max(abs(extreme.low), abs(extreme.high))
    step = max(float(np.spacing(np.float32(largest))), float(np.finfo(np.float32).tiny))
    return extreme.high - extreme.low < 4 * BINS * step


def _require_finite(name: str, *arrays: Array) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise QuantizationError(
            f"Activation '{name}' is NaN or infinite on the calibration data. "
            "Check the calibration data, or leave this role in float."
        )


def _require_same_channels(name: str, before: Array | None, now: Array) -> None:
    if before is not None and before.shape != now.shape:
        raise QuantizationError(
            f"Activation '{name}' has no channels: the size of its last axis is {before.shape[-1]} "
            f"in one batch and {now.shape[-1]} in another. Leave it out, or feed one size."
        )


def _no_data() -> CalibrationError:
    return CalibrationError("No calibration data: got 0 samples. Pass a folder with some.")
