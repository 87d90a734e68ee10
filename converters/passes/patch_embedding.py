"""A vision transformer's patch convolution as one matrix product.

A convolution whose stride is its kernel reads every pixel once: it is a product of the flattened
patches with the flattened kernel, which quantizes and multiplies like any linear layer.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mmedge.converters.passes.building import add_initializer, replace_value
from mmedge.converters.passes.matching import (
    constant,
    is_op,
    only_consumer,
    perm_of,
    sizes,
)
from mmedge.specs import Array

__all__ = ["PatchEmbeddingAsMatMul"]


class PatchEmbeddingAsMatMul(ir.passes.InPlacePass):
    """Replace Conv, Reshape, Transpose(0, 2, 1) by Reshape, Transpose, Reshape, MatMul, Add.

    Requires: an image of fixed height and width, divisible by the kernel; stride equal to the
        kernel; no padding, dilation or groups; tokens read as (B, patches, channels).
    Ensures: the same numbers up to rounding. Anything else is unchanged.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every match in the main graph."""
        modified = False
        for node in list(model.graph):
            if is_op(node, "Conv") and _rewrite(model.graph, node):
                modified = True
        if modified:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def _ints(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return default if attribute is None else tuple(attribute.as_ints())


def _rewrite(graph: ir.Graph, conv: ir.Node) -> bool:
    image, weight = conv.inputs[0], conv.inputs[1]
    kernel_shape, image_shape = sizes(weight), sizes(image)
    flatten = only_consumer(conv.outputs[0], "Reshape")
    transpose = None if flatten is None else only_consumer(flatten.outputs[0], "Transpose")
    if (
        flatten is None
        or transpose is None
        or perm_of(transpose) != (0, 2, 1)
        or kernel_shape is None
        or image_shape is None
        or len(kernel_shape) != 4
        or len(image_shape) != 4
        or None in kernel_shape
        or None in image_shape[1:]
    ):
        return False
    width_out, channels, kernel_h, kernel_w = (int(size or 0) for size in kernel_shape)
    height, width = int(image_shape[2] or 0), int(image_shape[3] or 0)
    group = conv.attributes.get("group")
    plain = (
        _ints(conv, "strides", (1, 1)) == (kernel_h, kernel_w)
        and not any(_ints(conv, "pads", (0, 0, 0, 0)))
        and set(_ints(conv, "dilations", (1, 1))) == {1}
        and (group is None or group.as_int() == 1)
        and height % kernel_h == 0
        and width % kernel_w == 0
        and sizes(transpose.outputs[0]) is not None
    )
    kernel = constant(weight) if plain else None
    if weight is None or kernel is None:
        return False
    rows, columns = height // kernel_h, width // kernel_w
    stem = conv.name or conv.outputs[0].name or "patch_embedding"

    def initializer(name: str, array: Array) -> ir.Value:
        return add_initializer(graph, f"{stem}_{name}", array)

    def step(op_type: str, inputs: list[ir.Value | None], name: str, **perm: list[int]) -> ir.Value:
        node = ir.node(op_type, inputs, perm, name=f"{stem}_{name}")
        node.outputs[0].name = f"{stem}_{name}_out"
        graph.insert_before(transpose, node)
        return node.outputs[0]

    # 0 copies the batch axis: the only one that may be dynamic.
    grid = initializer("grid", np.array([0, channels, rows, kernel_h, columns, kernel_w], np.int64))
    patches = initializer("patches", np.array([0, rows * columns, channels * kernel_h * kernel_w]))
    matrix = np.ascontiguousarray(kernel.reshape(width_out, -1).T)
    tiled = step("Reshape", [image, grid], "tile")
    ordered = step("Transpose", [tiled], "order", perm=[0, 2, 4, 1, 3, 5])
    flat = step("Reshape", [ordered, patches], "flatten")
    # Named after the convolution's weight, for methods that name layers by their weights.
    layer = ((weight and weight.name) or stem).removesuffix(".weight")
    name = f"{layer}.matrix.weight"
    # A second convolution of the same weight reads the same matrix.
    product = graph.initializers.get(name) or add_initializer(graph, name, matrix)
    tokens = step("MatMul", [flat, product], "project")
    if len(conv.inputs) > 2 and conv.inputs[2] is not None:
        tokens = step("Add", [tokens, conv.inputs[2]], "bias")
    replace_value(transpose.outputs[0], tokens)
    return True
