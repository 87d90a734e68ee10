"""Bias correction for the mean error of quantized linear layers.

Rounding a weight moves the mean of a layer's output by E[x] dW. That is known after calibration and
constant, so the bias can take it back.

Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
section 4.2, with E[x] measured instead of derived (appendix D).
"""

from __future__ import annotations

import numpy as np

from mmedge.converters.passes.linears import Linear
from mmedge.converters.passes.matching import constant
from mmedge.errors import QuantizationError
from mmedge.specs import Array, Float32Array

__all__ = ["corrected_bias"]


def corrected_bias(
    linear: Linear,
    quantized: Array,
    scales: Array,
    mean: Array,
    quantized_mean: Array | None = None,
) -> Float32Array:
    """Return the bias that gives a quantized layer the float layer's mean output.

    Args:
        linear: The layer in float. Without a bias, its correction is counted from 0.
        quantized: (in, out) integers of its quantized weight.
        scales: (out,) their scales.
        mean: (in,) mean of its input over calibration data, from `collect_channels`.
        quantized_mean: (in,) mean of the input after its own quantization, where rounding or
            clipping moves it. None: as `mean`.

    Returns:
        (out,) float32.

    Raises:
        QuantizationError: If the shapes do not go together, or the means are not finite.
    """
    inputs, outputs = linear.shape
    seen = mean if quantized_mean is None else quantized_mean
    expected = {"quantized": (inputs, outputs), "scales": (outputs,), "mean": (inputs,)}
    got = {"quantized": quantized.shape, "scales": scales.shape, "mean": mean.shape}
    if got != expected or seen.shape != mean.shape:
        raise QuantizationError(
            f"Bias correction of '{linear.name}': got {got}, expected {expected}. "
            "Pass quantized weights, scales and means of this layer."
        )
    if not (np.isfinite(mean).all() and np.isfinite(seen).all()):
        raise QuantizationError(
            f"Bias correction of '{linear.name}': its input has a mean that is NaN or infinite. "
            "Check the calibration data, or leave this layer in float."
        )
    bias = constant(linear.bias)
    if linear.bias is not None and bias is None:
        raise QuantizationError(
            f"Bias correction of '{linear.name}': its bias is computed, not a constant. "
            "Leave bias correction off, or this layer in float."
        )
    before = np.zeros(outputs) if bias is None else bias.astype(np.float64)
    wanted = mean.astype(np.float64) @ linear.matrix()
    made = (seen.astype(np.float64) @ quantized.astype(np.float64)) * scales
    corrected: Float32Array = (before + wanted - made).astype(np.float32)
    return corrected
