"""Measures of an activation in ONNX operators."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mmedge.converters.graphs.probe import ProbeBuilder
from mmedge.converters.statistics.ranges import BINS

__all__ = [
    "measure_channels",
    "measure_extremes",
    "measure_histogram",
    "measure_moment",
    "measure_shape",
]


def measure_extremes(build: ProbeBuilder, _: str, value: ir.Value) -> dict[str, ir.Value]:
    """Measure "low" and "high" over everything, and a "sum" that shows NaN."""
    measures = {"low": "ReduceMin", "high": "ReduceMax", "sum": "ReduceSum"}
    # The engine's extremes pass over NaN; a sum does not.
    return {
        what: build.node(op_type, [value], {"keepdims": 0}) for what, op_type in measures.items()
    }


def measure_channels(build: ProbeBuilder, _: str, value: ir.Value) -> dict[str, ir.Value]:
    """Measure "low", "high" and "mean" (C,) of the last axis, and the "shape" of all rows."""
    rows, axes = build.rows(value), build.constant(np.array([0]))
    measures = {"low": "ReduceMin", "high": "ReduceMax", "mean": "ReduceMean"}
    found = {
        what: build.node(op_type, [rows, axes], {"keepdims": 0})
        for what, op_type in measures.items()
    }
    return {**found, "shape": build.node("Shape", [rows], dtype=ir.DataType.INT64)}


def measure_shape(build: ProbeBuilder, _: str, value: ir.Value) -> dict[str, ir.Value]:
    """Measure the "shape" (2,) of the value as rows and channels."""
    return {"shape": build.node("Shape", [build.rows(value)], dtype=ir.DataType.INT64)}


def measure_moment(build: ProbeBuilder, name: str, value: ir.Value) -> dict[str, ir.Value]:
    """Measure the "product" X^T X (C, C), and the "shape" of X."""
    rows = build.rows(value)
    product = build.node("MatMul", [build.node("Transpose", [rows]), rows])
    return {"product": product, **measure_shape(build, name, value)}


def measure_histogram(build: ProbeBuilder, value: ir.Value, low: float, high: float) -> ir.Value:
    """Count a value into BINS equal bins between two numbers: (BINS,) int32."""
    int32 = ir.DataType.INT32
    start = build.constant(np.array(low, np.float32))
    bins_a_unit = build.constant(np.array(BINS / (high - low), np.float32))
    first, last = (build.constant(np.array(end, np.float32)) for end in (0, BINS - 1))
    flat = build.node("Reshape", [value, build.constant(np.array([-1]))])
    places = build.node("Mul", [build.node("Sub", [flat, start]), bins_a_unit])
    inside = build.node("Clip", [places, first, last])
    bins = build.node("Cast", [inside], {"to": int32.value}, dtype=int32)
    size = build.node("Shape", [bins], dtype=ir.DataType.INT64)
    ones = build.node("Expand", [build.constant(np.array(1, np.int32)), size], dtype=int32)
    none = build.constant(np.zeros(BINS, np.int32))
    add: dict[str, int | str] = {"axis": 0, "reduction": "add"}
    return build.node("ScatterElements", [none, bins, ones], add, dtype=int32)
