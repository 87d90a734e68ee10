"""Quantization methods as typed configs: a config names a method and holds its settings.

`keep` names excluded linear layers (see passes/linears.py: Linear.name), in every method that
quantizes layers one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from mmedge.errors import QuantizationError

__all__ = [
    "BFloat16",
    "DynamicInt8",
    "Equalization",
    "Float8",
    "Float16",
    "QuantizationConfig",
    "RangeMethod",
    "Rest",
    "StaticInt8",
    "WeightOnly",
]

RangeMethod: TypeAlias = Literal["minmax", "percentile", "entropy", "mse"]
"""Calibration method of an activation range: see statistics/ranges.py."""
Rest: TypeAlias = Literal["float32", "float16"]
"""Precision of non-quantized ops, except those that overflow float16."""


@dataclass(frozen=True, slots=True)
class Float16:
    """Weights and arithmetic in fp16; ops that overflow or underflow it stay in fp32.

    Inputs and outputs stay float32. With calibration data the fragile parts are found by
    measuring; without, by the weights alone.
    """


@dataclass(frozen=True, slots=True)
class BFloat16:
    """Weights and arithmetic in bfloat16, inputs and outputs in float32."""


@dataclass(frozen=True, slots=True)
class Float8:
    """Linear layers in fp8 (E4M3FN), as Q/DQ that engines are built from.

    Attributes:
        ranges: Calibration method of activation ranges.
        rest: Precision of non-quantized ops. "float16" lets TensorRT fuse attention.
        keep: Names of excluded linear layers.
    """

    ranges: RangeMethod = "minmax"
    rest: Rest = "float32"
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Equalization:
    """Scale channels before quantizing, so that one scale a tensor fits them all.

    Attributes:
        strength: How much of an activation's spread moves into the weights, 0 to 1 (the alpha of
            SmoothQuant, Xiao et al. 2023); None searches it for each layer.

    Raises:
        QuantizationError: If the strength is out of range.
    """

    strength: float | None = None

    def __post_init__(self) -> None:
        if self.strength is not None and not 0.0 <= self.strength <= 1.0:
            raise QuantizationError(
                f"Equalization strength: got {self.strength}, expected 0 to 1, or None to search."
            )


@dataclass(frozen=True, slots=True)
class DynamicInt8:
    """Int8 matrix products whose activation scales are computed in each call.

    Attributes:
        equalization: Scale channels first; needs calibration data. None leaves them.
        keep: Names of excluded linear layers.
        paired: Saturation-safe weights for x86 without VNNI (numerics/paired_int8.py).
    """

    equalization: Equalization | None = None
    keep: tuple[str, ...] = ()
    paired: bool = False


@dataclass(frozen=True, slots=True)
class StaticInt8:
    """Int8 matrix products and convolutions whose activation scales come from calibration.

    Attributes:
        form: "operators" for ONNX Runtime on CPU, "qdq" for engines; the same numbers but around
            convolutions, see passes/int8.py and passes/int8_convolutions.py.
        activations: "uint8" for CPUs, "int8" (symmetric) for TensorRT. Signed activations are ten
            times slower in ONNX Runtime on x86, so they are in QDQ form only.
        ranges: Calibration method of activation ranges.
        bias_correction: Correct each layer's bias by its mean error.
        equalization: Scale channels first; None leaves them.
        rest: Precision of non-quantized ops. "float16" lets TensorRT fuse attention; with signed
            activations only.
        keep: Names of excluded linear layers.
        paired: Saturation-safe weights for x86 without VNNI (numerics/paired_int8.py); with
            unsigned activations only.

    Raises:
        QuantizationError: If form, activations, rest and pairing are incompatible.
    """

    form: Literal["operators", "qdq"] = "operators"
    activations: Literal["uint8", "int8"] = "uint8"
    ranges: RangeMethod = "minmax"
    bias_correction: bool = False
    equalization: Equalization | None = None
    rest: Rest = "float32"
    keep: tuple[str, ...] = ()
    paired: bool = False

    def __post_init__(self) -> None:
        if self.paired and self.activations == "int8":
            raise QuantizationError(
                "Paired weights are for CPUs: got signed activations, which are for engines, whose "
                "sums are exact. Leave out either (paired, symmetric)."
            )
        if self.form == "operators" and self.activations == "int8":
            raise QuantizationError(
                "Signed activations exist in the QDQ form only. Pass StaticInt8(form='qdq', "
                "activations='int8'), or unsigned ones for ONNX Runtime on CPU."
            )
        if self.rest == "float16" and self.activations != "int8":
            raise QuantizationError(
                "fp16 for non-quantized ops is for engines: got unsigned activations, for CPUs, "
                "where float16 is slow. Pass StaticInt8(form='qdq', activations='int8', "
                "rest='float16') (int8-static-symmetric-half), or rest='float32'."
            )


@dataclass(frozen=True, slots=True)
class WeightOnly:
    """Weights in few bits, arithmetic in float: smaller, and faster where memory is the limit.

    Attributes:
        bits: Of a weight.
        group_size: Weights of one output channel that share a scale; a power of two from 16 on.
        symmetric: No zero points.
        rounding: "rtn" to the nearest, "gptq" with the error passed on to what is rounded later
            (needs calibration data), "hqq" with zero points fitted without data.
        form: "operators" (MatMulNBits) for ONNX Runtime, "blocked" (DequantizeLinear with a block
            size, opset 21) for engines.
        rest: Precision of activations and non-quantized ops; "float16" in the blocked form alone.
        keep: Names of excluded linear layers.
        at_most: What all constants of the graph may take, as a share of what they take in fp16:
            0.25 for a quarter. Layers go to half the bits until it holds, those that move the
            embedding least per byte saved (needs calibration data; see size_target.py). None sets
            no target. Operators form only: the blocked one has no 2 bits.
        lowered: Names of layers and tables at half the bits; empty lets `at_most` choose.

    Raises:
        QuantizationError: If the group size is not one that a runtime takes, the target is no share
            of fp16, or the form does not go with rest, target or lowered layers.
    """

    bits: Literal[4, 8] = 4
    group_size: int = 32
    symmetric: bool = True
    rounding: Literal["rtn", "gptq", "hqq"] = "rtn"
    form: Literal["operators", "blocked"] = "operators"
    rest: Rest = "float32"
    keep: tuple[str, ...] = ()
    at_most: float | None = None
    lowered: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.at_most is not None and not 0.0 < self.at_most < 1.0:
            raise QuantizationError(
                f"at_most: got {self.at_most:g}, expected a share of the fp16 size between 0 and "
                "1, such as 0.25 (at25) for a quarter."
            )
        if self.form == "blocked" and (self.at_most is not None or self.lowered):
            raise QuantizationError(
                "A size target takes some layers to half the bits: got the blocked form, which has "
                "no 2 bits, as engines take none. Pass WeightOnly(form='operators', at_most=...) "
                "(int4-at25), or leave the target out."
            )
        if self.group_size < 16 or self.group_size & (self.group_size - 1):
            raise QuantizationError(
                f"group_size: got {self.group_size}, expected a power of two from 16 on."
            )
        if self.rest == "float16" and self.form != "blocked":
            raise QuantizationError(
                "fp16 for non-quantized ops is for engines: got the form of ONNX Runtime on CPU, "
                "where float16 is slow. Pass WeightOnly(form='blocked', rest='float16') "
                "(int4-blocked-half), or rest='float32'."
            )


QuantizationConfig: TypeAlias = Float16 | BFloat16 | Float8 | DynamicInt8 | StaticInt8 | WeightOnly
