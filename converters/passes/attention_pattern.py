"""How torch.onnx.export writes scaled dot-product attention below opset 23, found in a graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mmedge.converters.passes.matching import (
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
        query: (B, S, H * d), before its heads are split.
        key: (B, L, H * d).
        value: (B, L, H * d).
        bias: Added to the scores, four axes, or None.
        heads: H.
        scale: What the scores are multiplied by, wherever the factors stand.
        output: (B, S, H * d), its heads merged.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    bias: ir.Value | None
    heads: int
    scale: float
    output: ir.Value


def match_attention(softmax: ir.Node) -> DecomposedAttention | None:
    """Return the attention around a Softmax, or None where it is written otherwise.

    A mask of one row for all queries does not match, unless there is one query.
    """
    axis = softmax.attributes.get("axis")
    if axis is not None and axis.as_int() not in (-1, 3):
        return None
    merged = _merged_output(softmax.outputs[0])
    scores = _split_scores(softmax.inputs[0])
    if merged is None or scores is None:
        return None
    output, value_heads = merged
    product, bias, scale = scores
    query_heads, query_scale = _unscaled(product.inputs[0])
    key_transposed, key_scale = _unscaled(product.inputs[1])
    query = _split_heads(query_heads)
    key = _split_heads(_untransposed_key(key_transposed))
    value = _split_heads(value_heads)
    if query is None or key is None or value is None:
        return None
    heads = {query[1], key[1], value[1]}
    total_scale = scale * query_scale * key_scale
    merged_again = (_axis(output, 0), _axis(output, 2)) == (_axis(query[0], 0), _axis(value[0], 2))
    # Attention-23 takes a positive scale only.
    if len(heads) != 1 or not 0 < total_scale < np.inf or not merged_again:
        return None
    return DecomposedAttention(
        query=query[0],
        key=key[0],
        value=value[0],
        bias=bias,
        heads=heads.pop(),
        scale=total_scale,
        output=output,
    )


def _merged_output(probabilities: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """From the probabilities down to (B, S, H * d), and the values (B, H, L, d) on the way."""
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
    if context is None or context.inputs[0] is not probabilities:
        return None
    transpose = only_consumer(context.outputs[0], "Transpose")
    if transpose is None or perm_of(transpose) != (0, 2, 1, 3):
        return None
    reshape = only_consumer(transpose.outputs[0], "Reshape")
    values = context.inputs[1]
    if reshape is None or values is None or rank(reshape.outputs[0]) != 3:
        return None
    return reshape.outputs[0], values


def _split_scores(scores: ir.Value | None) -> tuple[ir.Node, ir.Value | None, float] | None:
    """From what the softmax takes up to the product of queries and keys: mask and scale between."""
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
    """Tell whether a mask is broadcast over samples and heads only, as the kernel takes it."""
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
    """Return a size, an axis' name, or None where the graph does not tell."""
    if value.shape is None:
        return None
    size = value.shape[at]
    return size if isinstance(size, int) else size.value
