"""Fusion of scaled dot-product attention into one Attention node of opset 23.

ONNX Runtime's CPU kernel of that operator was measured faster than com.microsoft.MultiHeadAttention
(a fifth at ViT-B/32's size), and faster than the nodes that it replaces.

Source: ONNX operator Attention-23.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mmedge.converters.passes.attention_pattern import DecomposedAttention, match_attention
from mmedge.converters.passes.building import add_initializer, replace_value
from mmedge.converters.passes.matching import constant, is_op, producer, rank, scalar

__all__ = ["FuseAttention", "raise_opset"]

# Masks a key as surely as -inf does (its exp is exactly 0 next to any real score), and leaves a row
# whose keys are all masked finite instead of NaN.
_MASKED = -1e30

_MOVES_DATA = frozenset({"Gather", "GatherND", "Squeeze", "Unsqueeze"})

_OPSET = 23
_IR_VERSION = 11  # the oldest that opset 23 goes with
# Between opsets 18 and 23 every other operator only took in more types or optional inputs.
_CHANGED_MEANING = frozenset({"GroupNormalization"})


class FuseAttention(ir.passes.InPlacePass):
    """Replace decomposed attention by Attention, and raise the graph to opset 23.

    Requires: attention as torch.onnx.export writes it below opset 23: scale on the queries and keys
        or on the scores, an additive mask or none, heads split by Reshape and Transpose or whole,
        keys and values joined to a past by Concat or not, one head for several queries or each.
    Ensures: the same numbers up to rounding. Anything else is unchanged, and so is a
        graph that holds an operator whose meaning changed before opset 23.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every match in the main graph."""
        if not _can_be_raised(model):
            return ir.passes.PassResult(model, modified=False)
        finite_masks: dict[ir.Value, ir.Value] = {}
        modified, with_past = False, False
        for node in list(model.graph):
            if is_op(node, "Softmax") and (found := match_attention(node)) is not None:
                _replace(model.graph, found, finite_masks)
                modified, with_past = True, with_past or found.past is not None
        if with_past:
            model.graph.sort()  # the joined past may be read above it
        if modified:
            raise_opset(model)
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def _can_be_raised(model: ir.Model) -> bool:
    return not any(node.op_type in _CHANGED_MEANING for node in model.graph)


def raise_opset(model: ir.Model) -> bool:
    """Raise a graph to opset 23; return whether it means the same there, else leave it."""
    if not _can_be_raised(model):
        return False
    model.graph.opset_imports[""] = max(_OPSET, model.graph.opset_imports[""])
    model.ir_version = max(_IR_VERSION, model.ir_version)
    return True


def _replace(
    graph: ir.Graph, found: DecomposedAttention, finite_masks: dict[ir.Value, ir.Value]
) -> None:
    last = found.output.producer()
    assert last is not None  # noqa: S101  # the matcher took it from its node
    bias = found.bias
    if bias is not None:
        bias = _finite(graph, bias, finite_masks)
    attributes: dict[str, int | float] = {"scale": found.scale}
    if found.merged:
        attributes.update(q_num_heads=found.heads, kv_num_heads=found.kv_heads)
    fused = ir.node(
        "Attention",
        [
            found.query,
            found.key,
            found.value,
            *((bias, *(found.past or ())) if bias or found.past else ()),
        ],
        attributes,
        name=f"{last.name}_attention",
        num_outputs=1 if found.past is None else 3,
    )
    result = fused.outputs[0]
    result.name = f"{found.output.name}_attention"
    graph.insert_before(last, fused)
    if rank(found.output) == 2:  # rows of all samples, one below the other
        last.replace_input_with(0, result)
    else:
        replace_value(found.output, result)
    for joined, made in zip(found.present or (), fused.outputs[1:], strict=True):
        replace_value(joined, made)


def _finite(graph: ir.Graph, bias: ir.Value, known: dict[ir.Value, ir.Value]) -> ir.Value:
    """Return the mask with -inf replaced by a large negative number, created once."""
    if bias not in known:
        known[bias] = _made_finite(graph, bias, known)
    return known[bias]


def _made_finite(graph: ir.Graph, bias: ir.Value, known: dict[ir.Value, ir.Value]) -> ir.Value:
    move = bias.producer()
    if move is not None and move.domain == "" and move.op_type in _MOVES_DATA:  # the row of a token
        source = move.inputs[0]
        finite_source = source if source is None else _finite(graph, source, known)
        if finite_source is source:
            return bias
        return _insert_twin(graph, move, [finite_source, *move.inputs[1:]])
    where = producer(bias, "Where")
    if where is None:
        return bias
    replacements: dict[int, ir.Value] = {}
    for at in (1, 2):
        fill = constant(where.inputs[at]) if scalar(where.inputs[at]) is not None else None
        if fill is not None and np.isneginf(fill).all():
            masked = np.full(fill.shape, _MASKED, dtype=fill.dtype)
            replacements[at] = add_initializer(graph, f"{bias.name}_masked", masked)
    if not replacements:
        return bias
    operands = [where.inputs[0], *(replacements.get(at, where.inputs[at]) for at in (1, 2))]
    return _insert_twin(graph, where, operands)


def _insert_twin(graph: ir.Graph, node: ir.Node, inputs: list[ir.Value | None]) -> ir.Value:
    """Add a copy of a node with other inputs, and return its output."""
    twin = ir.node(node.op_type, inputs, dict(node.attributes), name=f"{node.name}_finite")
    given, made = node.outputs[0], twin.outputs[0]
    made.name, made.type, made.shape = f"{given.name}_finite", given.type, given.shape
    graph.insert_after(node, twin)
    return made
