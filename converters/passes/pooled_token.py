"""Earlier selection of the pooled token, which alone passes through the last block.

A dual encoder reads one token of its last hidden state. Everything after the last block's keys and
values works on each token by itself, so the selection of that token can move up to the last block's
query: the same output without the other tokens' query, output projection and MLP. Of attention in
another form (queries turned by their places, as EVA's) it moves up to the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mmedge.converters.passes.attention_pattern import DecomposedAttention, match_attention
from mmedge.converters.passes.building import add_initializer, replace_value
from mmedge.converters.passes.matching import constant, is_op, producer, rank, scalar, sizes
from mmedge.specs import Array

__all__ = ["SelectTokenEarly"]

_ELEMENTWISE = {"Add", "Sub", "Mul", "Div"}
_UNARY = {
    "Sigmoid",
    "Tanh",
    "Erf",
    "Relu",
    "Gelu",
    "Neg",
    "Exp",
    "Sqrt",
    "Identity",
    "Cast",
    "Silu",
}
_WINDOW = 400  # nodes looked at above the selection: more than any one block has


class SelectTokenEarly(ir.passes.InPlacePass):
    """Move the selection of one token above the last attention's query, or below that attention.

    Requires: a Gather of one index on axis 1, or a GatherND of (batch, token) pairs, as torch
        writes `x[:, 0]` and `x[arange, position]`; above it attention as torch.onnx.export writes
        it, or fused (FuseAttention), or else products with a constant matrix.
    Ensures: the same numbers up to rounding, attention written as it was. Where neither attention
        nor a product would be narrowed, nothing changes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Move every selection in the main graph."""
        modified = False
        for node in list(model.graph):
            if _selects_one_token(node):
                modified = _move_up(model.graph, node) or modified
        if modified:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def _selects_one_token(node: ir.Node) -> bool:
    shape = sizes(node.inputs[0]) if node.inputs else None
    if shape is None or len(shape) != 3:
        return False
    if is_op(node, "Gather"):
        axis = node.attributes.get("axis")
        return (
            axis is not None
            and axis.as_int() == 1
            and rank(node.inputs[1]) == 0  # an index of one axis keeps the token's axis
            and scalar(node.inputs[1]) is not None
        )
    dims = node.attributes.get("batch_dims")
    return (
        is_op(node, "GatherND")
        and (dims is None or dims.as_int() == 0)
        and _one_token_each(node.inputs[0], node.inputs[1])
    )


def _one_token_each(wide: ir.Value | None, pairs: ir.Value | None) -> bool:
    """Return whether the pairs are (0, token), (1, token), ... for every sample once."""
    concat = producer(pairs, "Concat")
    if wide is None or pairs is None or concat is None or len(concat.inputs) != 2:
        return False
    axis = concat.attributes.get("axis")
    column = producer(concat.inputs[0], "Unsqueeze")
    steps = None if column is None else producer(column.inputs[0], "Range")
    chosen, samples = sizes(pairs), sizes(wide)
    if chosen is None or samples is None or steps is None or axis is None:
        return False
    return (
        len(chosen) == 2
        and chosen[0] == samples[0]  # None where it is dynamic, whatever its name
        and axis.as_int() in (-1, 1)
        and all(rank(value) == 2 and (sizes(value) or ())[1] == 1 for value in concat.inputs)
        and (scalar(steps.inputs[0]), scalar(steps.inputs[2])) == (0.0, 1.0)
    )


def _narrowable_inputs(node: ir.Node) -> tuple[int, ...] | None:
    """Return the inputs that may hold one token instead of all, or None for other nodes."""
    result: tuple[int, ...] | None = None
    if is_op(node, "Attention"):
        plain = rank(node.outputs[0]) == rank(node.inputs[0]) == 3 and not _is_causal(node)
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        result = (0,) if plain and _is_cuttable(mask) else None
    elif rank(node.outputs[0]) != 3:
        result = None
    elif is_op(node, "LayerNormalization"):
        axis = node.attributes.get("axis")
        result = (0,) if axis is None or axis.as_int() in (-1, 2) else None
    elif is_op(node, "MatMul"):
        result = (0,) if rank(node.inputs[1]) == 2 else None
    elif node.op_type in _UNARY and is_op(node, node.op_type):
        result = (0,)
    elif node.op_type in _ELEMENTWISE and is_op(node, node.op_type):
        ranks = [rank(value) for value in node.inputs]
        wide = tuple(at for at, axes in enumerate(ranks) if axes == 3)
        # A constant of three axes would be cut as well (position embeddings): unchanged, as are
        # operands whose rank is not known, and those that are broadcast over samples or tokens.
        whole = all(
            not _is_constant(node.inputs[at])
            and (sizes(node.inputs[at]) or ())[:2] == (sizes(node.outputs[0]) or ())[:2]
            for at in wide
        )
        result = wide if wide and whole and all(axes in (0, 1, 3) for axes in ranks) else None
    return result


def _is_causal(attention: ir.Node) -> bool:
    """Return whether attention is causal: by the attribute, or with a cache."""
    causal = attention.attributes.get("is_causal")
    return (causal is not None and causal.as_int() != 0) or any(attention.inputs[4:])


def _is_cuttable(mask: ir.Value | None) -> bool:
    """Return whether a mask is absent, or (B or 1, 1, S, L) with a batch axis that is named."""
    if mask is None:
        return True
    if mask.shape is None or len(mask.shape) != 4 or mask.shape[1] != 1 or mask.shape[2] == 1:
        return False
    batch = mask.shape[0]
    return isinstance(batch, int) or batch.value is not None


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and (value.is_initializer() or constant(value) is not None)


@dataclass(frozen=True)
class _QueryPath:
    """Decomposed attention, and its nodes from the query to the output, in the graph's order."""

    found: DecomposedAttention
    path: tuple[ir.Node, ...]


def _attentions(nodes: Sequence[ir.Node]) -> dict[ir.Node, _QueryPath]:
    """Return the decomposed attentions among some nodes, by the node that makes their output."""
    result: dict[ir.Node, _QueryPath] = {}
    for node in nodes:
        found = match_attention(node) if is_op(node, "Softmax") else None
        last = None if found is None else found.output.producer()
        if found is None or not found.plain or last is None or not _is_cuttable(found.bias):
            continue
        above = _above(last, {found.query, found.key, found.value, found.bias})
        wide = {found.query}
        path = []
        for step in nodes:
            if step in above and any(value in wide for value in step.inputs):
                path.append(step)
                wide.update(step.outputs)
        # A query that is its own key as well would be cut in both places.
        if found.query not in (found.key, found.value) and path and path[-1] is last:
            result[last] = _QueryPath(found, tuple(path))
    return result


def _above(last: ir.Node, stops: set[ir.Value | None]) -> set[ir.Node]:
    """Return the nodes from some values down to `last`."""
    seen, pending = {last}, [last]
    while pending:
        for value in pending.pop().inputs:
            node = None if value is None or value in stops else value.producer()
            if node is not None and node not in seen and not is_op(node, "Shape"):
                seen.add(node)
                pending.append(node)
    return seen


def _move_up(graph: ir.Graph, select: ir.Node) -> bool:
    order = list(graph)
    at = order.index(select)
    attentions = _attentions(order[max(0, at - _WINDOW) : at])
    narrowed: dict[ir.Node, tuple[int, ...]] = {}
    uses: set[tuple[ir.Node, int]] = {(select, 0)}
    # Upwards: a node is narrowed when all of its readers need only the one token.
    for node in reversed(order[max(0, at - _WINDOW) : at]):
        if len(node.outputs) != 1 or node.outputs[0].is_graph_output():
            continue
        readers = [(use.node, use.idx) for use in node.outputs[0].uses()]
        if not readers or any(reader not in uses for reader in readers):
            continue
        if node in attentions:
            narrowed[node] = ()
            uses.update(
                (first, 0)
                for first in attentions[node].path
                if first.inputs[0] is attentions[node].found.query
            )
            continue
        inputs = _narrowable_inputs(node)
        if inputs is not None:
            narrowed[node] = inputs
            uses.update((node, index) for index in inputs)
    saved = ("Attention", "MatMul")
    if not any(node in attentions or any(is_op(node, op) for op in saved) for node in narrowed):
        return False
    token = _Token(graph, select)
    for node in [node for node in order[:at] if node in narrowed]:
        if node in attentions:
            token.narrow_attention(attentions[node])
        else:
            token.narrow(node, narrowed[node])
    source = select.inputs[0]
    assert source is not None  # noqa: S101  # checked by _selects_one_token
    squeezed = token.add("Squeeze", [token.cut(source), token.axis], sizes=None)
    replace_value(select.outputs[0], squeezed)
    return True


class _Token:
    """Builds the one-token twins of wide values."""

    def __init__(self, graph: ir.Graph, select: ir.Node) -> None:
        self._graph = graph
        self._select = select
        self._twins: dict[ir.Value, ir.Value] = {}
        self._stem = select.name or select.outputs[0].name or "token"
        self._count = 0
        self.axis = self._initializer("axis", np.array([1], np.int64))
        index = select.inputs[1]
        if is_op(select, "Gather"):
            position = int(scalar(index) or 0)
            self._index: ir.Value = self._initializer("index", np.array([position], np.int64))
        else:  # (B, 2) pairs -> (B, 1, 2), so that the token axis stays
            self._index = self.add("Unsqueeze", [index, self.axis], sizes=None)

    def narrow(self, node: ir.Node, inputs: tuple[int, ...]) -> None:
        """Make the twin of `node` that reads one token."""
        operands = list(node.inputs)
        for at in inputs:
            wide = operands[at]
            assert wide is not None  # noqa: S101  # only inputs that are there are listed
            operands[at] = self.cut(wide)
        if is_op(node, "Attention") and len(operands) > 3 and operands[3]:
            operands[3] = self._cut_bias(operands[3])
        twin = ir.node(
            node.op_type,
            operands,
            dict(node.attributes.items()),
            domain=node.domain,
            name=f"{node.name}_token",
        )
        wide_out, out = node.outputs[0], twin.outputs[0]
        out.name, out.type = f"{wide_out.name}_token", wide_out.type
        if wide_out.shape is not None:
            out.shape = ir.Shape([wide_out.shape[0], 1, wide_out.shape[2]])
        self._graph.insert_before(self._select, twin)
        self._twins[wide_out] = out

    def narrow_attention(self, attention: _QueryPath) -> None:
        """Make the twins of the nodes between an attention's query and its output."""
        found = attention.found
        twins = {found.query: self.cut(found.query)}
        if found.bias is not None:
            twins[found.bias] = self._cut_bias(found.bias)
        # The heads are split first, and merged by the last two nodes.
        token_first = {attention.path[0], *attention.path[-2:]}
        for node in attention.path:
            operands = [
                value if value is None else twins.get(value, value) for value in node.inputs
            ]
            wide = node.outputs[0]
            shape = None if wide.shape is None else list(wide.shape)
            if shape is not None:
                # (B, H, S, x) inside; (B, S, H, d) and (B, S, H * d) where heads are moved.
                shape[1 if node in token_first else 2] = 1
            attributes = dict(node.attributes.items())
            if is_op(node, "Reshape"):
                attributes.pop("allowzero", None)  # 0 copies the batch axis
                split = (sizes(wide) or ())[2:]
                target = np.array([0, 1, *split], np.int64)
                operands[1] = self._initializer(f"{node.name}_shape", target)
            twin = ir.node(node.op_type, operands, attributes, name=f"{node.name}_token")
            out = twin.outputs[0]
            out.name, out.type = f"{wide.name}_token", wide.type
            out.shape = None if shape is None else ir.Shape(shape)
            self._graph.insert_before(self._select, twin)
            twins[wide] = out
        self._twins[found.output] = twins[found.output]

    def cut(self, value: ir.Value) -> ir.Value:
        """Return (B, 1, D) of a (B, S, D) value: its twin, or a selection from it."""
        if value not in self._twins:
            shape = None if value.shape is None else [value.shape[0], 1, value.shape[2]]
            if is_op(self._select, "Gather"):
                self._twins[value] = self.add("Gather", [value, self._index], shape, axis=1)
            else:
                self._twins[value] = self.add("GatherND", [value, self._index], shape)
            self._twins[value].type = value.type
        return self._twins[value]

    def _cut_bias(self, bias: ir.Value) -> ir.Value:
        """Return (B or 1, 1, 1, L) of a mask (B or 1, 1, S, L)."""
        row = self._cut_row(bias)
        row.type = bias.type
        pooled = self._select.outputs[0]
        if bias.shape is not None and pooled.shape is not None:
            # One mask for all texts has a row for each text once their places are chosen.
            samples = (bias if is_op(self._select, "Gather") else pooled).shape
            row.shape = None if samples is None else ir.Shape([samples[0], 1, 1, bias.shape[3]])
        return row

    def _cut_row(self, bias: ir.Value) -> ir.Value:
        if is_op(self._select, "Gather"):
            return self.add("Gather", [bias, self._index], None, axis=2)
        if bias.shape is not None and bias.shape[0] == 1:  # one mask for all texts
            plane = self.add("Squeeze", [bias, self._initializer("lead", np.array([0, 1]))], None)
            second = self._initializer("second", np.array([1], np.int64))
            position = self.add("Gather", [self._select.inputs[1], second], None, axis=1)
            rows = self.add("GatherND", [plane, position], None)
            return self.add("Unsqueeze", [rows, self._initializer("ones", np.array([1, 2]))], None)
        rows = self.add("Squeeze", [bias, self.axis], None)
        row = self.add("GatherND", [rows, self._index], None)
        return self.add("Unsqueeze", [row, self.axis], None)

    def add(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        sizes: list[int | ir.SymbolicDim] | None,
        **attributes: int,
    ) -> ir.Value:
        """Insert a node above the selection and return its output."""
        self._count += 1
        node = ir.node(op_type, inputs, attributes, name=f"{self._stem}_token_{self._count}")
        node.outputs[0].name = f"{node.name}_out"
        if sizes is not None:
            node.outputs[0].shape = ir.Shape(sizes)
        self._graph.insert_before(self._select, node)
        return node.outputs[0]

    def _initializer(self, name: str, array: Array) -> ir.Value:
        return add_initializer(self._graph, f"{self._stem}_token_{name}", array)
