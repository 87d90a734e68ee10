"""Linear layers of a graph: every product with a constant matrix, found once for all methods."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from mmedge.converters.passes.matching import (
    constant,
    is_op,
    only_consumer,
    perm_of,
    producer,
    rank,
    sizes,
)
from mmedge.errors import QuantizationError
from mmedge.specs import Array, Compare, Float32Array

__all__ = ["COMPARE_KEY", "EXCLUDED", "Linear", "WeightedNode", "find_linears", "makes_embedding"]

COMPARE_KEY = "mmedge.compare"
"""Metadata key of a graph output: its comparison with the reference (mmedge.Compare)."""

EXCLUDED = "among the most sensitive layers"
"""Reason of layers excluded by a method's `keep`; see sensitivity."""

# Ops allowed between the layer that makes the embedding and the output.
_LIGHT = frozenset(
    {"Add", "Div", "Mul", "ReduceL2", "Clip", "Max", "Expand", "Squeeze", "Identity"}
)


@dataclass(frozen=True)
class WeightedNode:
    """A node that computes with a constant weight.

    Attributes:
        node: The node.
        weight: The constant.
    """

    node: ir.Node
    weight: ir.Value

    @property
    def x(self) -> ir.Value:
        """Input. Layers that read the same value (q, k and v) share it.

        It is what the node reads now: where a pass has replaced the layer before, its replacement.
        """
        x = self.node.inputs[0]
        assert x is not None  # noqa: S101, none is found without
        return x

    @property
    def name(self) -> str:
        """The weight's name without ".weight": the same in every layout of a role."""
        return (self.weight.name or "").removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out), as of a matrix product."""
        raise NotImplementedError

    def finite_weight(self) -> Array:
        """Return the weight as it is stored.

        Raises:
            QuantizationError: If it holds NaN or infinite values.
        """
        weight = constant(self.weight)
        if weight is None or not np.isfinite(weight).all():
            raise QuantizationError(
                f"Weight '{self.weight.name}' holds NaN or infinite values. "
                "Check the source model; int8 cannot represent them."
            )
        return weight


@dataclass(frozen=True)
class Linear(WeightedNode):
    """One linear layer: output = x @ matrix + bias, x (..., in).

    Attributes:
        node: The MatMul or Gemm.
        weight: The constant matrix, (in, out), or (out, in) where `transposed`.
        transposed: Whether the weight is stored (out, in): a Gemm says so, a Transpose stands
            between it and a MatMul (the head of a decoder that shares its embedding table).
        bias: Added to the product, or None.
        output: The value after the bias.
    """

    transposed: bool
    bias: ir.Value | None
    output: ir.Value

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        rows, columns = (size or 0 for size in sizes(self.weight) or (0, 0))
        return (columns, rows) if self.transposed else (rows, columns)

    def matrix(self) -> Float32Array:
        """Return the weight as (in, out) float32.

        Raises:
            QuantizationError: If it holds NaN or infinite values.
        """
        weight = self.finite_weight()
        return np.asarray(weight.T if self.transposed else weight, np.float32)


def find_linears(graph: ir.Graph) -> list[Linear]:
    """Return every product with a constant float32 matrix, in the graph's order.

    A weight that several products read gives several layers of one name.
    """
    found: list[Linear] = []
    for node in graph:
        if not (is_op(node, "MatMul") or is_op(node, "Gemm")):
            continue
        x, weight = node.inputs[0], node.inputs[1]
        turn = producer(weight, "Transpose") if is_op(node, "MatMul") else None
        if turn is not None and perm_of(turn) == (1, 0):
            weight = turn.inputs[0]
        if x is None or weight is None or rank(weight) != 2 or not weight.is_initializer():
            continue
        if x.is_initializer() or weight.dtype != ir.DataType.FLOAT:
            continue
        if is_op(node, "MatMul"):
            transposed = weight is not node.inputs[1]
            found.append(_with_bias(Linear(node, weight, transposed, None, node.outputs[0])))
        elif (linear := _plain_gemm(node, weight)) is not None:
            found.append(linear)
    return found


def _plain_gemm(node: ir.Node, weight: ir.Value) -> Linear | None:
    """Return a Gemm as a linear layer, unless it scales or transposes its input."""
    plain = all(
        (attribute := node.attributes.get(name)) is None or attribute.as_float() == 1.0
        for name in ("alpha", "beta")
    )
    trans_a, trans_b = node.attributes.get("transA"), node.attributes.get("transB")
    if not plain or (trans_a is not None and trans_a.as_int() != 0):
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    transposed = trans_b is not None and trans_b.as_int() == 1
    return Linear(node, weight, transposed, bias, node.outputs[0])


def _with_bias(linear: Linear) -> Linear:
    """Absorb the addition of a bias after a product without other readers."""
    add = only_consumer(linear.output, "Add")
    if add is None:
        return linear
    bias = add.inputs[1] if add.inputs[0] is linear.output else add.inputs[0]
    if bias is None or not bias.is_initializer() or sizes(bias) != (linear.shape[1],):
        return linear
    return replace(linear, bias=bias, output=add.outputs[0])


def makes_embedding(linear: Linear) -> bool:
    """Return whether only a bias or a normalization is between a layer and an embedding.

    An embedding is an output that is compared by rows (see COMPARE_KEY). Logits and boxes are not.
    """
    reached, pending = False, [linear.node.outputs[0]]
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            if value.metadata_props.get(COMPARE_KEY) != Compare.ROWS.value:
                return False
            reached = True
        for reader in value.consumers():
            if reader.op_type not in _LIGHT:
                return False
            pending.extend(reader.outputs)
    return reached
