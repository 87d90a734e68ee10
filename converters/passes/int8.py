"""Int8 linear layers, in the form that each runtime executes.

Weights are symmetric int8 with one scale for each output channel, activations uint8 with one scale
and zero point for the whole tensor. Forms:

- dynamic: DynamicQuantizeLinear, MatMulIntegerToFloat; the scale of an activation is computed in
  each call.
- operators: QuantizeLinear with a calibrated scale, MatMulIntegerToFloat. The numbers of the QDQ
  form, with scales and bias inside the product, which ONNX Runtime does not make from QDQ.
- qdq: QuantizeLinear and DequantizeLinear around a float product. With unsigned activations for
  runtimes on CPU, with signed ones for engines.

An embedding table is int8 with a scale for each row. Where a CPU runs the graph, values and scales
are looked up and multiplied. TensorRT takes int8 constants before DequantizeLinear only, so with
signed activations the table is dequantized and then looked up in: the engine stores int8 and
dequantizes the rows it takes. ONNX Runtime would dequantize the whole table in each call.

Sources: ONNX operators DynamicQuantizeLinear-11, QuantizeLinear-21; ONNX Runtime,
`ContribOperators.md`, com.microsoft.MatMulIntegerToFloat; Jacob et al. 2018, "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mmedge.converters.numerics.int8_rounding import (
    Range,
    calibrated_range,
    quantize_weight,
    relative_error,
)
from mmedge.converters.numerics.paired_int8 import pair_weight
from mmedge.converters.passes.building import NodeBuilder, replace_value
from mmedge.converters.passes.linears import Linear, find_linears, makes_embedding
from mmedge.converters.passes.matching import constant, is_op, only_consumer, sizes
from mmedge.errors import QuantizationError
from mmedge.runtimes.onnx_file import PAIRED_KEY
from mmedge.specs import Array, Float32Array

__all__ = [
    "Int8Linears",
    "quantizable_inputs",
    "quantizable_linears",
    "quantizable_tables",
]


def quantizable_linears(graph: ir.Graph, keep: Collection[str] = ()) -> list[Linear]:
    """Return the linear layers to quantize to int8.

    The one that makes the embedding stays in float: it is a thousandth of the work, and its error
    would go straight into the output. So do those named in `keep`.
    """
    return [
        linear
        for linear in find_linears(graph)
        if linear.name not in keep and not makes_embedding(linear)
    ]


def quantizable_tables(graph: ir.Graph, keep: Collection[str] = ()) -> dict[str, list[ir.Node]]:
    """Return the lookups in each embedding table to quantize to int8, by the table's name.

    A table's name is that of its weight without ".weight". Those in `keep` are excluded.
    """
    found: dict[str, list[ir.Node]] = {}
    for node in graph:
        table = node.inputs[0] if is_op(node, "Gather") else None
        if table is None or not _is_large_table(table, node):
            continue
        name = (table.name or "").removesuffix(".weight")
        if name not in keep:
            found.setdefault(name, []).append(node)
    return found


def quantizable_inputs(model: ir.Model, keep: Collection[str] = ()) -> list[str]:
    """Return the names of the activations whose ranges static int8 needs, in order, each once.

    Args:
        model: The graph.
        keep: Names of excluded linear layers.
    """
    return list(
        dict.fromkeys(linear.x.name or "" for linear in quantizable_linears(model.graph, keep))
    )


class Int8Linears(ir.passes.InPlacePass):
    """Write linear layers, and large embedding tables, in int8.

    Requires: float32 weights as initializers.
    Ensures: inputs and outputs unchanged in name, dtype and shape; everything else in float32.
    """

    def __init__(
        self,
        form: Literal["dynamic", "operators", "qdq"],
        ranges: Mapping[str, Range] | None = None,
        *,
        symmetric_activations: bool = False,
        half: bool = False,
        keep: Collection[str] = (),
        paired: bool = False,
        biases: Callable[[Linear, Array, Float32Array], Float32Array | None] | None = None,
    ) -> None:
        """Choose the form.

        Args:
            form: See the module.
            ranges: By tensor name, for every name in `quantizable_inputs`; static forms need it.
            symmetric_activations: int8 with zero point 0 in the QDQ form, as TensorRT takes it.
            half: Use scales that float16 holds, for a graph that is narrowed afterwards.
            keep: Names of excluded linear layers and embedding tables (see Linear.name).
            paired: Use saturation-safe weights (numerics/paired_int8.py), marked in the graph's
                metadata, for ONNX Runtime's backend. Not with `half`.
            biases: Gives a layer's bias from the layer, its quantized weight and its scales, as
                bias_correction does; None for what it has.
        """
        super().__init__()
        self._form = form
        self._ranges = ranges or {}
        self._symmetric = symmetric_activations
        self._half = half
        self._keep = frozenset(keep)
        self._paired = paired
        self._biases = biases
        self.weight_errors: dict[str, float] = {}
        """||W - Wq||_F / ||W||_F of the quantized weights, by name."""
        self._quantized: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
        self._dequantized: dict[ir.Value, ir.Value] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Quantize every linear layer and embedding table of the main graph.

        Raises:
            QuantizationError: If no layer can be quantized, a range is missing, or a weight or
                range is not finite; the tensor is named.
        """
        graph = model.graph
        if self._form != "qdq":
            graph.opset_imports.setdefault("com.microsoft", 1)
        linears = quantizable_linears(graph, self._keep)
        tables = quantizable_tables(graph, self._keep)
        if not linears and not tables:
            raise QuantizationError(
                "Nothing to quantize: the graph has no product with a constant matrix, or all of "
                "them are excluded. Convolutions are quantized by int8-static alone, with "
                "calibration data. Pass --calibration DIR, or convert this role with fp32 or fp16."
            )
        for linear in linears:
            self._rewrite(graph, linear)
        for name, lookups in tables.items():
            for lookup in lookups:
                self.weight_errors[name] = self._table(graph, lookup)
        if self._paired:
            model.metadata_props[PAIRED_KEY] = "true"
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)

    def _rewrite(self, graph: ir.Graph, linear: Linear) -> None:
        matrix = linear.matrix()
        quantized, scales = quantize_weight(matrix, axis=1, half=self._half)
        if self._paired:
            quantized, scales = pair_weight(matrix, scales)
        self.weight_errors[linear.name] = relative_error(matrix, quantized * scales)
        build = NodeBuilder(graph, linear.node)
        bias = None if self._biases is None else self._biases(linear, quantized, scales)
        if bias is not None:
            corrected = build.initializer(f"{linear.name}.corrected_bias", bias)
            linear = replace(linear, bias=corrected)
        stem = linear.node.name or linear.node.outputs[0].name or "linear"
        w = build.initializer(f"{linear.weight.name}_int8", quantized)
        if self._form == "qdq":
            result = self._qdq(build, linear, stem, w, scales)
        else:
            result = self._integer(build, linear, stem, w, scales)
        replace_value(linear.output, result)

    def _integer(
        self, build: NodeBuilder, linear: Linear, stem: str, w: ir.Value, scales: Float32Array
    ) -> ir.Value:
        quantized, scale, zero_point = self._activation(build, linear.x)
        bias = linear.bias
        # What MatMulIntegerToFloat takes: a number a column.
        inside = bias is not None and sizes(bias) == (linear.shape[1],)
        product = build.node(
            "MatMulIntegerToFloat",
            [
                quantized,
                w,
                scale,
                build.initializer(f"{linear.weight.name}_scale", scales),
                zero_point,
                None,  # symmetric; naming a zero point of zeros costs a per cent of the product
                bias if inside else None,
            ],
            f"{stem}_int8",
            domain="com.microsoft",
        )
        return product if bias is None or inside else build.node("Add", [product, bias], stem)

    def _qdq(
        self, build: NodeBuilder, linear: Linear, stem: str, w: ir.Value, scales: Float32Array
    ) -> ir.Value:
        quantized, scale, zero_point = self._activation(build, linear.x)
        if linear.x not in self._dequantized:
            self._dequantized[linear.x] = build.node(
                "DequantizeLinear", [quantized, scale, zero_point], f"{linear.x.name}_dequantize"
            )
        w_scale = build.initializer(f"{linear.weight.name}_scale", scales)
        # Named although it is all zeros: ONNX Runtime's kernels for older processors count on it.
        w_zero = build.initializer(
            f"{linear.weight.name}_zero_point", np.zeros(scales.size, np.int8)
        )
        w_float = build.node(
            "DequantizeLinear", [w, w_scale, w_zero], f"{stem}_weight", {"axis": 1}
        )
        product = build.node("MatMul", [self._dequantized[linear.x], w_float], f"{stem}_product")
        if linear.bias is None:
            return product
        return build.node("Add", [product, linear.bias], f"{stem}_bias")

    def _activation(self, build: NodeBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return quantized value, scale and zero point of an activation, once for all readers."""
        if x in self._quantized:
            return self._quantized[x]
        # What only moves data moves a quarter of it when it comes after the quantization.
        moves: list[ir.Node] = []
        root = x
        while self._form != "qdq" and (move := _moves_data(root)) is not None:
            source = move.inputs[0]
            if source is None:
                break
            moves.append(move)
            root = source
        if self._form == "dynamic":
            node = ir.node(
                "DynamicQuantizeLinear", [root], num_outputs=3, name=f"{x.name}_quantize"
            )
            for output, part in zip(
                node.outputs, ("quantized", "scale", "zero_point"), strict=True
            ):
                output.name = f"{x.name}_{part}"
            build.insert(node)
            quantized, scale, zero_point = node.outputs
        else:
            scale_number, zero_number = self._parameters(x)
            dtype = np.int8 if self._symmetric else np.uint8
            scale = build.initializer(f"{x.name}_scale", np.array(scale_number, np.float32))
            zero_point = build.initializer(f"{x.name}_zero_point", np.array(zero_number, dtype))
            # ONNX Runtime had its own QuantizeLinear long before it had that of opset 23.
            domain = "" if self._form == "qdq" else "com.microsoft"
            quantized = build.node(
                "QuantizeLinear", [root, scale, zero_point], f"{x.name}_quantize", domain=domain
            )
        for move in reversed(moves):
            twin = ir.node(
                move.op_type,
                [quantized, *move.inputs[1:]],
                dict(move.attributes.items()),
                name=f"{move.name}_moved",
            )
            twin.outputs[0].name = f"{move.outputs[0].name}_moved"
            build.insert(twin)
            quantized = twin.outputs[0]
        self._quantized[x] = (quantized, scale, zero_point)
        return self._quantized[x]

    def _parameters(self, x: ir.Value) -> tuple[float, int]:
        found = calibrated_range(self._ranges, x)
        return (found.symmetric(half=self._half), 0) if self._symmetric else found.affine()

    def _table(self, graph: ir.Graph, gather: ir.Node) -> float:
        """Store an embedding table in int8, one scale for each row; return the relative error."""
        table, ids = gather.inputs[0], gather.inputs[1]
        weight = constant(table)
        if table is None or weight is None or not np.isfinite(weight).all():
            raise QuantizationError(
                f"Embedding table '{None if table is None else table.name}' holds NaN or infinite "
                "values. Check the source model; int8 cannot represent them."
            )
        matrix = np.asarray(weight, np.float32)
        quantized, scales = quantize_weight(matrix, axis=0, half=self._half)
        build = NodeBuilder(graph, gather)
        name = gather.name or gather.outputs[0].name or "gather"
        stored = build.initializer(f"{table.name}_int8", quantized)
        if self._form == "qdq" and self._symmetric:
            scale = build.initializer(f"{table.name}_scale", scales)
            rows = build.node("DequantizeLinear", [stored, scale], f"{name}_table", {"axis": 0})
            result = build.node("Gather", [rows, ids], f"{name}_rows")
        else:
            result = _look_up(build, (stored, scales), ids, table, name)
        replace_value(gather.outputs[0], result)
        return relative_error(matrix, quantized * scales[:, None])


def _moves_data(value: ir.Value) -> ir.Node | None:
    """Return the Reshape or Transpose that makes `value`, if it is its input's only reader."""
    node = value.producer()
    if not (is_op(node, "Reshape") or is_op(node, "Transpose")) or node is None:
        return None
    return node if only_consumer(value) is not None else None


def _is_large_table(table: ir.Value, gather: ir.Node) -> bool:
    axis, shape = gather.attributes.get("axis"), sizes(table)
    return (
        table.is_initializer()
        and shape is not None
        and len(shape) == 2
        and (axis is None or axis.as_int() == 0)
        and (shape[0] or 0) * (shape[1] or 0) >= (1 << 16)
        and table.dtype == ir.DataType.FLOAT
    )


def _look_up(
    build: NodeBuilder,
    stored: tuple[ir.Value, Float32Array],
    ids: ir.Value | None,
    table: ir.Value,
    name: str,
) -> ir.Value:
    """Look up quantized rows and their scales, and multiply."""
    quantized, scales = stored
    rows = build.node("Gather", [quantized, ids], f"{name}_int8")
    scale = build.initializer(f"{table.name}_scale", scales[:, None])
    row_scales = build.node("Gather", [scale, ids], f"{name}_scale")
    as_float = build.node("Cast", [rows], f"{name}_cast", {"to": int(ir.DataType.FLOAT)})
    return build.node("Mul", [as_float, row_scales], f"{name}_dequantize")
