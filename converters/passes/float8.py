"""Float8 linear layers: Q/DQ in E4M3FN, for GPUs with fp8 products.

One scale for a weight and one for an activation, largest magnitude / 448, zero stays zero.
Quantized weights are stored, so a matrix takes a quarter of float32. Opset 20 as everything else:
QuantizeLinear and DequantizeLinear know E4M3FN since 19. The product itself is a float MatMul of
two DequantizeLinear, which TensorRT makes one fp8 product, q, k and v in one. Attention's products
of two activations stay in float, and so does the layer that makes the embedding. Where the rest is
in float16 too (`to_float16` on this graph), TensorRT fuses attention; in float32 it does not.

Sources: Micikevicius et al. 2022, "FP8 Formats for Deep Learning"; ONNX operators,
QuantizeLinear-19; ONNX, "Float stored in 8 bits".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mmedge.converters.numerics.int8_rounding import (
    Range,
    calibrated_range,
    half_scales,
    relative_error,
)
from mmedge.converters.passes.building import NodeBuilder, add_initializer, replace_value
from mmedge.converters.passes.int8 import quantizable_linears
from mmedge.converters.passes.linears import Linear
from mmedge.errors import QuantizationError
from mmedge.specs import Array, Float32Array

__all__ = ["Float8Linears", "quantize_weight_float8"]

_LARGEST = 448.0
_E4M3FN = np.dtype(ml_dtypes.float8_e4m3fn)
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


def quantize_weight_float8(weight: Float32Array, *, half: bool = False) -> tuple[Array, float]:
    """Return a matrix in E4M3FN with one scale: weight = quantized * scale, rounded.

    Args:
        weight: A matrix.
        half: Use a scale that float16 holds.
    """
    scale = _scale(float(np.abs(weight).max(initial=0.0)), half=half)
    # E4M3FN has no infinity: what rounding carries beyond 448 would become NaN.
    return np.clip(weight / np.float32(scale), -_LARGEST, _LARGEST).astype(_E4M3FN), scale


def _scale(largest: float, *, half: bool) -> float:
    scale = float(np.float32(largest / _LARGEST))
    if half:
        scale = float(half_scales(np.array([scale], np.float32))[0])
    return scale if scale >= _SMALLEST_SCALE else 1.0


class Float8Linears(ir.passes.InPlacePass):
    """Write linear layers in fp8.

    Requires: float32 weights as initializers; opset 19 or later.
    Ensures: inputs and outputs unchanged in name, dtype and shape; everything else in float32.
    """

    def __init__(
        self, ranges: Mapping[str, Range], keep: Collection[str] = (), *, half: bool = False
    ) -> None:
        """Set the calibrated ranges.

        Args:
            ranges: By tensor name, for every name in `quantizable_inputs`.
            keep: Names of excluded linear layers.
            half: Use scales that float16 holds, for a graph that is narrowed afterwards.
        """
        super().__init__()
        self._half = half
        self._ranges = ranges
        self._keep = frozenset(keep)
        self.weight_errors: dict[str, float] = {}
        """||W - Wq||_F / ||W||_F of the quantized weights, by name."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every linear layer of the main graph except excluded ones and the last.

        Raises:
            QuantizationError: If no layer can be quantized, a range is missing, or a weight or
                range is not finite; the tensor is named.
        """
        graph = model.graph
        chosen = quantizable_linears(graph, self._keep)
        if not chosen:
            raise QuantizationError(
                "Nothing to quantize: the graph has no product with a constant matrix, or all are "
                "excluded. fp8 leaves convolutions in float. "
                "Convert this role with fp32 or fp16."
            )
        activations: dict[ir.Value, ir.Value] = {}
        weights: dict[ir.Value, ir.Value] = {}
        for linear in chosen:
            if linear.x not in activations:
                activations[linear.x] = self._activation(graph, linear)
            if linear.weight not in weights:
                weights[linear.weight] = self._weight(graph, linear)
            inputs = [activations[linear.x], weights[linear.weight]]
            result = _insert(graph, linear.node, "MatMul", inputs, f"{linear.node.name}_product")
            if linear.bias is not None:
                result = _insert(
                    graph, linear.node, "Add", [result, linear.bias], f"{linear.node.name}_bias"
                )
            replace_value(linear.output, result)
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)

    def _activation(self, graph: ir.Graph, linear: Linear) -> ir.Value:
        name = linear.x.name or ""
        found = calibrated_range(self._ranges, linear.x)
        largest = max(abs(found.low), abs(found.high))
        scale, zero = _parameters(graph, name, _scale(largest, half=self._half))
        quantized = _insert(
            graph, linear.node, "QuantizeLinear", [linear.x, scale, zero], f"{name}_quantize"
        )
        quantized.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
        return _dequantized(graph, linear.node, quantized, (scale, zero), name)

    def _weight(self, graph: ir.Graph, linear: Linear) -> ir.Value:
        matrix = linear.matrix()
        quantized, number = quantize_weight_float8(matrix, half=self._half)
        self.weight_errors[linear.name] = relative_error(
            matrix, quantized.astype(np.float32) * np.float32(number)
        )
        name = linear.weight.name or ""
        stored = add_initializer(graph, f"{name}_float8", quantized)
        return _dequantized(graph, linear.node, stored, _parameters(graph, name, number), name)


def _parameters(graph: ir.Graph, name: str, scale: float) -> tuple[ir.Value, ir.Value]:
    return (
        add_initializer(graph, f"{name}_scale", np.array(scale, np.float32)),
        add_initializer(graph, f"{name}_zero_point", np.array(0, _E4M3FN)),
    )


def _dequantized(
    graph: ir.Graph,
    below: ir.Node,
    quantized: ir.Value,
    parameters: tuple[ir.Value, ir.Value],
    name: str,
) -> ir.Value:
    return _insert(graph, below, "DequantizeLinear", [quantized, *parameters], f"{name}_dequantize")


def _insert(
    graph: ir.Graph, below: ir.Node, op_type: str, inputs: list[ir.Value], name: str
) -> ir.Value:
    output = NodeBuilder(graph, below).node(op_type, inputs, name)
    output.type = ir.TensorType(ir.DataType.FLOAT)
    return output
