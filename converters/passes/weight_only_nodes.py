"""Nodes and packing of weight-only layers.

Sources: ONNX Runtime, `ContribOperators.md`, com.microsoft.MatMulNBits and GatherBlockQuantized;
ONNX operator DequantizeLinear-21.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from mmedge.converters.numerics.group_rounding import GroupedValues
from mmedge.converters.passes.building import NodeBuilder
from mmedge.converters.passes.linears import Linear
from mmedge.converters.passes.matching import sizes
from mmedge.specs import Array

__all__ = ["StoredWeight", "WeightBuilder", "write_blocked", "write_lookup", "write_nbits"]

# Of MatMulNBits: int8 activations, group by group (see weight_only.py).
_ACCURACY_LEVEL = 4


class StoredWeight:
    """A quantized weight and its constants, each once."""

    def __init__(self, quantized: GroupedValues, name: str | None) -> None:
        self.quantized = quantized
        self.name = name or "weight"
        self.made: dict[str, ir.Value] = {}


class WeightBuilder(NodeBuilder):
    """Adds nodes above one node of a graph, and the constants of weights, each once."""

    def constant(self, stored: StoredWeight, part: str, array: Array) -> ir.Value:
        """Return a constant of a weight, registered at the first call."""
        if part not in stored.made:
            stored.made[part] = self.initializer(f"{stored.name}_{part}", array)
        return stored.made[part]

    def scales(self, stored: StoredWeight, name: str) -> ir.Value:
        """Return scales (out, groups) in float32, stored as small as they can be."""
        value = self.constant(stored, "scale", stored.quantized.scales)
        if value.dtype == ir.DataType.FLOAT:
            return value
        return self.node("Cast", [value], f"{name}_scale", {"to": int(ir.DataType.FLOAT)})

    def zero_points(self, stored: StoredWeight) -> ir.Value | None:
        """Return packed zero points (out, bytes); None where they are implied."""
        quantized = stored.quantized
        if quantized.symmetric:
            return None
        return self.constant(stored, "zero_point", _packed(quantized.zero_points, quantized.bits))


def write_nbits(build: WeightBuilder, linear: Linear, stored: StoredWeight, stem: str) -> ir.Value:
    """Add a linear layer as MatMulNBits and return its output, bias included."""
    quantized = stored.quantized
    weight = build.constant(
        stored, f"int{quantized.bits}", _packed(quantized.values, quantized.bits)
    )
    # What MatMulNBits takes: a number a column.
    bias = linear.bias
    inside = bias is not None and sizes(bias) == (linear.shape[1],)
    inputs = [
        linear.x,
        weight,
        build.scales(stored, stem),
        build.zero_points(stored),
        None,
        bias if inside else None,
    ]
    attributes = {
        "K": linear.shape[0],
        "N": linear.shape[1],
        "bits": quantized.bits,
        "block_size": quantized.group_size,
        "accuracy_level": _ACCURACY_LEVEL,
    }
    name = f"{stem}_int{quantized.bits}"
    product = build.node("MatMulNBits", _trimmed(inputs), name, attributes, "com.microsoft")
    return product if bias is None or inside else build.node("Add", [product, bias], f"{stem}_bias")


def write_lookup(
    build: WeightBuilder, gather: ir.Node, stored: StoredWeight, stem: str
) -> ir.Value:
    """Add a lookup in a quantized table and return its output."""
    quantized = stored.quantized
    packed = _packed(quantized.values, quantized.bits)
    rows = packed.reshape(packed.shape[0], -1)
    if f"int{quantized.bits}" in stored.made:  # a head's weight: stored once, seen in two shapes
        shape = build.constant(stored, "table_shape", np.array(rows.shape, np.int64))
        table = build.node("Reshape", [stored.made[f"int{quantized.bits}"], shape], f"{stem}_table")
    else:
        table = build.constant(stored, f"int{quantized.bits}_rows", rows)
    inputs = [table, gather.inputs[1], build.scales(stored, stem), build.zero_points(stored)]
    attributes = {
        "bits": quantized.bits,
        "block_size": quantized.group_size,
        "gather_axis": 0,
        "quantize_axis": 1,
    }
    name = f"{stem}_int{quantized.bits}"
    return build.node("GatherBlockQuantized", _trimmed(inputs), name, attributes, "com.microsoft")


def write_blocked(
    build: WeightBuilder, linear: Linear, stored: StoredWeight, stem: str
) -> ir.Value:
    """Add a linear layer whose weight is dequantized by blocks and return its output."""
    quantized = stored.quantized
    middle = np.uint8(2 ** (quantized.bits - 1)) if quantized.symmetric else np.uint8(0)
    signed = {4: ml_dtypes.int4, 8: np.int8}[quantized.bits]
    unsigned = {4: ml_dtypes.uint4, 8: np.uint8}[quantized.bits]
    dtype = signed if quantized.symmetric else unsigned
    flat = quantized.values.reshape(quantized.values.shape[0], -1)[:, : quantized.inputs].T
    inputs: list[ir.Value | None] = [
        build.constant(stored, f"int{quantized.bits}", _shifted(flat, middle).astype(dtype)),
        build.constant(stored, "scale", quantized.scales.T.astype(np.float32)),
    ]
    if not quantized.symmetric:
        inputs.append(build.constant(stored, "zero_point", quantized.zero_points.T.astype(dtype)))
    attributes = {"axis": 0, "block_size": quantized.group_size}
    weight = build.node("DequantizeLinear", inputs, f"{stem}_weight", attributes)
    product = build.node("MatMul", [linear.x, weight], f"{stem}_product")
    if linear.bias is None:
        return product
    return build.node("Add", [product, linear.bias], f"{stem}_bias")


def _packed(values: Array, bits: int) -> Array:
    """Pack quantized values along the last axis into bytes, the first in the lowest bits."""
    per_byte = 8 // bits
    missing = -values.shape[-1] % per_byte
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])
    lanes = padded.reshape(*padded.shape[:-1], -1, per_byte)
    packed = lanes[..., 0].copy()
    for lane in range(1, per_byte):
        packed |= lanes[..., lane] << np.uint8(bits * lane)
    return packed


def _shifted(values: Array, middle: np.uint8) -> Array:
    """Return values minus the middle one, int16 where that is signed."""
    return values.astype(np.int16) - middle if middle else values


def _trimmed(inputs: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """Drop optional inputs at the end."""
    kept = list(inputs)
    while kept and kept[-1] is None:
        kept.pop()
    return kept
