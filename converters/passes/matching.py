"""Predicates for matching graph patterns."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mmedge.specs import Array

__all__ = ["constant", "is_op", "only_consumer", "perm_of", "producer", "rank", "scalar", "sizes"]


def is_op(node: ir.Node | None, op_type: str, domain: str = "") -> bool:
    """Return whether `node` is that operator of that domain ("" is ONNX's own)."""
    return (
        node is not None
        and node.op_type == op_type
        and node.domain in ({"", "ai.onnx"} if not domain else {domain})
    )


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the producer of `value` if it is of that type, else None."""
    node = None if value is None else value.producer()
    return node if is_op(node, op_type) else None


def only_consumer(value: ir.Value, op_type: str | None = None) -> ir.Node | None:
    """Return the only node that reads `value`, else None."""
    consumers = list(value.consumers())
    if len(consumers) != 1 or value.is_graph_output():
        return None
    return consumers[0] if op_type is None or is_op(consumers[0], op_type) else None


def constant(value: ir.Value | None) -> Array | None:
    """Return the array of an initializer or Constant, or None if the value is computed."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy())


def scalar(value: ir.Value | None) -> float | None:
    """Return a constant of one element as a float, or None."""
    if value is None or value.is_graph_input():
        return None
    if value.shape is not None and any(
        not isinstance(size, int) or size > 1 for size in value.shape
    ):
        return None  # decided by the shape, so that large external weights are not read
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def perm_of(node: ir.Node) -> tuple[int, ...]:
    """Return a Transpose's permutation."""
    attribute = node.attributes.get("perm")
    return () if attribute is None else tuple(attribute.as_ints())


def sizes(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """Return a value's shape with None for every axis that is not a fixed int."""
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def rank(value: ir.Value | None) -> int | None:
    """Return a value's number of axes, or None where it is unknown."""
    return None if value is None or value.shape is None else len(value.shape)
