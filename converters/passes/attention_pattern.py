"""Pattern of scaled dot-product attention as exported by torch below opset 23."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from mmedge.converters.passes.matching import (
    constant,
    is_op,
    only_consumer,
    perm_of,
    producer,
    rank,
    scalar,
    sizes,
)

__all__ = ["DecomposedAttention", "match_attention"]


@dataclass(frozen=True)
class DecomposedAttention:
    """Attention in standard operators.

    Attributes:
        query: (B, S, H * d), before its heads are split; (B, H, S, d) where they are not split or
            not merged again in one step (rotary positions stand between).
        key: As the query, (B, L, K * d) or (B, K, L, d): without its past, and before heads that
            are shared by several queries are repeated.
        value: As the key.
        bias: Added to the scores, four axes, or None.
        heads: H.
        kv_heads: K.
        scale: Factor of the scores, wherever the graph applies it.
        output: (B, S, H * d) or (B * S, H * d), its heads merged; (B, H, S, d).
        past: Keys and values (B, K, P, d) before the new ones, or None.
        present: Both joined, (B, K, P + L, d), or None.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    bias: ir.Value | None
    heads: int
    kv_heads: int
    scale: float
    output: ir.Value
    past: tuple[ir.Value, ir.Value] | None = None
    present: tuple[ir.Value, ir.Value] | None = None

    @property
    def merged(self) -> bool:
        """Whether query, key and value have their heads side by side."""
        return rank(self.query) == 3

    @property
    def plain(self) -> bool:
        """Whether it is an encoder's: heads split and merged, as many keys, and no past."""
        same = self.heads == self.kv_heads and self.past is None
        return same and self.merged and rank(self.output) == 3


def match_attention(softmax: ir.Node) -> DecomposedAttention | None:
    """Return the attention around a Softmax, or None where it is written otherwise.

    A mask of one row for all queries does not match, unless there is one query.
    """
    axis = softmax.attributes.get("axis")
    if axis is not None and axis.as_int() not in (-1, 3):
        return None
    context, scores = _context(softmax.outputs[0]), _split_scores(softmax.inputs[0])
    if context is None or scores is None:
        return None
    product, bias, scale = scores
    query, query_scale = _unscaled(product.inputs[0])
    turned, key_scale = _unscaled(product.inputs[1])
    key, key_repeats = _unrepeated(_untransposed_key(turned))
    value, value_repeats = _unrepeated(context.inputs[1])
    total_scale = scale * query_scale * key_scale
    # Attention-23 takes a positive scale only.
    if query is None or key is None or value is None or not 0 < total_scale < np.inf:
        return None
    past, present = None, None
    joined = _joined(key, value)
    if joined is not None:
        past, present, (key, value) = joined[0], (key, value), joined[1]
    parts = _merged_parts(query, key, value, context) or _whole_parts(query, key, value, context)
    if parts is None or key_repeats != value_repeats:
        return None
    (query, key, value), (heads, kv_heads, value_heads), output = parts
    if heads != kv_heads * key_repeats or kv_heads != value_heads:
        return None
    return DecomposedAttention(
        query, key, value, bias, heads, kv_heads, total_scale, output, past, present
    )


_Parts: TypeAlias = "tuple[tuple[ir.Value, ir.Value, ir.Value], tuple[int, int, int], ir.Value]"
"""Query, key and value, the heads of each, and the output."""


def _merged_parts(
    query: ir.Value, key: ir.Value, value: ir.Value, context: ir.Node
) -> _Parts | None:
    """Return the parts with their heads side by side, where all of them are split from that."""
    split = _split_heads(query), _split_heads(key), _split_heads(value)
    output = _merged_output(context)
    if split[0] is None or split[1] is None or split[2] is None or output is None:
        return None
    parts, heads = (split[0][0], split[1][0], split[2][0]), (split[0][1], split[1][1], split[2][1])
    width = (sizes(parts[2]) or (0, 0, None))[2]
    if width is None or (sizes(output) or (None,))[-1] != width // heads[2] * heads[0]:
        return None
    kept = rank(output) == 3 and _axis(output, 0) == _axis(parts[0], 0)
    return (parts, heads, output) if kept or _same_samples(*parts) else None


def _whole_parts(
    query: ir.Value, key: ir.Value, value: ir.Value, context: ir.Node
) -> _Parts | None:
    """Return the parts of four axes, where their shapes are known to fit."""
    shapes = sizes(query), sizes(key), sizes(value)
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return None
    heads = tuple((shape or ())[1] for shape in shapes)
    if None in heads or not _same_samples(query, key, value):
        return None
    return (query, key, value), heads, context.outputs[0]  # type: ignore[return-value]


def _same_samples(query: ir.Value, key: ir.Value, value: ir.Value) -> bool:
    """Return whether nothing is broadcast over samples."""
    return _axis(query, 0) == _axis(key, 0) == _axis(value, 0) is not None


def _context(probabilities: ir.Value) -> ir.Node | None:
    """From the probabilities down to their product with the values."""
    consumers = list(probabilities.consumers())
    if len(consumers) == 2:  # torch guards against rows whose keys are all masked: IsNaN, Where
        where = next((node for node in consumers if is_op(node, "Where")), None)
        guard = None if where is None else producer(where.inputs[0], "IsNaN")
        if where is None or guard is None or guard.inputs[0] is not probabilities:
            return None
        if scalar(where.inputs[1]) != 0.0 or where.inputs[2] is not probabilities:
            return None
        probabilities = where.outputs[0]
    context = only_consumer(probabilities, "MatMul")
    return None if context is None or context.inputs[0] is not probabilities else context


def _merged_output(context: ir.Node) -> ir.Value | None:
    """From (B, H, S, d) down to (B, S, H * d), or (B * S, H * d)."""
    transpose = only_consumer(context.outputs[0], "Transpose")
    if transpose is None or perm_of(transpose) != (0, 2, 1, 3):
        return None
    reshape = only_consumer(transpose.outputs[0], "Reshape")
    if reshape is None or rank(reshape.outputs[0]) not in (2, 3):
        return None
    return reshape.outputs[0]


def _unrepeated(value: ir.Value | None) -> tuple[ir.Value | None, int]:
    """From (B, K * n, L, d) back to (B, K, L, d), with n: a head for every n queries."""
    reshape = producer(value, "Reshape")
    expand = None if reshape is None else producer(reshape.inputs[0], "Expand")
    unsqueeze = None if expand is None else producer(expand.inputs[0], "Unsqueeze")
    if reshape is None or expand is None or unsqueeze is None or unsqueeze.inputs[0] is None:
        return value, 1
    given, wide = sizes(unsqueeze.inputs[0]), sizes(expand.outputs[0])
    made, axes = sizes(reshape.outputs[0]), constant(unsqueeze.inputs[1])
    if given is None or wide is None or made is None or axes is None or axes.tolist() != [2]:
        return value, 1
    if (len(given), len(wide), len(made)) != (4, 5, 4) or given[1] is None or wide[2] is None:
        return value, 1
    if wide[1] != given[1] or made[1] != given[1] * wide[2] or made[3] != given[3]:
        return value, 1
    return unsqueeze.inputs[0], wide[2]


def _joined(
    key: ir.Value, value: ir.Value
) -> tuple[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value]] | None:
    """Return the past of keys and values and what is joined to it, where both have one.

    Both are outputs then: ONNX Runtime drops unused joins.
    """
    key_concat, value_concat = producer(key, "Concat"), producer(value, "Concat")
    if key_concat is None or value_concat is None:
        return None
    if not (key.is_graph_output() and value.is_graph_output()):
        return None
    for node in (key_concat, value_concat):
        axis = node.attributes.get("axis")
        if axis is None or axis.as_int() not in (2, -2) or rank(node.outputs[0]) != 4:
            return None
        if len(node.inputs) != 2 or None in node.inputs:
            return None
    (key_past, key_new), (value_past, value_new) = key_concat.inputs, value_concat.inputs
    assert key_past is not None and key_new is not None  # noqa: S101, PT018, checked above
    assert value_past is not None and value_new is not None  # noqa: S101, PT018
    if not _axis(key_past, 2) == _axis(value_past, 2) is not None:
        return None
    return (key_past, value_past), (key_new, value_new)


def _split_scores(scores: ir.Value | None) -> tuple[ir.Node, ir.Value | None, float] | None:
    """From the softmax input up to the product of queries and keys: mask and scale between."""
    bias = None
    add = producer(scores, "Add")
    if add is not None:
        for product_at, bias_at in ((0, 1), (1, 0)):
            found = _scaled_product(add.inputs[product_at])
            if found is not None:
                bias = add.inputs[bias_at]
                if not _has_a_row_each(bias, scores):
                    return None
                return found[0], bias, found[1]
        return None
    found = _scaled_product(scores)
    return None if found is None else (found[0], None, found[1])


def _has_a_row_each(bias: ir.Value | None, scores: ir.Value | None) -> bool:
    """Return whether a mask is broadcast over samples and heads only, as the kernel takes it."""
    mask, wide = sizes(bias), sizes(scores)
    if mask is None or wide is None or len(mask) != 4 or len(wide) != 4:
        return False
    return mask[3] != 1 and (mask[2] != 1 or wide[2] == 1)


def _scaled_product(value: ir.Value | None) -> tuple[ir.Node, float] | None:
    inner, scale = _unscaled(value)
    product = producer(inner, "MatMul")
    return None if product is None else (product, scale)


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """Strip a multiplication or division by a constant."""
    mul, div = producer(value, "Mul"), producer(value, "Div")
    if mul is not None:
        for at, other in ((0, 1), (1, 0)):
            factor = scalar(mul.inputs[other])
            if factor is not None:
                return mul.inputs[at], factor
    if div is not None and (divisor := scalar(div.inputs[1])):
        return div.inputs[0], 1.0 / divisor
    return value, 1.0


def _untransposed_key(value: ir.Value | None) -> ir.Value | None:
    """From (B, H, d, L) back to (B, H, L, d), in one Transpose or in three dimensions."""
    transpose = producer(value, "Transpose")
    if transpose is not None and perm_of(transpose) == (0, 1, 3, 2):
        return transpose.inputs[0]
    unflatten = producer(value, "Reshape")
    inner = None if unflatten is None else producer(unflatten.inputs[0], "Transpose")
    flatten = None if inner is None else producer(inner.inputs[0], "Reshape")
    if inner is None or flatten is None or perm_of(inner) != (0, 2, 1):
        return None
    return flatten.inputs[0]


def _split_heads(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """From (B, H, S, d) back to (B, S, H * d), with H."""
    transpose = producer(value, "Transpose")
    if transpose is None or perm_of(transpose) != (0, 2, 1, 3):
        return None
    reshape = producer(transpose.inputs[0], "Reshape")
    if reshape is None or reshape.inputs[0] is None:
        return None
    split, merged = sizes(reshape.outputs[0]), sizes(reshape.inputs[0])
    if split is None or merged is None or len(split) != 4 or len(merged) != 3:
        return None
    heads, head_size, hidden = split[2], split[3], merged[2]
    if heads is None or head_size is None or hidden is None or heads * head_size != hidden:
        return None
    if _axis(reshape.outputs[0], 0) != _axis(reshape.inputs[0], 0):
        return None
    return reshape.inputs[0], heads


def _axis(value: ir.Value, at: int) -> int | str | None:
    """Return a size, an axis' name, or None where it is unknown."""
    if value.shape is None:
        return None
    size = value.shape[at]
    return size if isinstance(size, int) else size.value
