"""Quantization: a typed config picks its method.

`quantize(model, out, DynamicInt8())` writes the quantized graph of `model` to `out`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Literal, TypeAlias

import onnx_ir as ir

from mmedge.converters.passes.float16 import to_float16
from mmedge.converters.passes.int8 import Int8Linears, quantizable_inputs
from mmedge.converters.statistics import Feeds, collect_ranges
from mmedge.errors import CalibrationError, QuantizationError
from mmedge.files import storage_errors

__all__ = ["DynamicInt8", "Float16", "QuantizationConfig", "StaticInt8", "quantize"]


@dataclass(frozen=True, slots=True)
class Float16:
    """Weights and arithmetic in fp16; what overflows or underflows it stays in fp32.

    Inputs and outputs stay float32.
    """


@dataclass(frozen=True, slots=True)
class DynamicInt8:
    """Int8 matrix products whose activation scales are computed in each call."""


@dataclass(frozen=True, slots=True)
class StaticInt8:
    """Int8 matrix products whose activation scales come from calibration.

    Attributes:
        form: "operators" for ONNX Runtime on CPU, "qdq" for what engines are built from. The same
            numbers: see passes/int8.py.
        activations: "uint8" for CPUs, "int8" (symmetric) for TensorRT. Signed activations are ten
            times slower in ONNX Runtime on x86, so they come in the QDQ form alone.
        ranges: How a range is chosen: see statistics.py.
    """

    form: Literal["operators", "qdq"] = "operators"
    activations: Literal["uint8", "int8"] = "uint8"
    ranges: Literal["minmax", "percentile"] = "minmax"


QuantizationConfig: TypeAlias = Float16 | DynamicInt8 | StaticInt8


def quantize(
    model: Path,
    out: Path,
    config: QuantizationConfig,
    *,
    calibration: Feeds | None = None,
    share: Path | None = None,
) -> None:
    """Write the quantized graph of `model` to `out`, its weights to `out` + ".data" beside it.

    Args:
        model: ONNX file of the fp32 variant: the ONNX Runtime layout for int8 on CPU, the portable
            one otherwise.
        out: ONNX file to write.
        config: The method and its settings.
        calibration: Starts a stream of feeds for the graph; called once for each reading of the
            data. Needed by StaticInt8. Statistics are kept, never activations.
        share: Another ONNX file in the folder of `out`, such as the same variant in another layout.
            Weights that both hold are read from its external data instead of being stored again.

    Raises:
        QuantizationError: If the method cannot take the graph, or weights or activations are not
            finite (the tensor is named).
        CalibrationError: If the method needs calibration data and got none.
    """
    quantized = _quantized(config, model, calibration)
    if share is not None:
        _share_weights(quantized, share)
    with storage_errors(out):
        ir.save(quantized, out, external_data=None if share else f"{out.name}.data")


def _share_weights(model: ir.Model, other: Path) -> None:
    """Let weights that `other` keeps in external data be read from there."""
    held = ir.load(other).graph.initializers
    for name, value in model.graph.initializers.items():
        theirs = held[name].const_value if name in held else None
        ours = value.const_value
        if (
            isinstance(theirs, ir.ExternalTensor)
            and ours is not None
            and (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            and ours.tobytes() == theirs.tobytes()
        ):
            value.const_value = theirs


@singledispatch
def _quantized(config: object, _model: Path, _calibration: Feeds | None) -> ir.Model:
    raise QuantizationError(
        f"Unknown quantization config: got {type(config).__name__}, expected one of "
        "Float16, DynamicInt8, StaticInt8."
    )


@_quantized.register
def _(_config: Float16, model: Path, _calibration: Feeds | None) -> ir.Model:
    return to_float16(model)


@_quantized.register
def _(_config: DynamicInt8, model: Path, _calibration: Feeds | None) -> ir.Model:
    graph = ir.load(model)
    Int8Linears("dynamic")(graph)
    return graph


@_quantized.register
def _(config: StaticInt8, model: Path, calibration: Feeds | None) -> ir.Model:
    if config.form == "operators" and config.activations == "int8":
        raise QuantizationError(
            "Signed activations exist in the QDQ form only. Pass StaticInt8(form='qdq', "
            "activations='int8'), or unsigned ones for ONNX Runtime on CPU."
        )
    if calibration is None:
        raise CalibrationError(
            "Static int8 needs calibration data. Pass --calibration DIR, or use int8-dynamic."
        )
    graph = ir.load(model)
    names = quantizable_inputs(graph)
    ranges = collect_ranges(model, names, calibration, method=config.ranges) if names else {}
    Int8Linears(config.form, ranges, symmetric_activations=config.activations == "int8")(graph)
    return graph
