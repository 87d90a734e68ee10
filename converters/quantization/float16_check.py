"""Numerical check of fp16/bf16 graphs against fp32, naming the first diverging node."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mmedge.bundle.differences import cosines
from mmedge.converters.graphs.probe import written_beside
from mmedge.converters.graphs.worker import Worker, lent
from mmedge.converters.passes.linears import COMPARE_KEY
from mmedge.converters.passes.narrowing import ComputeInFloat32
from mmedge.converters.statistics.collect import Feeds
from mmedge.errors import CalibrationError, QuantizationError
from mmedge.specs import Array, Compare

__all__ = ["emulate_narrow_floats", "require_agreement"]

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# Beyond this, what a value holds is a mask.
_MASK = 1e30


def require_agreement(
    reference: Path,
    model: Path,
    feeds: Feeds,
    *,
    cosine_min: float = 0.999,
    worker: Worker | None = None,
) -> float:
    """Check that a graph agrees with its float32 reference; both run in a worker.

    Args:
        reference: ONNX file in float32.
        model: ONNX file of the same inputs and outputs, made from it by a pass that keeps the names
            of values, such as NarrowFloats; outputs without an order are not compared. Half types
            are emulated, each value rounded: ONNX Runtime on CPU may leave roundings out, or have
            no kernel.
        feeds: Starts the stream of feeds; a few are enough.
        cosine_min: Smallest cosine between the outputs of one sample.
        worker: None starts one.

    Returns:
        The smallest cosine seen.

    Raises:
        QuantizationError: If an output is not finite, or further away; the first node whose value
            is not finite, or whose cosine is below, is named.
        CalibrationError: If the stream is empty.
        BackendError: If ONNX Runtime refuses the graph, or crashes.
    """
    smallest: float | None = None
    marks = {v.name: v.metadata_props.get(COMPARE_KEY) for v in ir.load(reference).graph.outputs}
    ordered = [name for name, mark in marks.items() if name and mark != Compare.UNORDERED.value]
    with (
        lent(worker) as runs,
        written_beside(emulate_narrow_floats(model), model.parent) as emulated,
        runs.open(reference, reference.name) as expects,
        runs.open(emulated, model.name) as candidate,
    ):
        for feed in feeds():
            expected, got = expects.run(feed), candidate.run(feed)
            cosine = min(_cosine(expected[name], got[name]) for name in ordered)
            if not cosine >= cosine_min:
                place = _first_off(reference, model, feed, cosine_min, runs)
                raise QuantizationError(
                    f"{model.name} does not agree with float32: smallest cosine {cosine:.4f}, "
                    f"expected at least {cosine_min}. {place} Calibrate with data that is like "
                    "what it will see, or leave this precision out."
                )
            smallest = cosine if smallest is None else min(smallest, cosine)
    if smallest is None:
        raise CalibrationError("No data to compare on: got 0 samples. Pass a folder with some.")
    return smallest


def emulate_narrow_floats(path: Path) -> ir.Model:
    """Return a graph that computes half types in float32 and then rounds."""
    model = ir.load(path)
    for dtype in _HALF:
        ComputeInFloat32(dtype)(model)
    return model


def _cosine(expected: Array, got: Array) -> float:
    """Return the smallest cosine over the last axis; -1 if something is not finite."""
    if not np.isfinite(got).all():
        return -1.0
    width = expected.shape[-1] if expected.ndim else 1
    rows = [array.reshape(-1, width).astype(np.float32) for array in (expected, got)]
    return float(cosines(*rows).min())


def _first_off(
    reference: Path, model: Path, feed: Mapping[str, Array], cosine_min: float, worker: Worker
) -> str:
    """Name the first diverging node; all values of one feed are in memory."""
    ours = _values(emulate_narrow_floats(model), model, feed, worker)
    theirs = _values(ir.load(reference), reference, feed, worker)
    producers = {v.name: node for node in ir.load(model).graph for v in node.outputs}
    for name, got in ours.items():
        expected, node = theirs.get(name), producers.get(name)
        if expected is None or node is None or expected.shape != got.shape or not got.size:
            continue
        kept = np.isfinite(expected) & (np.abs(expected) < _MASK)
        broken = not np.isfinite(got[kept]).all()
        if broken or _whole_cosine(expected[kept], got[kept]) < cosine_min:
            what = "is not finite" if broken else "is off"
            return f"The first value that {what} is '{name}', made by {node.op_type} '{node.name}'."
    return "No single value inside is off by that much."


def _whole_cosine(expected: Array, got: Array) -> float:
    left, right = (array.reshape(1, -1).astype(np.float32) for array in (expected, got))
    if not left.any():
        return 1.0 if not right.any() else -1.0
    return float(cosines(left, right).item())


def _values(
    model: ir.Model, source: Path, feed: Mapping[str, Array], worker: Worker
) -> dict[str, Array]:
    """Run a graph with every float value among its outputs, as float32, by the values' names."""
    graph = model.graph
    names: dict[str, str] = {}
    outputs: list[ir.Value] = []
    floats = (ir.DataType.FLOAT, *_HALF)
    for value in [v for node in graph for v in node.outputs if v.dtype in floats]:
        seen = f"mmedge_seen_{len(names)}"
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=seen)
        cast.outputs[0].name = seen
        cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        graph.append(cast)
        outputs.append(cast.outputs[0])
        names[seen] = value.name or ""
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    with written_beside(model, source.parent) as path, worker.open(path, source.name) as opened:
        results = opened.run(feed)
    return {name: results[output] for output, name in names.items()}
