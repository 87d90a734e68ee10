"""Convolutions of a graph with constant kernels, and the values that their int8 form quantizes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from mmedge.converters.passes.linears import WeightedNode
from mmedge.converters.passes.matching import constant, is_op, only_consumer, rank, sizes
from mmedge.specs import Float32Array

__all__ = ["Convolution", "find_convolutions", "float_reason"]

# What a runtime computes with a convolution, and what requantization to uint8 does by its limits.
_RECTIFIERS = ("Relu", "Clip")


@dataclass(frozen=True)
class Convolution(WeightedNode):
    """One convolution: output = rectified(conv(x, weight) + bias), x (B, in, ...).

    Attributes:
        node: The Conv.
        weight: The constant kernel, (out, in / groups, ...).
        output: The value after a Relu or Clip without other readers beside it.
    """

    output: ir.Value

    @property
    def shape(self) -> tuple[int, int]:
        """(weights of an output channel, output channels), as the matrix product has them."""
        columns, *kernel = (size or 0 for size in sizes(self.weight) or (0, 0))
        return prod(kernel), columns

    @property
    def groups(self) -> int:
        """Number of groups; as many as input channels in a depthwise convolution."""
        attribute = self.node.attributes.get("group")
        return 1 if attribute is None else attribute.as_int()

    def kernel(self) -> Float32Array:
        """Return the weight as (out, in / groups * places) float32.

        Raises:
            QuantizationError: If it holds NaN or infinite values.
        """
        weight = self.finite_weight()
        return np.asarray(weight.reshape(len(weight), -1), np.float32)


def find_convolutions(graph: ir.Graph) -> list[Convolution]:
    """Return every convolution with a constant float32 kernel, in the graph's order."""
    return list(_found(graph))


def _found(graph: ir.Graph) -> Iterator[Convolution]:
    for node in graph:
        if not is_op(node, "Conv"):
            continue
        x, weight, *bias = node.inputs
        if x is None or x.is_initializer() or weight is None or not weight.is_initializer():
            continue
        if weight.dtype != ir.DataType.FLOAT or (rank(weight) or 0) < 3:
            continue
        if any(value is not None and not value.is_initializer() for value in bias):
            continue
        yield Convolution(node, weight, _rectified(node.outputs[0]))


def _rectified(value: ir.Value) -> ir.Value:
    reader = only_consumer(value)
    if reader is None or not any(is_op(reader, op) for op in _RECTIFIERS):
        return value
    if any(limit is not None and constant(limit) is None for limit in reader.inputs[1:]):
        return value
    return reader.outputs[0]


def float_reason(convolution: Convolution, keep: Collection[str], excluded: str) -> str:
    """Return why static int8 leaves a convolution in float, "" if it does not.

    Depthwise convolutions and those of a single place (squeeze and excitation) are no faster in
    int8 than in float, with ONNX Runtime and OpenVINO on AVX512-VNNI, and cost fidelity.

    Args:
        convolution: The convolution.
        keep: Names of excluded layers.
        excluded: Reason of those in `keep`.
    """
    if convolution.output.is_graph_output() or convolution.node.outputs[0].is_graph_output():
        return "makes an output"
    if convolution.groups > 1 and (sizes(convolution.weight) or (0, 0))[1] == 1:
        return "a depthwise convolution, no faster in int8"
    if all(size == 1 for size in (sizes(convolution.x) or (0, 0, 0))[2:]):
        return "a convolution of a single place, no faster in int8"
    return excluded if convolution.name in keep else ""
