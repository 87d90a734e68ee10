"""Peaks of a graph's values and sums over calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mmedge.converters.graphs.probe import ProbeBuilder, open_probe
from mmedge.converters.graphs.worker import Worker
from mmedge.converters.passes.float16 import Peak
from mmedge.converters.passes.matching import is_op
from mmedge.converters.statistics.collect import Feeds
from mmedge.errors import CalibrationError, QuantizationError
from mmedge.specs import Array

__all__ = ["collect_peaks"]

_PRODUCTS = ("MatMul", "Gemm", "Conv")


def collect_peaks(model: Path, feeds: Feeds, worker: Worker | None = None) -> dict[str, Peak]:
    """Run a graph over calibration data and return the peak of every float32 value, by name.

    The data is read once. The engine computes three numbers for each value.

    Args:
        model: ONNX file in float32, of ONNX's own operators at opset 18 or later.
        feeds: Starts the stream of feeds.
        worker: Where a graph runs that has not run before; None is for float graphs.

    Raises:
        CalibrationError: If the stream is empty.
        QuantizationError: If NaN reaches an output; the first value that holds any is named.
        BackendError: If the engine rejects the graph, or crashes in the worker.
    """
    graph = ir.load(model).graph
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    names = [value.name or "" for value in values if value.dtype == ir.DataType.FLOAT]
    outputs = {value.name for value in graph.outputs}
    found: dict[str, Peak] = {}
    with open_probe(model, names, _measure, worker) as probe:
        for feed in feeds():
            results = probe.run(feed)
            _refuse_nan(results, outputs)
            for name, measured in results.items():
                known = found.get(name, Peak(0.0, -np.inf, 0.0))
                found[name] = Peak(
                    max(known.largest, measured["largest"].item()),
                    max(known.highest, measured["highest"].item()),
                    max(known.inside, measured["inside"].item() if "inside" in measured else 0.0),
                )
    if names and not found:
        raise CalibrationError("No calibration data: got 0 samples. Pass a folder with some.")
    return found


def _refuse_nan(results: Mapping[str, Mapping[str, Array]], outputs: set[str | None]) -> None:
    broken = [name for name, measured in results.items() if measured["nan"].item() > 0]
    if any(name in outputs for name in broken):
        raise QuantizationError(
            f"Activation '{broken[0]}' is NaN on the calibration data. Check the calibration data "
            "and the source model."
        )


def _measure(builder: ProbeBuilder, _name: str, value: ir.Value) -> dict[str, ir.Value]:
    nan = builder.node("IsNaN", [value], dtype=ir.DataType.BOOL)
    counted = builder.node("Cast", [nan], {"to": int(ir.DataType.FLOAT)})
    finite = _finite(builder, value)
    measured = {
        "nan": builder.node("ReduceMax", [counted], {"keepdims": 0}),
        "largest": _largest(builder, finite),
        "highest": builder.node("ReduceMax", [finite], {"keepdims": 0}),
    }
    inside = _inside(builder, value)
    if inside is not None:
        measured["inside"] = inside
    return measured


def _finite(builder: ProbeBuilder, value: ir.Value) -> ir.Value:
    """Set infinity and NaN to 0."""
    odd = builder.node(
        "Or",
        [
            builder.node("IsInf", [value], dtype=ir.DataType.BOOL),
            builder.node("IsNaN", [value], dtype=ir.DataType.BOOL),
        ],
        dtype=ir.DataType.BOOL,
    )
    return builder.node("Where", [odd, builder.constant(np.zeros((), np.float32)), value])


def _largest(builder: ProbeBuilder, value: ir.Value) -> ir.Value:
    return builder.node("ReduceMax", [builder.node("Abs", [value])], {"keepdims": 0})


def _inside(builder: ProbeBuilder, value: ir.Value) -> ir.Value | None:
    """Measure the partial sums of a value."""
    node = value.producer()
    if node is None or value is not node.outputs[0] or node.inputs[0] is None:
        return None
    x = node.inputs[0]
    if is_op(node, "Softmax"):
        axis = node.attributes.get("axis")
        index = builder.constant(np.array([-1 if axis is None else axis.as_int()], np.int64))
        rows = builder.node("ReduceMax", [_finite(builder, x), index])
        return _largest(builder, rows)
    inputs = [given for given in node.inputs if given is not None]
    if len(inputs) < len(node.inputs):
        return None
    if is_op(node, "ReduceL2"):
        made = builder.node("ReduceSumSquare", [_finite(builder, x), *inputs[1:]])
    elif is_op(node, "ReduceMean") or is_op(node, "ReduceSum"):
        made = builder.node("ReduceSum", [_magnitude(builder, x), *inputs[1:]])
    elif any(is_op(node, product) for product in _PRODUCTS):
        made = builder.node(node.op_type, [_magnitude(builder, given) for given in inputs])
    else:
        return None
    twin = made.producer()
    if twin is not None:
        twin.attributes.update(node.attributes)
    return _largest(builder, made)


def _magnitude(builder: ProbeBuilder, value: ir.Value) -> ir.Value:
    return builder.node("Abs", [_finite(builder, value)])
