"""Report of the layers of a graph, made before quantization."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from mmedge.bundle.nodes import NodeEntry
from mmedge.converters.numerics.int8_rounding import Range
from mmedge.converters.passes.convolutions import find_convolutions, float_reason
from mmedge.converters.passes.float16 import Fp32Op
from mmedge.converters.passes.int8 import quantizable_tables
from mmedge.converters.passes.linears import EXCLUDED, find_linears, makes_embedding
from mmedge.converters.passes.matching import sizes

__all__ = ["Layer", "describe_layers", "plan_layers", "report_fp32_ops"]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of the float graph.

    Attributes:
        name: Linear.name, or that of a table.
        op_type: Of its node.
        shape: (in, out), or (rows, columns) of a table.
        x: Name of the value that it reads; "" for a table.
        reason: Reason to stay in float, else "".
    """

    name: str
    op_type: str
    shape: tuple[int, int]
    x: str
    reason: str


def plan_layers(
    graph: ir.Graph, keep: Collection[str], *, convolutions: bool = False
) -> tuple[Layer, ...]:
    """Return every layer with weights, with its reason to stay in float, in graph order.

    Args:
        graph: In float.
        keep: Names of excluded layers.
        convolutions: Whether the method takes convolutions.
    """
    found: dict[tuple[str, bool], Layer] = {}  # a tied table has the same name
    for name, lookups in quantizable_tables(graph).items():
        rows, columns = (size or 1 for size in sizes(lookups[0].inputs[0]) or (1, 1))
        found[name, True] = Layer(name, "Gather", (rows, columns), "", _exclusion(name, keep))
    for linear in find_linears(graph):
        reason = "makes the embedding" if makes_embedding(linear) else _exclusion(linear.name, keep)
        x = linear.x.name or ""
        layer = Layer(linear.name, linear.node.op_type, linear.shape, x, reason)
        found[linear.name, False] = layer
    for one in find_convolutions(graph):
        reason = "a convolution; the method takes matrix products"
        if convolutions:
            reason = float_reason(one, keep, EXCLUDED)
        found[one.name, False] = Layer(one.name, "Conv", one.shape, one.x.name or "", reason)
    return tuple(found.values())


def _exclusion(name: str, keep: Collection[str]) -> str:
    return EXCLUDED if name in keep else ""


def describe_layers(
    layers: Sequence[Layer],
    precision: str,
    weight_errors: Mapping[str, float],
    ranges: Mapping[str, Range],
) -> tuple[NodeEntry, ...]:
    """Return the report of each layer.

    Args:
        layers: Before.
        precision: Of those that were quantized.
        weight_errors: Of those that were quantized, by name.
        ranges: By the name of the value read, empty where none were calibrated.
    """
    entries = []
    for layer in layers:
        quantized = layer.name in weight_errors
        found = ranges.get(layer.x) if quantized else None
        entries.append(
            NodeEntry(
                name=layer.name,
                op_type=layer.op_type,
                precision=precision if quantized else "float32",
                shape=layer.shape,
                low=None if found is None else found.low,
                high=None if found is None else found.high,
                weight_error=weight_errors.get(layer.name),
                reason="" if quantized else layer.reason or "the method does not take it",
            )
        )
    return tuple(entries)


def report_fp32_ops(
    graph: ir.Graph, fp32_ops: Sequence[Fp32Op], precision: str
) -> tuple[NodeEntry, ...]:
    """Return the report of each layer of a narrowed graph with fp32 ops."""
    fp32 = {op.name: op.reason for op in fp32_ops}
    names = {linear.name: linear.node.name or "" for linear in find_linears(graph)}
    return tuple(
        NodeEntry(
            name=layer.name,
            op_type=layer.op_type,
            precision="float32" if names.get(layer.name) in fp32 else precision,
            shape=layer.shape,
            reason=fp32.get(names.get(layer.name, ""), ""),
        )
        for layer in plan_layers(graph, ())
    )
