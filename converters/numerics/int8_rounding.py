"""Rounding to int8: ranges, scales and quantized weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mmedge.errors import QuantizationError
from mmedge.specs import Array, Float32Array

__all__ = ["Range", "calibrated_range", "half_scales", "quantize_weight", "relative_error"]

_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


# Below 2**-14 float16 has fewer digits, which is no loss to values chosen for the scale as stored.
_SMALLEST_HALF = np.float32(2.0**-20)


_LARGEST_HALF = 60000.0


@dataclass(frozen=True, slots=True)
class Range:
    """Smallest and largest value of a tensor over the calibration data, clipped or not."""

    low: float
    high: float

    def affine(self) -> tuple[float, int]:
        """Return the scale and the zero point of uint8; zero is exactly representable."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = _storable((high - low) / 255.0)
        return scale, int(np.clip(round(-low / scale), 0, 255))

    def symmetric(self, *, half: bool = False) -> float:
        """Return the scale of int8 with zero point 0.

        Args:
            half: One that float16 holds.
        """
        scale = _storable(max(abs(self.low), abs(self.high)) / 127.0)
        return float(half_scales(np.array([scale], np.float32))[0]) if half else scale


def calibrated_range(ranges: Mapping[str, Range], x: ir.Value) -> Range:
    """Return the range of an activation.

    Args:
        ranges: By tensor name.
        x: The activation.

    Raises:
        QuantizationError: If it is missing, or not finite.
    """
    found = ranges.get(x.name or "")
    if found is None:
        raise QuantizationError(
            f"No calibrated range for '{x.name}'. Collect ranges for all quantizable inputs."
        )
    if not (np.isfinite(found.low) and np.isfinite(found.high)):
        raise QuantizationError(
            f"Activation '{x.name}' is NaN or infinite on the calibration data: range "
            f"[{found.low}, {found.high}]. Check the data, or leave this role in float."
        )
    return found


def _storable(scale: float) -> float:
    """Return a scale as float32 holds it; 1 for one so small that a processor takes it for 0."""
    rounded = float(np.float32(scale))
    return rounded if rounded >= _SMALLEST_SCALE else 1.0


def half_scales(scales: Float32Array) -> Float32Array:
    """Return scales (N,) that float16 holds, so that values are chosen for what is stored.

    Those that are too small for it are raised, unless all of them are: then they are left alone,
    and stay in float32.
    """
    if not scales.size or not _SMALLEST_HALF <= scales.max() <= _LARGEST_HALF:
        return scales
    return np.maximum(scales, _SMALLEST_HALF).astype(np.float16).astype(np.float32)


def quantize_weight(
    weight: Float32Array, axis: int, *, half: bool = False
) -> tuple[Array, Float32Array]:
    """Quantize symmetrically, one scale for each index of `axis`.

    Args:
        weight: Two axes.
        axis: The axis that keeps a scale for each index.
        half: Scales that float16 holds.

    Returns:
        int8 of the same shape in [-127, 127], and the scales along `axis`.
    """
    largest = np.abs(weight).max(axis=1 - axis)
    # What is too small for a scale is nothing beside any activation, and becomes 0.
    scales = (np.where(largest >= 127 * _SMALLEST_SCALE, largest, 1.0) / 127.0).astype(np.float32)
    scales = half_scales(scales) if half else scales
    spread = np.expand_dims(scales, 1 - axis)
    return np.clip(np.rint(weight / spread), -127, 127).astype(np.int8), scales


def relative_error(matrix: Float32Array, approximation: Float32Array) -> float:
    """Return ||W - Wq||_F / ||W||_F, 0 for a matrix of zeros that stayed so."""
    size = float(np.linalg.norm(matrix))
    error = float(np.linalg.norm(matrix - approximation))
    return error / size if size else error
