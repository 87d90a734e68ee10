"""Channel equalization: divide activation channels by scales and multiply the weights.

A group is every linear layer that reads one value, or a selection of its rows. What makes the value
takes in the division, so that the function stays the same: the gain and bias of a normalization,
the columns and bias of a linear layer (through attention too: its output is a weighted mean of the
values, channel by channel), or a product with a constant. Where none of these makes it, a Mul can
be put in.

Source: Xiao et al. 2023, "SmoothQuant", sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mmedge.converters.passes.building import add_initializer
from mmedge.converters.passes.linears import Linear, find_linears
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
from mmedge.specs import Array

__all__ = ["Group", "ScaleChannels", "find_groups"]

# What selects or regroups rows of a value and leaves its channels, the last axis, as they are.
_MOVES_ROWS = frozenset({"Gather", "GatherND", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True)
class Group:
    """Linear layers whose input channels share scales.

    Attributes:
        value: What they read, directly or some rows of it, (..., C).
        linears: The layers, in the graph's order.
        source: What the division can be folded into: a LayerNormalization or a Mul with a constant,
            or the linear layer that makes `value`; None if there is none, see `obstacle`.
        foreign: Names of nodes that read `value` and are not linear layers of the group.
        obstacle: Reason without `source`; else "".
        tied: Why not even a Mul can be put in (a weight with other readers); "" where it can.
    """

    value: ir.Value
    linears: tuple[Linear, ...]
    source: ir.Node | Linear | None
    foreign: tuple[str, ...]
    obstacle: str
    tied: str

    @property
    def channels(self) -> int:
        """Number of channels of the value."""
        return self.linears[0].shape[0]


def find_groups(graph: ir.Graph) -> list[Group]:
    """Return the groups of a graph's linear layers, in order; each layer is in one of them."""
    linears = find_linears(graph)
    makers = {linear.output: linear for linear in linears}
    readers: dict[ir.Value, list[Linear]] = {}
    for linear in linears:
        readers.setdefault(_root(linear.x, makers), []).append(linear)
    nodes = {linear.node for linear in linears}
    return [
        _group(value, tuple(members), makers.get(value), nodes)
        for value, members in readers.items()
    ]


def _group(
    value: ir.Value, linears: tuple[Linear, ...], maker: Linear | None, nodes: set[ir.Node]
) -> Group:
    foreign = tuple(dict.fromkeys(_foreign(value, nodes)))
    tied = next(
        (
            f"weight '{linear.weight.name}' has other readers"
            for linear in linears
            if len(linear.weight.uses()) != 1
        ),
        "",
    )
    channels = linears[0].shape[0]
    source, obstacle = _source(value, maker, channels)
    if foreign:
        source, obstacle = None, f"{foreign[0]} reads '{value.name}' too"
    if tied:
        source, obstacle = None, tied
    return Group(value, linears, source, foreign, obstacle, tied)


def _source(
    value: ir.Value, maker: Linear | None, channels: int
) -> tuple[ir.Node | Linear | None, str]:
    """Return the node to fold a division of `value` into, or None and the reason."""
    node = maker.node if maker is not None else value.producer()
    constants: list[ir.Value | None]
    if maker is not None:
        source: ir.Node | Linear = maker
        constants = [maker.bias]
        if len(maker.weight.uses()) != 1:
            return None, f"weight '{maker.weight.name}' has other readers"
    elif is_op(node, "LayerNormalization") and node is not None:
        axis = node.attributes.get("axis")
        if axis is not None and axis.as_int() not in (-1, (rank(value) or 0) - 1):
            return None, f"{node.name} normalizes other axes than the last"
        source, constants = node, list(node.inputs[1:])
    elif is_op(node, "Mul") and node is not None:
        vectors = [one for one in node.inputs if one is not None and one.is_initializer()]
        if len(vectors) != 1:
            return None, f"{node.name} (Mul) has no constant to fold a scale into"
        source, constants = node, [*vectors]
    else:
        what = "a graph input" if node is None else f"{node.op_type} {node.name}"
        return None, f"'{value.name}' is made by {what}, which cannot take a scale"
    for one in constants:
        if one is not None and (
            not one.is_initializer() or sizes(one) != (channels,) or len(one.uses()) != 1
        ):
            return None, f"'{one.name}' is not a constant of only this layer"
    return source, ""


def _root(x: ir.Value, makers: Mapping[ir.Value, Linear]) -> ir.Value:
    """Follow a value up to the producer of its channels."""
    while True:
        node = x.producer()
        if node is not None and x not in makers and _keeps_channels(node):
            above = node.inputs[0]
        else:
            above = _attended(x)
            # Follow only up to a layer that can absorb a scale.
            above = above if above is not None and above in makers else None
        if above is None:
            return x
        x = above


def _keeps_channels(node: ir.Node) -> bool:
    """Return whether a node only selects or regroups rows of its first input."""
    if node.op_type not in _MOVES_ROWS or not is_op(node, node.op_type):
        return False
    given, made = sizes(node.inputs[0]), sizes(node.outputs[0])
    if not given or not made or len(node.outputs) != 1 or node.inputs[0] is None:
        return False
    if node.inputs[0].is_initializer() or given[-1] is None or given[-1] < 2:
        return False
    if is_op(node, "Gather"):
        axis = node.attributes.get("axis")
        at = 0 if axis is None else axis.as_int()
        if at % len(given) == len(given) - 1:
            return False
    if is_op(node, "GatherND"):
        depth = _depth(node.inputs[1])
        dims = node.attributes.get("batch_dims")
        before = 0 if dims is None else dims.as_int()
        if depth is None or before + depth >= len(given):
            return False
    return given[-1] == made[-1]


def _depth(indices: ir.Value | None) -> int | None:
    """Return how many axes GatherND's indices name, or None where it is unknown."""
    known = sizes(indices)
    if known:
        return known[-1]
    unsqueeze = producer(indices, "Unsqueeze")
    inner = None if unsqueeze is None else sizes(unsqueeze.inputs[0])
    axes = None if unsqueeze is None else constant(unsqueeze.inputs[1])
    if not inner or axes is None or not all(0 <= axis < len(inner) for axis in axes):
        return None
    return inner[-1]


def _attended(x: ir.Value) -> ir.Value | None:
    """Return the values (B, L, C) whose weighted mean by attention is `x`, (B, S, C)."""
    node = x.producer()
    fused = is_op(node, "Attention") or is_op(node, "MultiHeadAttention", "com.microsoft")
    values = _fused_values(node) if fused and node is not None else _decomposed_values(x)
    if values is None or not sizes(x) or not sizes(values):
        return None
    # Fewer heads of keys and values than of queries: a channel would be read by several heads.
    same = (sizes(x) or ())[-1] == (sizes(values) or ())[-1] is not None
    return values if same and only_consumer(values) is not None else None


def _fused_values(node: ir.Node) -> ir.Value | None:
    heads = [node.attributes.get(name) for name in ("q_num_heads", "kv_num_heads")]
    if (heads[0] is None) != (heads[1] is None):
        return None
    if heads[0] is not None and heads[1] is not None and heads[0].as_int() != heads[1].as_int():
        return None
    # A packed bias of MultiHeadAttention, or a cache, holds values that no layer makes.
    rest = node.inputs[3:] if node.domain == "com.microsoft" else node.inputs[4:]
    if len(node.inputs) < 3 or any(rest) or any(output.uses() for output in node.outputs[1:]):
        return None
    values = node.inputs[2]
    uses = [] if values is None else [use.idx for use in values.uses()]
    return values if rank(values) == 3 and uses == [2] else None


def _decomposed_values(x: ir.Value) -> ir.Value | None:
    merged = producer(x, "Reshape")
    transposed = None if merged is None else producer(merged.inputs[0], "Transpose")
    product = None if transposed is None else producer(transposed.inputs[0], "MatMul")
    if merged is None or transposed is None or product is None:
        return None
    heads = producer(product.inputs[1], "Transpose")
    split = None if heads is None else producer(heads.inputs[0], "Reshape")
    if heads is None or split is None or rank(x) != 3:
        return None
    if any(perm_of(turn) != (0, 2, 1, 3) for turn in (transposed, heads)):
        return None
    inner = [merged.inputs[0], transposed.inputs[0], product.inputs[1], heads.inputs[0]]
    if any(value is None or only_consumer(value) is None for value in inner):
        return None
    axes, values = sizes(split.outputs[0]), split.inputs[0]
    if axes is None or len(axes) != 4 or axes[2] is None or axes[3] is None or rank(values) != 3:
        return None
    return values if axes[2] * axes[3] == (sizes(values) or ())[-1] else None


def _foreign(value: ir.Value, linears: Collection[ir.Node]) -> Iterator[str]:
    """Name a reader of `value`, or of its rows, that is no linear layer."""
    if value.is_graph_output():
        yield "an output of the graph"
    for use in value.uses():
        if use.node in linears and use.idx == 0:
            continue
        if use.idx == 0 and _keeps_channels(use.node):
            yield from _foreign(use.node.outputs[0], linears)
        elif (attended := _attention_of(value, use.node)) is not None:
            yield from _foreign(attended, linears)
        else:
            yield f"{use.node.op_type} {use.node.name}"


def _attention_of(value: ir.Value, node: ir.Node) -> ir.Value | None:
    """Return the output of the attention whose values are `value` and that starts at `node`."""
    made: ir.Value | None = node.outputs[0]
    for op_type in ("Transpose", "MatMul", "Transpose", "Reshape"):
        if made is None:
            break
        if _attended(made) is value:
            return made
        following = only_consumer(made, op_type)
        made = None if following is None else following.outputs[0]
    return made if made is not None and _attended(made) is value else None


class ScaleChannels(ir.passes.InPlacePass):
    """Divide the input channels of linear layers by scales, and multiply their weights.

    Requires: float32 weights as initializers.
    Ensures: the same function; to the bit where the numbers are powers of two, unless a layer's
        kernel adds in another order. Applied again, it scales again.
    """

    def __init__(self, scales: Mapping[str, Array], *, insert: Collection[str] = ()) -> None:
        """Choose the scales.

        Args:
            scales: By name of a linear layer (Linear.name): (in,) positive numbers, the same for
                all layers of a group.
            insert: Names of layers before which a Mul may be inserted.
        """
        super().__init__()
        self._scales = dict(scales)
        self._insert = frozenset(insert)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Scale every named group.

        Raises:
            QuantizationError: If a layer is not in the graph, scales do not fit it or differ within
                its group, or they cannot be folded and no Mul may be inserted.
        """
        groups = [group for group in find_groups(model.graph) if self._names(group)]
        missing = self._scales.keys() - {name for group in groups for name in self._names(group)}
        if missing:
            raise QuantizationError(
                f"No linear layer '{min(missing)}' to scale in graph '{model.graph.name}'. "
                "Choose scales from the same model, in any layout."
            )
        # All of it is checked before any of it is changed.
        chosen = [(group, self._of(group)) for group in groups]
        for group, scales in chosen:
            _apply(model.graph, group, scales)
        return ir.passes.PassResult(model, modified=bool(chosen))

    def _names(self, group: Group) -> list[str]:
        return [linear.name for linear in group.linears if linear.name in self._scales]

    def _of(self, group: Group) -> Array:
        first = group.linears[0].name
        scales = np.asarray(self._scales.get(first, np.empty(0)), np.float32)
        for linear in group.linears:
            if not np.array_equal(scales, self._scales.get(linear.name, np.empty(0))):
                raise QuantizationError(
                    f"Scales of '{linear.name}' differ from those of '{first}', which reads the "
                    "same value, or are missing. Give every layer of a group the same."
                )
        if scales.shape != (group.channels,):
            raise QuantizationError(
                f"Scales of '{first}': got shape {scales.shape}, expected ({group.channels},). "
                "Choose scales from the same model, in any layout."
            )
        if not (np.isfinite(scales).all() and (scales > 0).all()):
            raise QuantizationError(
                f"Scales of '{first}' must be positive and finite. Choose them from finite data."
            )
        allowed = all(linear.name in self._insert for linear in group.linears)
        if group.tied or (group.source is None and not allowed):
            raise QuantizationError(
                f"Cannot scale the input of '{first}': {group.obstacle}. "
                "Leave it out, or allow a Mul before it."
            )
        return scales


def _apply(graph: ir.Graph, group: Group, scales: Array) -> None:
    for linear in group.linears:
        _scale(linear.weight, scales if linear.transposed else scales[:, None])
    inverse = (1 / scales).astype(np.float32)
    source = group.source
    if isinstance(source, Linear):
        _scale(source.weight, inverse[:, None] if source.transposed else inverse)
        if source.bias is not None:
            _scale(source.bias, inverse)
    elif source is None:
        _insert_mul(graph, group, inverse)
    else:
        for value in source.inputs[1:] if is_op(source, "LayerNormalization") else source.inputs:
            if value is not None and value.is_initializer():
                _scale(value, inverse)


def _scale(initializer: ir.Value, factors: Array) -> None:
    held = constant(initializer)
    if held is None:
        raise QuantizationError(f"'{initializer.name}' has no values to scale. Export it again.")
    scaled = np.asarray(held * factors, held.dtype, order="C")
    initializer.const_value = ir.tensor(scaled, name=initializer.name)


def _insert_mul(graph: ir.Graph, group: Group, inverse: Array) -> None:
    """Scale the layers' inputs, once for each value, and no other reader."""
    made: dict[ir.Value, ir.Value] = {}
    for linear in group.linears:
        if linear.x not in made:
            name = f"{linear.name}.equalization"
            factors = add_initializer(graph, name, inverse)
            node = ir.node("Mul", [linear.x, factors], name=name)
            output = node.outputs[0]
            output.name = f"{name}_out"
            output.type, output.shape = linear.x.type, linear.x.shape
            graph.insert_before(linear.node, node)
            made[linear.x] = output
        linear.node.replace_input_with(0, made[linear.x])
