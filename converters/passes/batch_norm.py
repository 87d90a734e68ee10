"""Normalization after a convolution as part of its kernel and bias.

Over fixed statistics a batch norm is one factor and one summand for each channel. torch's exporter
folds BatchNormalization; what is written out as Mul and Add, such as the frozen batch norms of
detectors, it leaves, and other exporters leave both. Engines fold them in float, but not across the
Q/DQ of an int8 convolution.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mmedge.converters.passes.building import add_initializer, replace_value
from mmedge.converters.passes.matching import constant, is_op, only_consumer, sizes
from mmedge.specs import Array

__all__ = ["FoldBatchNorm"]


class FoldBatchNorm(ir.passes.InPlacePass):
    """Fold BatchNormalization, or Mul and Add by channel, into the convolution before it.

    Requires: constant float32 kernels, biases and statistics; a convolution without other readers,
        and a kernel that it alone reads.
    Ensures: the same numbers up to rounding. Anything else is unchanged.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every match in the main graph."""
        modified = False
        for node in list(model.graph):
            if is_op(node, "Conv"):
                while _fold(model.graph, node):
                    modified = True
        if modified:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def _fold(graph: ir.Graph, conv: ir.Node) -> bool:
    """Fold the node that reads a convolution; return whether it could be."""
    weight, (output,) = conv.inputs[1], conv.outputs
    reader, shape = only_consumer(output), sizes(weight)
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    if reader is None or weight is None or shape is None or shape[0] is None or len(shape) < 3:
        return False
    if any(v is not None and not _is_own(v) for v in (weight, bias)):
        return False
    affine = _affine(reader, output, shape[0], len(shape))
    kernel = None if affine is None else constant(weight)
    if affine is None or kernel is None:
        return False
    factor, summand = affine
    before = constant(bias)
    moved = np.zeros(shape[0]) if before is None else before.astype(np.float64) * factor
    spread = factor.reshape(-1, *(1,) * (len(shape) - 1))
    folded = _replace(graph, weight, (kernel * spread).astype(np.float32))
    name = (weight.name or "convolution").removesuffix(".weight") + ".bias"
    conv.replace_input_with(1, folded)
    new_bias = (moved + summand).astype(np.float32)
    if bias is not None:
        conv.replace_input_with(2, _replace(graph, bias, new_bias))
    else:
        free = name if name not in graph.initializers else f"{name}_folded"
        conv.resize_inputs(3)
        conv.replace_input_with(2, add_initializer(graph, free, new_bias))
    replace_value(reader.outputs[0], output)
    graph.remove(reader, safe=True)
    return True


def _is_own(value: ir.Value) -> bool:
    """Return whether a value is a float32 initializer with a single reader."""
    return value.is_initializer() and value.dtype == ir.DataType.FLOAT and len(value.uses()) == 1


def _replace(graph: ir.Graph, old: ir.Value, array: Array) -> ir.Value:
    """Register a constant in the place and under the name of another."""
    name = old.name or ""
    graph.initializers.pop(name)
    return add_initializer(graph, name, array)


def _affine(node: ir.Node, x: ir.Value, channels: int, rank: int) -> tuple[Array, Array] | None:
    """Return factor and summand (C,) float64 of a node that reads `x`, None for other nodes."""
    if is_op(node, "BatchNormalization") and len(node.outputs) == 1 and node.inputs[0] is x:
        constants = [constant(value) for value in node.inputs[1:5]]
        training = node.attributes.get("training_mode")
        if any(c is None or c.shape != (channels,) for c in constants) or (
            training is not None and training.as_int() != 0
        ):
            return None
        scale, shift, mean, variance = (np.asarray(c, np.float64) for c in constants)
        epsilon = node.attributes.get("epsilon")
        factor = scale / np.sqrt(variance + (1e-5 if epsilon is None else epsilon.as_float()))
        return factor, shift - mean * factor
    if not (is_op(node, "Mul") or is_op(node, "Add")):
        return None
    other = node.inputs[1] if node.inputs[0] is x else node.inputs[0]
    array = constant(other) if other is not None and other is not x else None
    if array is None or other is None or other.dtype != ir.DataType.FLOAT:
        return None
    by_channel = (channels, *(1,) * (rank - 2))
    if array.size != 1 and array.shape not in (by_channel, (1, *by_channel)):
        return None
    if array.ndim > rank:
        return None
    values = np.broadcast_to(array.astype(np.float64).reshape(-1), channels)
    ones = np.ones(channels)
    return (values, np.zeros(channels)) if is_op(node, "Mul") else (ones, values)
