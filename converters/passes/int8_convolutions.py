"""Int8 convolutions as QuantizeLinear and DequantizeLinear around float ones.

Kernels are symmetric int8 with one scale for each output channel, activations have one scale and
zero point for the whole tensor. Biases stay in float, as engines take them. Forms:

- qdq: what convolutions read is quantized, for all its readers, so that a residual addition reads
  the int8 value too. TensorRT and OpenVINO add, rectify and requantize in the convolution.
- operators: what they write as well. ONNX Runtime has no int8 convolution with a float output; it
  makes QLinearConv of these, QLinearAdd of an addition between quantized values, and so on.

Sources: ONNX operators QuantizeLinear-21, QLinearConv-10; Jacob et al. 2018, "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"; NVIDIA, "Working with
Quantized Types", on where Q/DQ go beside residual additions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir

from mmedge.converters.numerics.int8_rounding import (
    Range,
    calibrated_range,
    quantize_weight,
    relative_error,
)
from mmedge.converters.passes.building import NodeBuilder
from mmedge.converters.passes.convolutions import Convolution, find_convolutions, float_reason
from mmedge.converters.passes.matching import is_op, only_consumer, producer
from mmedge.errors import QuantizationError
from mmedge.runtimes.onnx_file import PAIRED_KEY

__all__ = ["Int8Convolutions", "convolution_values", "quantizable_convolutions"]

Form = Literal["operators", "qdq"]

# Any two neighbours, in whatever order a kernel takes them, then sum to 128 at most.
_PAIRED_LARGEST = 64
# Sums and products that ONNX Runtime computes in int8 between quantized values.
_INT8_OPS = ("Add", "Mul", "Sigmoid", "Concat")


def quantizable_convolutions(graph: ir.Graph, keep: Collection[str] = ()) -> list[Convolution]:
    """Return the convolutions to quantize: all but those in `keep` and those that make outputs."""
    return [one for one in find_convolutions(graph) if not float_reason(one, keep, "excluded")]


def convolution_values(graph: ir.Graph, form: Form, keep: Collection[str] = ()) -> list[str]:
    """Return the names of the values whose ranges int8 convolutions need, each once.

    Args:
        graph: In float.
        form: See the module.
        keep: Names of excluded layers.
    """
    return [value.name or "" for value in _values(quantizable_convolutions(graph, keep), form)]


def _values(convolutions: Iterable[Convolution], form: Form) -> list[ir.Value]:
    found = dict.fromkeys(one.x for one in convolutions)
    if form == "qdq":
        return list(found)
    found |= dict.fromkeys(one.output for one in convolutions)
    pending = list(found)
    while pending:
        for node in pending.pop().consumers():
            if any(is_op(node, op) for op in _INT8_OPS) and all(x in found for x in node.inputs):
                output = _after_relu(node.outputs[0])
                if output not in found and not output.is_graph_output():
                    found[output] = None
                    pending.append(output)
    return list(found)


def _after_relu(value: ir.Value) -> ir.Value:
    relu = only_consumer(value, "Relu")
    return value if relu is None else relu.outputs[0]


class Int8Convolutions(ir.passes.InPlacePass):
    """Write convolutions in int8.

    Requires: float32 weights as initializers.
    Ensures: inputs and outputs unchanged in name, dtype and shape. A quantized value keeps its
    name after DequantizeLinear, so that its range, and that of what it makes, is found by name.
    """

    def __init__(
        self,
        form: Form,
        ranges: Mapping[str, Range],
        *,
        symmetric_activations: bool = False,
        half: bool = False,
        keep: Collection[str] = (),
        paired: bool = False,
    ) -> None:
        """Choose the form.

        Args:
            form: See the module.
            ranges: By tensor name, for every name in `convolution_values`.
            symmetric_activations: int8 with zero point 0, as TensorRT takes it.
            half: Use scales that float16 holds, for a graph that is narrowed afterwards.
            keep: Names of excluded layers.
            paired: Use seven bits of each weight, so that no kernel saturates on x86 without VNNI.
        """
        super().__init__()
        self._form = form
        self._ranges = ranges
        self._symmetric = symmetric_activations
        self._half = half
        self._keep = frozenset(keep)
        self._paired = paired
        self.weight_errors: dict[str, float] = {}
        """||W - Wq||_F / ||W||_F of the quantized weights, by name."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Quantize the convolutions of the main graph.

        Raises:
            QuantizationError: If a range is missing, or a weight or range is not finite; the
                tensor is named.
        """
        graph = model.graph
        chosen = quantizable_convolutions(graph, self._keep)
        for convolution in chosen:
            self._kernel(graph, convolution)
        values = _values(chosen, self._form)
        parameters = [self._parameters(value, values) for value in values]
        for value, (scale, zero_point) in zip(values, parameters, strict=True):
            self._activation(graph, value, scale, zero_point)
        if chosen and self._paired:
            model.metadata_props[PAIRED_KEY] = "true"
        return ir.passes.PassResult(model, modified=bool(chosen))

    def _kernel(self, graph: ir.Graph, convolution: Convolution) -> None:
        kernel = convolution.kernel()
        quantized, scales = quantize_weight(kernel, axis=0, half=self._half)
        if self._paired:
            scales = scales * np.float32(127 / _PAIRED_LARGEST)
            quantized = np.rint(kernel / scales[:, None]).astype(np.int8)
        self.weight_errors[convolution.name] = relative_error(kernel, quantized * scales[:, None])
        build = NodeBuilder(graph, convolution.node)
        weight, shape = convolution.weight, convolution.weight.shape
        if shape is None:
            raise QuantizationError(f"Weight '{weight.name}' has no shape. Check the source model.")
        w = build.initializer(f"{weight.name}_int8", quantized.reshape(shape.numpy()))
        scale = build.initializer(f"{weight.name}_scale", scales)
        zero = build.initializer(f"{weight.name}_zero_point", np.zeros(scales.size, np.int8))
        stem = convolution.node.name or convolution.node.outputs[0].name or "convolution"
        dequantized = build.node(
            "DequantizeLinear", [w, scale, zero], f"{stem}_weight", {"axis": 0}
        )
        convolution.node.replace_input_with(1, dequantized)

    def _activation(
        self, graph: ir.Graph, value: ir.Value, scale_number: float, zero_number: int
    ) -> None:
        """Quantize and dequantize a value for all its readers."""
        node = value.producer()
        build = NodeBuilder(graph, graph[0])
        dtype = np.int8 if self._symmetric else np.uint8
        scale = build.initializer(f"{value.name}_scale", np.array(scale_number, np.float32))
        zero_point = build.initializer(f"{value.name}_zero_point", np.array(zero_number, dtype))
        readers = [use for use in value.uses() if node is not None or is_op(use.node, "Conv")]
        quantize = ir.node(
            "QuantizeLinear", [value, scale, zero_point], name=f"{value.name}_quantize"
        )
        (quantized,) = quantize.outputs
        quantized.name = f"{value.name}_quantized"
        dequantize = ir.node(
            "DequantizeLinear", [quantized, scale, zero_point], name=f"{value.name}_dequantize"
        )
        (made,) = dequantize.outputs
        made.name, made.type, made.shape = f"{value.name}_dequantized", value.type, value.shape
        if node is None:
            graph.insert_before(graph[0], [quantize, dequantize])
        else:
            graph.insert_after(node, [quantize, dequantize])
        for use in readers:
            use.node.replace_input_with(use.idx, made)
        if node is not None and not value.is_graph_output():
            made.name, value.name = value.name, f"{value.name}_float"

    def _parameters(self, value: ir.Value, values: Collection[ir.Value]) -> tuple[float, int]:
        while (pool := producer(value, "MaxPool")) is not None:
            source = pool.inputs[0]
            if source is None or source not in values:
                break
            value = source  # int8 in and out, of one scale
        found = calibrated_range(self._ranges, value)
        if not self._symmetric:
            return found.affine()
        return found.symmetric(half=self._half), 0
