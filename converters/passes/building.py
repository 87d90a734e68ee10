"""Adding to a graph: what the passes share when they write."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mmedge.specs import Array

__all__ = ["add_initializer", "replace_value"]


def add_initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """Register a constant and return its value."""
    # Not ascontiguousarray, which makes one axis of none.
    tensor = ir.tensor(np.asarray(array, order="C"), name=name)
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(array.shape),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let everything that reads `old` read `new`, which takes over its type and shape.

    A graph output keeps its name.
    """
    new.type, new.shape = old.type, old.shape
    is_output = old.is_graph_output()
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if is_output:
        new.name, old.name = old.name, f"{old.name}_replaced"
