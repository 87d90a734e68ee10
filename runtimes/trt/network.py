"""Specs, dtypes and GPU requirements of a parsed network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mmedge.errors import EngineBuildError
from mmedge.runtimes.engines.spec import QUANTIZED_DTYPES
from mmedge.runtimes.onnx_file import OnnxFile, axis_dim
from mmedge.specs import TensorSpec

__all__ = ["NUMPY_DTYPES", "dtypes", "float32_product", "quantized_nodes", "read_specs"]

NUMPY_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""numpy's dtypes by the names of TensorRT's."""

_SHORT = {"FLOAT": "fp32", "HALF": "fp16"}
_MOVING = ("SHUFFLE", "IDENTITY", "CAST")  # between a weight and its consumer
_MAX_STEPS = 8


def read_specs(
    network: Any,  # noqa: ANN401, of the library
    file: OnnxFile,
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the input and output specs of a network.

    Args:
        network: INetworkDefinition, parsed.
        file: The ONNX file, for the names of dynamic axes, which a network lacks.

    Raises:
        EngineBuildError: If a tensor has a dtype that numpy lacks, such as bfloat16.
    """
    names = {spec.name: spec for spec in (*file.inputs, *file.outputs)}
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return (
        tuple(_spec(tensor, names.get(tensor.name)) for tensor in inputs),
        tuple(_spec(tensor, names.get(tensor.name)) for tensor in outputs),
    )


def _spec(tensor: Any, named: TensorSpec | None) -> TensorSpec:  # noqa: ANN401
    dtype = NUMPY_DTYPES.get(tensor.dtype.name)
    if dtype is None:
        raise EngineBuildError(
            f"'{tensor.name}' is {tensor.dtype.name}, which numpy lacks. "
            "Convert the model with float32, float16 or integer tensors as inputs and outputs."
        )
    sizes = tuple(tensor.shape)
    axes = named.shape if named is not None and len(named.shape) == len(sizes) else sizes
    return TensorSpec(
        tensor.name,
        np.dtype(dtype),
        tuple(
            axis_dim(size if size >= 0 else axis, tensor.name, index)
            for index, (size, axis) in enumerate(zip(sizes, axes, strict=True))
        ),
    )


def quantized_nodes(network: Any) -> dict[str, str]:  # noqa: ANN401
    """Return the dtype of quantized weights by the name of the layer that reads them.

    A weight is quantized if it is a constant behind DequantizeLinear. The parser names layers
    after ONNX nodes.
    """
    layers = list(_layers(network))
    producers = _producers(layers)
    found: dict[str, str] = {}
    for layer in layers:
        if layer.type.name in (*_MOVING, "DEQUANTIZE"):
            continue
        for tensor in _inputs(layer):
            source = _behind(tensor, producers)
            if source is None or source.type.name != "DEQUANTIZE":
                continue
            quantized = source.get_input(0)
            weights = _behind(quantized, producers)
            dtype = _short(quantized.dtype.name)
            if (
                weights is not None
                and weights.type.name == "CONSTANT"
                and dtype in QUANTIZED_DTYPES
            ):
                found[layer.name] = dtype
    return found


def dtypes(network: Any) -> frozenset[str]:  # noqa: ANN401
    """Return every tensor dtype of the network: "fp32", "int8", "fp8", ..."""
    found = {
        tensor.dtype.name
        for layer in _layers(network)
        for tensor in (layer.get_output(index) for index in range(layer.num_outputs))
    }
    return frozenset(map(_short, found))


def float32_product(network: Any) -> str | None:  # noqa: ANN401
    """Return the name of a float32 matrix product without quantized inputs, or None.

    TensorRT-RTX has no kernels for one on compute capability 7.5.
    """
    layers = list(_layers(network))
    producers = _producers(layers)
    for layer in layers:
        if layer.type.name != "MATRIX_MULTIPLY" or layer.get_input(0).dtype.name != "FLOAT":
            continue
        sources = [_behind(tensor, producers) for tensor in _inputs(layer)]
        if not all(s is not None and s.type.name == "DEQUANTIZE" for s in sources):
            return str(layer.name)
    return None


def _layers(network: Any) -> Iterator[Any]:  # noqa: ANN401
    return (network.get_layer(index) for index in range(network.num_layers))


def _inputs(layer: Any) -> list[Any]:  # noqa: ANN401
    found = (layer.get_input(index) for index in range(layer.num_inputs))
    return [tensor for tensor in found if tensor is not None]


def _producers(layers: list[Any]) -> dict[str, Any]:
    return {
        layer.get_output(index).name: layer
        for layer in layers
        for index in range(layer.num_outputs)
    }


def _behind(tensor: Any, producers: dict[str, Any]) -> Any | None:  # noqa: ANN401
    """Return the producer of a tensor, skipping data movement; None for an input."""
    for _ in range(_MAX_STEPS):
        layer = producers.get(tensor.name)
        if layer is None or layer.type.name not in _MOVING:
            return layer
        tensor = layer.get_input(0)
    return None


def _short(name: str) -> str:
    return _SHORT.get(name, name.lower())
