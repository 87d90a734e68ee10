"""Quantization: a typed config picks its method.

`quantize(model, out, DynamicInt8())` writes the quantized graph of `model` to `out`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from mmedge.specs import Array

__all__ = ["DynamicInt8", "Float16", "QuantizationConfig", "StaticInt8", "quantize"]


@dataclass(frozen=True, slots=True)
class Float16:
    """Weights and arithmetic in fp16; normalizations that overflow it stay in fp32."""


@dataclass(frozen=True, slots=True)
class DynamicInt8:
    """Int8 matrix products whose activation scales are computed for each call.

    Attributes:
        per_channel: One weight scale for each output channel.
    """

    per_channel: bool = True


@dataclass(frozen=True, slots=True)
class StaticInt8:
    """Int8 in QDQ form with activation scales from calibration.

    Attributes:
        activations: "uint8" for ONNX Runtime on CPU, "int8" (symmetric) for TensorRT.
        method: How the range of an activation is chosen from its statistics.
    """

    activations: Literal["uint8", "int8"] = "uint8"
    method: Literal["minmax", "entropy", "percentile"] = "minmax"


QuantizationConfig: TypeAlias = Float16 | DynamicInt8 | StaticInt8


def quantize(
    model: Path,
    out: Path,
    config: QuantizationConfig,
    *,
    calibration: Callable[[], Iterable[Mapping[str, Array]]] | None = None,
) -> None:
    """Write the quantized graph of `model` to `out`, external data beside it as `out.name + ".data"`.

    Args:
        model: ONNX file of the fp32 variant.
        out: ONNX file to write.
        config: The method and its settings.
        calibration: Starts a stream of feeds for the graph; called once for each pass over the
            data. Needed by StaticInt8. Statistics are kept, never activations.

    Raises:
        QuantizationError: If the method cannot take the graph, or the statistics are not finite
            (the tensor is named).
        CalibrationError: If the method needs calibration data and got none.
    """
    raise NotImplementedError
