"""Conversion to float16, with fp32 ops where values overflow or underflow.

float16 holds magnitudes from 6.1e-5 (below, ever fewer digits) to 65504. What stays in float32 is
found from numbers, not from a list of operators:

- weights: a constant that is too large, or loses more than a thousandth of its norm by rounding;
- values, over calibration data (peaks.py): one that comes near 65504, or is nowhere above 6.1e-5,
  stays in float32 with the node that makes it and all that read it; so do a product, a sum, a mean
  or a norm whose sum does so on the way, and a Softmax, with what makes its input, whose input is
  so large that float16 has steps of a quarter there;
- the normalization of the embedding, because the output is float32: the cast only comes earlier.

LayerNormalization computes in float32 by definition (`stash_type` 1), as Softmax in every engine.

Source: IEEE 754-2019, binary16; ONNX operators, LayerNormalization-17; Micikevicius et al. 2018,
"Mixed Precision Training", section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from mmedge.converters.passes.matching import constant, is_op, producer
from mmedge.converters.passes.narrowing import NarrowFloats, narrowed
from mmedge.errors import QuantizationError

__all__ = ["Float16Result", "Fp32Op", "Peak", "output_normalization", "to_float16"]

_LARGEST = 65504.0
# Margin for data beyond the calibration range.
_LIMIT = _LARGEST / 4
_SMALLEST_NORMAL = 2.0**-14
# Rounding alone takes 3e-4 of a weight's norm.
_WEIGHT_ERROR = 1e-3
# From here on float16 has steps of 1/4, which move a weight of attention by up to 13 %.
_SOFTMAX_LIMIT = 256.0
# Ops allowed between the normalization of an embedding and the output.
_LIGHT = frozenset({"Clip", "Max", "Add", "Expand", "Div", "Mul", "Squeeze", "Identity"})
# Ops allowed between a mask and its Softmax.
_MASKING = frozenset({"Where", "Add", "Expand", "Unsqueeze", "Reshape", "Slice", "Transpose"})
_SQUARING = ("ReduceL2", "ReduceSumSquare", "Pow")


@dataclass(frozen=True, slots=True)
class Peak:
    """Peaks of a value over the calibration data, without infinite ones such as masks.

    Attributes:
        largest: Largest magnitude.
        highest: Largest value; below `largest` where that is negative.
        inside: What a sum on the way to the value can have reached in any order of adding: the sum
            of the magnitudes, or of the squares. For Softmax the largest magnitude among the maxima
            of its rows. 0 for other operators.
    """

    largest: float
    highest: float
    inside: float


@dataclass(frozen=True, slots=True)
class Fp32Op:
    """An fp32 op in a float16 graph.

    Attributes:
        name: Of the node.
        op_type: Of the node.
        reason: Why.
    """

    name: str
    op_type: str
    reason: str


@dataclass(frozen=True, slots=True)
class Float16Result:
    """A graph in float16.

    Attributes:
        model: The graph; inputs and outputs are float32.
        fp32_ops: Ops in float32, in the graph's order.
    """

    model: ir.Model
    fp32_ops: tuple[Fp32Op, ...]


def to_float16(model: Path | ir.Model, peaks: Mapping[str, Peak] | None = None) -> Float16Result:
    """Return a portable float32 graph in float16, inputs and outputs left in float32.

    Args:
        model: Portable ONNX file; or a graph, such as one in fp8, which is changed.
        peaks: Of every float32 value, by name (`peaks.collect_peaks`). Without them only the
            weights are checked, and ops that square their input stay in float32.

    Raises:
        QuantizationError: If a weight is NaN, or the dtype of a value is not known; it is named.
    """
    graph = model if isinstance(model, ir.Model) else ir.load(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    fp32_ops = _Fp32Ops()
    fp32_ops.keep(output_normalization(graph.graph), "makes the float32 output")
    for value in graph.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT and (reason := _weight_reason(value)):
            fp32_ops.keep(value.consumers(), reason)
    if peaks is None:
        _keep_squares(graph.graph, fp32_ops)
    else:
        _keep_peaks(graph.graph, peaks, fp32_ops)
    found = tuple(
        Fp32Op(node.name or "", node.op_type, fp32_ops.reasons[node])
        for node in graph.graph
        if node in fp32_ops.reasons
    )
    NarrowFloats(ir.DataType.FLOAT16, fp32_ops.reasons)(graph)
    return Float16Result(graph, found)


class _Fp32Ops:
    """Finds the fp32 ops, each with the first reason."""

    def __init__(self) -> None:
        self.reasons: dict[ir.Node, str] = {}

    def keep(self, nodes: Iterable[ir.Node | None], reason: str) -> None:
        for node in nodes:
            if node is not None:
                self.reasons.setdefault(node, reason)


def output_normalization(graph: ir.Graph) -> list[ir.Node]:
    """Return each final ReduceL2 and its followers, up to light nodes before an output."""
    found: list[ir.Node] = []
    for node in graph:
        if is_op(node, "ReduceL2"):
            after = _reached(node, lambda reader: reader.op_type in _LIGHT)
            found.extend([] if after is None else [node, *after])
    return found


def _keep_squares(graph: ir.Graph, fp32_ops: _Fp32Ops) -> None:
    for node in graph:
        if any(is_op(node, op_type) for op_type in _SQUARING):
            fp32_ops.keep([node], "squares its input, and no calibration data shows that this fits")


def _keep_peaks(graph: ir.Graph, peaks: Mapping[str, Peak], fp32_ops: _Fp32Ops) -> None:
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        peak = peaks.get(value.name or "")
        if peak is None:
            continue
        node = value.producer()
        # A mask means "less than all others", which the smallest float16 still does.
        largest = peak.highest if _only_masks(value) else peak.largest
        if largest > _LIMIT:
            reason = f"'{value.name}' reaches {largest:.2g} on the calibration data"
            fp32_ops.keep([node, *value.consumers()], reason)
        elif 0 < peak.largest < _SMALLEST_NORMAL:
            reason = f"'{value.name}' stays below {peak.largest:.2g} on the calibration data"
            fp32_ops.keep([node, *value.consumers()], reason)
        elif is_op(node, "Softmax") and node is not None:
            if peak.inside >= _SOFTMAX_LIMIT:
                reason = f"Softmax of {peak.inside:.2g}, where float16 has coarse steps"
                fp32_ops.keep([node, *_scores(node)], reason)
        elif peak.inside > _LIMIT:
            fp32_ops.keep([node], f"sums up to {peak.inside:.2g} on the calibration data")


def _scores(softmax: ir.Node) -> Iterable[ir.Node | None]:
    """Return the nodes from the product to a Softmax."""
    value = softmax.inputs[0]
    add = producer(value, "Add")
    yield None if value is None else value.producer()
    if add is not None:
        yield from (producer(addend, "MatMul") for addend in add.inputs)


def _weight_reason(value: ir.Value) -> str:
    """Return why a constant does not fit float16, or ""."""
    array = constant(value)
    if array is None or not array.size:
        return ""
    if np.isnan(array).any():
        raise QuantizationError(
            f"Weight '{value.name}' holds NaN. Check the source model; leave this role in float."
        )
    finite = array[np.isfinite(array)]
    largest = float(np.abs(finite).max(initial=0.0))
    if largest > _LARGEST:
        if finite.max() <= _LARGEST and _only_masks(value):
            return ""
        return f"'{value.name}' holds {largest:.2g}, beyond float16"
    half = narrowed(finite, ir.DataType.FLOAT16).astype(np.float32)
    norm = float(np.linalg.norm(finite.astype(np.float64)))
    lost = float(np.linalg.norm(finite.astype(np.float64) - half)) / norm if norm else 0.0
    return f"'{value.name}' loses {lost:.1%} of its norm in float16" if lost > _WEIGHT_ERROR else ""


def _only_masks(value: ir.Value) -> bool:
    """Return whether a value is only added to, or chosen for, what a Softmax reads."""
    readers = list(value.consumers())
    while readers:
        node = readers.pop()
        if is_op(node, "Softmax"):
            continue
        if node.op_type not in _MASKING or any(v.is_graph_output() for v in node.outputs):
            return False
        readers.extend(reader for v in node.outputs for reader in v.consumers())
    return bool(value.consumers()) and not value.is_graph_output()


def _reached(start: ir.Node, passes: Callable[[ir.Node], bool]) -> list[ir.Node] | None:
    """Return all nodes after one, or None where one of them does not pass."""
    found: list[ir.Node] = []
    pending = [start]
    while pending:
        for value in pending.pop().outputs:
            for reader in value.consumers():
                if not passes(reader):
                    return None
                if reader not in found:
                    found.append(reader)
                    pending.append(reader)
    return found
