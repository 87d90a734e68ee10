"""Shared graph-writing functions of the passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count

import numpy as np
import onnx_ir as ir

from mmedge.converters.passes.matching import constant
from mmedge.specs import Array

__all__ = ["NodeBuilder", "add_initializer", "replace_value"]


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
    """Replace `old` by `new`, which takes over name, type, shape and metadata.

    Data about a value, such as its range, is stored by name and so holds for `new` too.
    """
    new.type, new.shape = old.type, old.shape
    new.metadata_props.update(old.metadata_props)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    new.name, old.name = old.name, f"{old.name}_replaced"


class NodeBuilder:
    """Adds nodes above one node of a graph, and initializers to the graph."""

    def __init__(self, graph: ir.Graph, below: ir.Node) -> None:
        self._graph = graph
        self._below = below

    def insert(self, node: ir.Node) -> None:
        """Add a node."""
        self._graph.insert_before(self._below, node)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Mapping[str, int] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Add a node and return its only output."""
        node = ir.node(op_type, inputs, attributes or {}, name=name, domain=domain)
        node.outputs[0].name = f"{name}_out"
        self.insert(node)
        return node.outputs[0]

    def initializer(self, name: str, array: Array) -> ir.Value:
        """Register a constant, or return an equal one of that name made by a tied weight."""
        free, taken = name, count(1)
        while (known := self._graph.initializers.get(free)) is not None:
            held = constant(known)
            if held is not None and held.dtype == array.dtype and np.array_equal(held, array):
                return known
            free = f"{name}_{next(taken)}"
        return add_initializer(self._graph, free, array)
