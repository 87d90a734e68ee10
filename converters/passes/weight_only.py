"""Weight-only quantization of linear layers and embedding tables.

Forms:

- operators: com.microsoft.MatMulNBits and GatherBlockQuantized, 2, 4 or 8 bits, scales stored in
  fp16 and cast when the graph is loaded. MatMulNBits runs at accuracy level 4: it quantizes each
  group of each row of an activation to int8 for the product. One row at 4 bits and groups of 128
  then takes a fifth of the time of float32 on an x86 CPU with VNNI, and fifty rows half of it, at
  an error of 0.6 % in the product, a tenth of that of 4-bit weights; a row's output does not depend
  on other rows. At level 0, exact float32 products, 4 bits are no faster than float32,
  and 2 and 8 bits, which have no kernel there, ten times slower.
- blocked: DequantizeLinear with a block size before a float32 MatMul, 4 bits (int4, or uint4 with
  zero points) or 8, opset 21: for engines. TensorRT takes it at 4 bits, symmetric.
  Only layers whose inputs fall into several whole groups: an engine builder silently folds a single
  group to float. Tables, and the layer that makes the embedding, stay in float32.

Sources: ONNX Runtime, `ContribOperators.md`, com.microsoft.MatMulNBits and GatherBlockQuantized;
ONNX operator DequantizeLinear-21.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mmedge.converters.numerics.group_rounding import (
    Bits,
    GroupedValues,
    gptq,
    hqq,
    placeholder_values,
    relative_error,
    round_to_nearest,
)
from mmedge.converters.passes.building import replace_value
from mmedge.converters.passes.linears import EXCLUDED, Linear, find_linears, makes_embedding
from mmedge.converters.passes.matching import constant, is_op, rank, sizes
from mmedge.converters.passes.weight_only_nodes import (
    StoredWeight,
    WeightBuilder,
    write_blocked,
    write_lookup,
    write_nbits,
)
from mmedge.errors import QuantizationError
from mmedge.specs import Array, Float32Array

__all__ = [
    "QuantizedWeight",
    "Rounding",
    "WeightOnlyLinears",
    "embedding_makers",
    "moment_inputs",
]

Rounding: TypeAlias = Literal["rtn", "gptq", "hqq"]

_SMALLEST_TABLE = 1 << 16
_SMALLEST_GROUP = 16
_LARGEST_BLOCK = 128  # of TensorRT
_LARGEST_GROUP_2_BITS = 256  # of ONNX Runtime's kernel
_OPSET = 21
# Beside GroupNormalization, opset 21 only lets operators of opset 20 take more types.
_NOT_OPSET_21 = "GroupNormalization"


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """Report of one weight.

    Attributes:
        name: As Linear.name; of a table, its name without ".weight".
        op_type: "MatMul", "Gemm" or "Gather".
        shape: (in, out); of a table, (rows, columns).
        bits: Of a weight; 32 where it was left in float.
        group_size: Weights that share a scale; 0 where it was left in float.
        size_bytes: Size of quantized values, scales and zero points, or of the float weight.
        weight_error: ||W - Wq|| / ||W||; None where it was left in float, or only the size counts.
        reason: Why it was left in float, or "".
    """

    name: str
    op_type: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    size_bytes: int
    weight_error: float | None
    reason: str


def moment_inputs(model: ir.Model, keep: Collection[str] = ()) -> list[str]:
    """Return the names of the activations whose second moments GPTQ needs, in order, each once.

    Args:
        model: The graph.
        keep: Names of excluded linear layers.
    """
    tied = _tables(model.graph)
    return list(
        dict.fromkeys(
            linear.x.name or ""
            for linear in find_linears(model.graph)
            if linear.name not in keep and linear.weight not in tied and not makes_embedding(linear)
        )
    )


def embedding_makers(graph: ir.Graph) -> frozenset[str]:
    """Return the names of the layers that make the embedding and share no table's weight.

    They take 8 bits, whatever the others take.
    """
    tied = _tables(graph)
    return frozenset(
        linear.name
        for linear in find_linears(graph)
        if linear.weight not in tied and makes_embedding(linear)
    )


class WeightOnlyLinears(ir.passes.InPlacePass):
    """Write the weights of linear layers, and large embedding tables, in few bits.

    Requires: float32 weights as initializers; blocked: opset 20 or later.
    Ensures: inputs and outputs unchanged in name, dtype and shape; activations in float32.
    """

    def __init__(
        self,
        form: Literal["operators", "blocked"],
        *,
        bits: Bits = 4,
        group_size: int = 32,
        symmetric: bool = True,
        rounding: Rounding | Literal["none"] = "rtn",
        moments: Mapping[str, Array] | None = None,
        bits_of: Mapping[str, Bits] | None = None,
        keep: Collection[str] = (),
    ) -> None:
        """Choose form and method.

        Args:
            form: See the module.
            bits: Of a weight. The layer that makes the embedding takes 8, unless its weight is a
                table too: it is small, and its error would go straight into the output.
            group_size: Weights of one output that share a scale, a power of two from 16 on; smaller
                where a layer has fewer inputs.
            symmetric: Without zero points.
            rounding: See weight_only.py. Tables, and what shares their weight, are never "gptq":
                a lookup has no second moment. "none" writes placeholder values at once:
                for the size of the graph.
            moments: For "gptq": by tensor name, for every name in `moment_inputs`.
            bits_of: Names of linear layers and tables with bits of their own.
            keep: Names of excluded linear layers and tables.

        Raises:
            QuantizationError: If the form does not have such bits or groups.
        """
        super().__init__()
        self._form = form
        self._bits: Bits = bits
        self._group_size = group_size
        self._symmetric = symmetric
        self._rounding = rounding
        self._moments = moments or {}
        self._bits_of = dict(bits_of or {})
        self._keep = frozenset(keep)
        self._stored: dict[ir.Value, StoredWeight] = {}
        self._weights: list[QuantizedWeight] = []
        for asked in {bits, *self._bits_of.values()}:
            _check_form(form, asked, group_size)

    @property
    def weights(self) -> Sequence[QuantizedWeight]:
        """Report of each weight in the last call, in the graph's order, tables last."""
        return tuple(self._weights)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Quantize every linear layer and embedding table of the main graph.

        Raises:
            QuantizationError: If nothing can be quantized, a moment is missing, or a weight is not
                finite; the tensor is named.
        """
        graph = model.graph
        self._stored, self._weights = {}, []
        if self._form == "blocked":
            _raise_opset(model)
        else:
            graph.opset_imports.setdefault("com.microsoft", 1)
        tables = _tables(graph)
        for linear in find_linears(graph):
            self._linear(graph, linear, tied=linear.weight in tables)
        for table, gathers in tables.items():
            self._table(graph, table, gathers)
        if all(weight.bits == 32 for weight in self._weights):
            reasons = ", ".join(sorted({weight.reason for weight in self._weights}))
            raise QuantizationError(
                f"No weight can be quantized{': ' if reasons else ''}{reasons}. "
                "Leave this role in float."
            )
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)

    def _linear(self, graph: ir.Graph, linear: Linear, *, tied: bool) -> None:
        last = makes_embedding(linear) and not tied
        bits: Bits = self._bits_of.get(linear.name, 8 if last else self._bits)
        group_size = self._group_for(linear.shape[0], bits)
        reason = ""
        if linear.name in self._keep:
            reason = EXCLUDED
        elif self._form == "blocked" and makes_embedding(linear):
            reason = "makes the embedding"
        elif group_size is None:
            reason = f"{linear.shape[0]} inputs are not several whole groups"
        if reason or group_size is None:
            self._left(linear.name, linear.node.op_type, linear.weight, reason)
            return
        if linear.weight not in self._stored:
            matrix = _named_matrix(linear)
            quantized = self._quantize(linear, matrix, bits, group_size, tied=tied or last)
            self._stored[linear.weight] = StoredWeight(quantized, linear.weight.name or "weight")
            self._done(linear.name, linear.node.op_type, linear.shape, matrix, quantized)
        stored = self._stored[linear.weight]
        stem = linear.node.name or linear.node.outputs[0].name or "linear"
        build = WeightBuilder(graph, linear.node)
        if self._form == "operators":
            replace_value(linear.output, write_nbits(build, linear, stored, stem))
        else:
            replace_value(linear.output, write_blocked(build, linear, stored, stem))

    def _quantize(
        self, linear: Linear, matrix: Float32Array, bits: Bits, group_size: int, *, tied: bool
    ) -> GroupedValues:
        if self._rounding != "gptq" or tied:
            return self._without_moment(matrix, bits, group_size)
        moment = self._moments.get(linear.x.name or "")
        if moment is None:
            raise QuantizationError(
                f"No second moment for '{linear.x.name}', which layer '{linear.name}' reads. "
                "Collect moments for all moment_inputs, or round to nearest."
            )
        try:
            return gptq(matrix, moment, bits, group_size, symmetric=self._symmetric)
        except QuantizationError as error:
            raise QuantizationError(f"Layer '{linear.name}': {error}") from error

    def _without_moment(self, matrix: Float32Array, bits: Bits, group_size: int) -> GroupedValues:
        fit = {"hqq": hqq, "none": placeholder_values}.get(self._rounding, round_to_nearest)
        return fit(matrix, bits, group_size, symmetric=self._symmetric)

    def _table(self, graph: ir.Graph, table: ir.Value, gathers: Sequence[ir.Node]) -> None:
        rows, columns = (size or 0 for size in sizes(table) or (0, 0))
        name = (table.name or "").removesuffix(".weight")
        bits: Bits = self._bits_of.get(name, self._bits)
        group_size = _whole_group(columns, self._group_size)
        stored = self._stored.get(table)
        if stored is not None and (
            stored.quantized.values.shape[0] != rows or columns % stored.quantized.group_size
        ):
            stored = None
        reason = ""
        if name in self._keep:
            reason = EXCLUDED
        elif self._form == "blocked":
            reason = "engines look up in float"
        elif group_size is None and stored is None:
            reason = f"rows of {columns} are not whole groups"
        if reason or group_size is None:
            self._left(name, "Gather", table, reason)
            return
        if stored is None:
            matrix = _finite(table).T
            quantized = self._without_moment(matrix, bits, group_size)
            stored = StoredWeight(
                quantized, f"{table.name}_rows" if table in self._stored else table.name
            )
            self._done(name, "Gather", (rows, columns), matrix, quantized)
        for gather in gathers:
            build = WeightBuilder(graph, gather)
            stem = gather.name or gather.outputs[0].name or "gather"
            replace_value(gather.outputs[0], write_lookup(build, gather, stored, stem))

    def _group_for(self, inputs: int, bits: Bits) -> int | None:
        """Return the group size of a layer, or None if the form has none for it."""
        size = min(self._group_size, _LARGEST_GROUP_2_BITS) if bits == 2 else self._group_size
        if self._form == "blocked":
            whole = _whole_group(inputs, size)
            return whole if whole is None or whole < inputs else _whole_group(inputs, inputs // 2)
        while size > _SMALLEST_GROUP and size // 2 >= inputs:
            size //= 2
        return size

    def _left(self, name: str, op_type: str, weight: ir.Value, reason: str) -> None:
        rows, columns = (size or 0 for size in sizes(weight) or (0, 0))
        self._weights.append(
            QuantizedWeight(name, op_type, (rows, columns), 32, 0, 4 * rows * columns, None, reason)
        )

    def _done(
        self,
        name: str,
        op_type: str,
        shape: tuple[int, int],
        matrix: Float32Array,
        quantized: GroupedValues,
    ) -> None:
        error = None if self._rounding == "none" else relative_error(matrix, quantized)
        size_bytes = quantized.size_bytes
        self._weights.append(
            QuantizedWeight(
                name, op_type, shape, quantized.bits, quantized.group_size, size_bytes, error, ""
            )
        )


def _whole_group(inputs: int, largest: int) -> int | None:
    """Return the largest power of two up to `largest` that divides `inputs`, None below 16."""
    size = min(largest, inputs & -inputs)
    size = 1 << (size.bit_length() - 1) if size else 0
    return size if size >= _SMALLEST_GROUP else None


def _tables(graph: ir.Graph) -> dict[ir.Value, list[ir.Node]]:
    """Return the embedding tables to quantize, with their lookups."""
    found: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        table = node.inputs[0] if is_op(node, "Gather") else None
        axis = node.attributes.get("axis")
        if table is None or not table.is_initializer() or rank(table) != 2:
            continue
        if table.dtype != ir.DataType.FLOAT or (axis is not None and axis.as_int() != 0):
            continue
        rows, columns = (size or 0 for size in sizes(table) or (0, 0))
        if rows * columns >= _SMALLEST_TABLE:
            found.setdefault(table, []).append(node)
    return found


def _named_matrix(linear: Linear) -> Float32Array:
    weight = _finite(linear.weight)
    return weight.T if linear.transposed else weight


def _finite(weight: ir.Value) -> Float32Array:
    array = constant(weight)
    if array is None or not np.isfinite(array).all():
        raise QuantizationError(
            f"Weight '{weight.name}' holds NaN or infinite values. "
            "Check the source model; quantized values cannot represent them."
        )
    return np.asarray(array, np.float32)


def _check_form(form: str, bits: int, group_size: int) -> None:
    if form == "blocked" and (bits == 2 or group_size > _LARGEST_BLOCK):
        raise QuantizationError(
            f"The blocked form: got {bits} bits in groups of {group_size}, expected 4 or 8 bits "
            f"in groups of 16 to {_LARGEST_BLOCK}, which is what engines take."
        )


def _raise_opset(model: ir.Model) -> None:
    """Bring the graph to the opset that has 4-bit types and block sizes."""
    graph = model.graph
    opset = graph.opset_imports.get("", 0)
    if opset >= _OPSET:
        return
    if opset < _OPSET - 1 or any(is_op(node, _NOT_OPSET_21) for node in graph):
        raise QuantizationError(
            f"The blocked form needs opset {_OPSET}: got opset {opset}"
            f"{f' with {_NOT_OPSET_21}' if opset == _OPSET - 1 else ''}. "
            f"Export the model at opset {_OPSET}."
        )
    graph.opset_imports[""] = _OPSET
    model.ir_version = max(model.ir_version, 10)
