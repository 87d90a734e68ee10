"""Ranges of activations over calibration data, in memory that does not grow with the data."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from mmedge.converters.passes.int8 import Range
from mmedge.errors import CalibrationError, QuantizationError
from mmedge.files import storage_errors
from mmedge.runtimes.session import Session, open_session
from mmedge.specs import Array

__all__ = ["Feeds", "collect_ranges"]

Feeds: TypeAlias = Callable[[], Iterable[Mapping[str, Array]]]

_BINS = 2048
_PERCENTILE = 99.99


def collect_ranges(
    model: Path,
    tensors: Sequence[str],
    feeds: Feeds,
    *,
    method: Literal["minmax", "percentile"] = "minmax",
) -> dict[str, Range]:
    """Run a model over calibration data and return the range of each named tensor.

    `minmax` reads the data once and keeps two numbers a tensor, which the graph itself computes.
    `percentile` reads it a second time, counts into 2048 bins between the extremes, and cuts off
    what lies outside the central 99.99 %.

    Args:
        model: ONNX file in float32.
        tensors: Names of values in its main graph.
        feeds: Starts a stream of feeds; called once for each reading.
        method: See above.

    Raises:
        CalibrationError: If the stream is empty.
        QuantizationError: If an activation is NaN or infinite; the tensor is named.
    """
    ranges = _extremes(model, tensors, feeds)
    return ranges if method == "minmax" else _percentiles(model, ranges, feeds)


def _extremes(model: Path, tensors: Sequence[str], feeds: Feeds) -> dict[str, Range]:
    low = np.full(len(tensors), np.inf)
    high = np.full(len(tensors), -np.inf)
    with _probe(model, tensors, reduce=True) as session:
        for feed in feeds():
            results = session.run(feed)
            for index, name in enumerate(tensors):
                smallest, largest = results[_low(index)].item(), results[_high(index)].item()
                finite = np.isfinite([smallest, largest]).all()
                # The engine's extremes pass over NaN; a sum does not.
                if not finite or np.isnan(results[_sum(index)].item()):
                    raise QuantizationError(
                        f"Activation '{name}' is NaN or infinite on the calibration data. "
                        "Check the calibration data, or leave this role in float."
                    )
                low[index] = min(low[index], smallest)
                high[index] = max(high[index], largest)
    if np.isinf(low).any():
        raise CalibrationError("No calibration data: got 0 samples. Pass a folder with some.")
    return {name: Range(low[i].item(), high[i].item()) for i, name in enumerate(tensors)}


def _percentiles(model: Path, extremes: Mapping[str, Range], feeds: Feeds) -> dict[str, Range]:
    counts = {name: np.zeros(_BINS, np.int64) for name in extremes}
    with _probe(model, list(extremes), reduce=False) as session:
        for feed in feeds():
            results = session.run(feed)
            for index, (name, extreme) in enumerate(extremes.items()):
                if not _is_narrow(extreme):
                    span = (extreme.low, extreme.high)
                    counts[name] += np.histogram(results[_whole(index)], _BINS, span)[0]
    return {
        name: extreme if _is_narrow(extreme) else _central(counts[name], extreme)
        for name, extreme in extremes.items()
    }


def _is_narrow(extreme: Range) -> bool:
    """Tell whether a range is no wider than a few float32 steps for each bin: nothing to cut."""
    largest = max(abs(extreme.low), abs(extreme.high))
    step = max(float(np.spacing(np.float32(largest))), float(np.finfo(np.float32).tiny))
    return extreme.high - extreme.low < 4 * _BINS * step


def _central(counts: Array, extreme: Range) -> Range:
    tail = counts.sum() * (1.0 - _PERCENTILE / 100.0) / 2.0
    reached = counts.cumsum()
    first = int(np.searchsorted(reached, tail, side="right"))
    last = int(np.searchsorted(reached, reached[-1] - tail, side="left"))
    edges = np.linspace(extreme.low, extreme.high, _BINS + 1)
    return Range(float(edges[first]), float(edges[last + 1]))


def _low(index: int) -> str:
    return f"mmedge_low_{index}"


def _high(index: int) -> str:
    return f"mmedge_high_{index}"


def _sum(index: int) -> str:
    return f"mmedge_sum_{index}"


def _whole(index: int) -> str:
    return f"mmedge_whole_{index}"


@contextmanager
def _probe(model: Path, tensors: Sequence[str], *, reduce: bool) -> Iterator[Session]:
    """Open a session of `model` whose outputs are the named tensors, or their extremes."""
    graph = ir.load(model)
    _set_outputs(graph, tensors, reduce=reduce)
    # Beside the model, whose external data the probe reads.
    with (
        storage_errors(model.parent),
        tempfile.NamedTemporaryFile(dir=model.parent, prefix=".probe-", suffix=".onnx") as file,
    ):
        ir.save(graph, file.name)
        with open_session(Path(file.name)) as session:
            yield session


def _set_outputs(model: ir.Model, tensors: Sequence[str], *, reduce: bool) -> None:
    graph = model.graph
    values = {value.name: value for value in graph.inputs}
    values.update({value.name: value for node in graph for value in node.outputs})
    outputs: list[ir.Value] = []
    for index, name in enumerate(tensors):
        wanted = [(_whole(index), "Identity")]
        if reduce:
            wanted = [
                (_low(index), "ReduceMin"),
                (_high(index), "ReduceMax"),
                (_sum(index), "ReduceSum"),
            ]
        for output, op_type in wanted:
            attributes = {"keepdims": 0} if reduce else {}
            node = ir.node(op_type, [values[name]], attributes, name=output)
            value = node.outputs[0]
            value.name = output
            value.type = ir.TensorType(ir.DataType.FLOAT)
            value.shape = ir.Shape([]) if reduce else values[name].shape
            graph.append(node)
            outputs.append(value)
    graph.outputs.clear()
    graph.outputs.extend(outputs)
