"""Float8 linear layers: Q/DQ in E4M3FN, for GPUs that multiply in it.

One scale for a weight and one for an activation, largest magnitude / 448, zero stays zero; codes of
weights are stored, so a matrix takes a quarter of float32. Opset 20 as everything else:
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

from mmedge.converters.passes.building import add_initializer, replace_value
from mmedge.converters.passes.int8 import Range, half_scales
from mmedge.converters.passes.linears import Linear, find_linears, makes_embedding
from mmedge.errors import QuantizationError
from mmedge.specs import Array, Float32Array

__all__ = ["Float8Linears", "float8_inputs", "quantize_weight_float8"]

_LARGEST = 448.0
_E4M3FN = np.dtype(ml_dtypes.float8_e4m3fn)
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


def quantize_weight_float8(weight: Float32Array, *, half: bool = False) -> tuple[Array, float]:
    """Return a matrix in E4M3FN with one scale for all of it: weight = codes * scale, rounded.

    Args:
        weight: A matrix.
        half: A scale that float16 holds.
    """
    scale = _scale(float(np.abs(weight).max(initial=0.0)), half=half)
    # E4M3FN has no infinity: what rounding carries beyond 448 would become NaN.
    return np.clip(weight / np.float32(scale), -_LARGEST, _LARGEST).astype(_E4M3FN), scale


def _scale(largest: float, *, half: bool) -> float:
    scale = float(np.float32(largest / _LARGEST))
    if half:
        scale = float(half_scales(np.array([scale], np.float32))[0])
    return scale if scale >= _SMALLEST_SCALE else 1.0


def _chosen(graph: ir.Graph, keep: Collection[str]) -> list[Linear]:
    return [
        linear
        for linear in find_linears(graph)
        if linear.name not in keep and not makes_embedding(linear)
    ]


def float8_inputs(model: ir.Model, keep: Collection[str] = ()) -> list[str]:
    """Return the names of the activations whose ranges fp8 needs, in order, each once."""
    return list(dict.fromkeys(linear.x.name or "" for linear in _chosen(model.graph, keep)))


class Float8Linears(ir.passes.InPlacePass):
    """Write linear layers in fp8.

    Requires: float32 weights as initializers; opset 19 or later.
    Ensures: inputs and outputs unchanged in name, dtype and shape; everything else in float32.
    """

    def __init__(
        self, ranges: Mapping[str, Range], keep: Collection[str] = (), *, half: bool = False
    ) -> None:
        """Take what calibration found.

        Args:
            ranges: By tensor name, for every name in `float8_inputs`.
            keep: Names of linear layers that stay in float.
            half: Scales that float16 holds, for a graph that is narrowed afterwards.
        """
        super().__init__()
        self._half = half
        self._ranges = ranges
        self._keep = frozenset(keep)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every linear layer of the main graph but the kept ones and the last.

        Raises:
            QuantizationError: If there is nothing to quantize, a range is missing, or a weight or
                range is not finite; the tensor is named.
        """
        graph = model.graph
        chosen = _chosen(graph, self._keep)
        if not chosen:
            raise QuantizationError(
                "Nothing to quantize: the graph has no product with a constant matrix, or all are "
                "kept. Leave this role in float."
            )
        activations: dict[ir.Value, ir.Value] = {}
        weights: dict[ir.Value, ir.Value] = {}
        for linear in chosen:
            if linear.x not in activations:
                activations[linear.x] = self._activation(graph, linear)
            if linear.weight not in weights:
                weights[linear.weight] = _weight(graph, linear, half=self._half)
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
        found = self._ranges.get(name)
        if found is None:
            raise QuantizationError(
                f"No calibrated range for '{name}'. Collect ranges for all of float8_inputs."
            )
        largest = max(abs(found.low), abs(found.high))
        if not np.isfinite(largest):
            raise QuantizationError(
                f"Activation '{name}' is NaN or infinite on the calibration data: range "
                f"[{found.low}, {found.high}]. Check the data, or leave this role in float."
            )
        scale, zero = _parameters(graph, name, _scale(largest, half=self._half))
        codes = _insert(
            graph, linear.node, "QuantizeLinear", [linear.x, scale, zero], f"{name}_quantize"
        )
        codes.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
        return _dequantized(graph, linear.node, codes, (scale, zero), name)


def _weight(graph: ir.Graph, linear: Linear, *, half: bool) -> ir.Value:
    codes, number = quantize_weight_float8(linear.matrix(), half=half)
    name = linear.weight.name or ""
    stored = add_initializer(graph, f"{name}_float8", codes)
    return _dequantized(graph, linear.node, stored, _parameters(graph, name, number), name)


def _parameters(graph: ir.Graph, name: str, scale: float) -> tuple[ir.Value, ir.Value]:
    return (
        add_initializer(graph, f"{name}_scale", np.array(scale, np.float32)),
        add_initializer(graph, f"{name}_zero_point", np.array(0, _E4M3FN)),
    )


def _dequantized(
    graph: ir.Graph,
    below: ir.Node,
    codes: ir.Value,
    parameters: tuple[ir.Value, ir.Value],
    name: str,
) -> ir.Value:
    return _insert(graph, below, "DequantizeLinear", [codes, *parameters], f"{name}_dequantize")


def _insert(
    graph: ir.Graph, below: ir.Node, op_type: str, inputs: list[ir.Value], name: str
) -> ir.Value:
    node = ir.node(op_type, inputs, name=name)
    node.outputs[0].name = f"{name}_out"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(below, node)
    return node.outputs[0]
