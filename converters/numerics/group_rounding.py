"""Group-wise quantization of weights, rounded in one of three ways.

A linear layer's matrix is (in, out). A group is `group_size` consecutive inputs of one output; its
weights are scale * (value - zero point), values unsigned. Symmetric: every zero point is the middle
value, so none need be stored.

- `round_to_nearest`: each weight to the nearest value. The scale is that of a few candidates, from
  the full range inwards, which errs least in squares.
- `hqq`: the grid is fitted to the values by half-quadratic splitting, for an error that forgives
  outliers (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models").
  Theirs keeps the scale and lets zero points be any number; the products that runtimes execute fast
  take whole ones, so here the scale is fitted too. Needs no data.
- `gptq`: rounds one input after the other and lets those still to come make up for the error
  (Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
  Transformers", Algorithm 1). Needs the second moment of the layer's inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mmedge.converters.numerics.int8_rounding import relative_error as matrix_error
from mmedge.errors import QuantizationError
from mmedge.specs import Array, Float32Array

__all__ = [
    "Bits",
    "GroupedValues",
    "gptq",
    "hqq",
    "placeholder_values",
    "relative_error",
    "round_to_nearest",
]

Bits: TypeAlias = Literal[2, 4, 8]

# Scales are stored in fp16 where it holds them. Below 2**-14 its steps grow coarse, at the limit to
# 6 % of a scale; values are chosen for the scale as stored.
_HALF_SMALLEST = 2.0**-20
_HALF_LARGEST = 60000.0
_SINGLE_SMALLEST = float(np.finfo(np.float32).tiny)
# How far a range is drawn in: what clipping the few largest costs, all the others gain.
_SHRINKING: dict[int, tuple[float, ...]] = {
    2: tuple(np.linspace(1.0, 0.4, 13)),
    4: tuple(np.linspace(1.0, 0.7, 9)),
    8: (1.0,),
}
_CHUNK = 1 << 20  # weights looked at together: they stay in the processor's cache

_HQQ_NORM = 0.7  # the p of the paper, and the schedule of its proximal steps
_HQQ_BETA = 10.0
_HQQ_BETA_GROWTH = 1.01
_HQQ_STEPS = 20

_GPTQ_BLOCK = 128
_GPTQ_DAMPING_TRIES = 4


@dataclass(frozen=True, slots=True)
class GroupedValues:
    """A matrix (in, out) in few bits.

    Attributes:
        values: (out, groups, group_size) uint8, each below 2**bits. What pads the last group beyond
            `in` dequantizes to 0.
        scales: (out, groups) float16 or float32, positive.
        zero_points: (out, groups) uint8.
        inputs: Size of `in`.
        bits: Of a quantized value.
        symmetric: Whether every zero point is 2**(bits - 1).
    """

    values: NDArray[np.uint8]
    scales: Array
    zero_points: NDArray[np.uint8]
    inputs: int
    bits: Bits
    symmetric: bool

    @property
    def group_size(self) -> int:
        """Weights that share a scale."""
        return int(self.values.shape[2])

    def matrix(self) -> Float32Array:
        """Return the dequantized matrix, (in, out)."""
        steps = self.values.astype(np.float32) - self.zero_points[..., None]
        steps *= self.scales.astype(np.float32)[..., None]
        return np.ascontiguousarray(steps.reshape(steps.shape[0], -1)[:, : self.inputs].T)

    @property
    def size_bytes(self) -> int:
        """Bytes of quantized values, scales and zero points, packed."""
        out, groups, group_size = self.values.shape
        per_byte = 8 // self.bits
        zero_points = 0 if self.symmetric else out * -(-groups // per_byte)
        return int(out * groups * group_size // per_byte + self.scales.nbytes + zero_points)


def relative_error(matrix: Float32Array, quantized: GroupedValues) -> float:
    """Return ||W - Wq|| / ||W|| in the Frobenius norm; 0 for a matrix of zeros."""
    return matrix_error(matrix, quantized.matrix())


def placeholder_values(
    matrix: Float32Array, bits: Bits, group_size: int, *, symmetric: bool = True
) -> GroupedValues:
    """Return placeholder values of the size of the matrix's."""
    inputs, outputs = matrix.shape
    groups = -(-inputs // group_size)
    return GroupedValues(
        np.zeros((outputs, groups, group_size), np.uint8),
        np.ones((outputs, groups), _scale_dtype(matrix, bits)),
        np.zeros((outputs, groups), np.uint8),
        inputs,
        bits,
        symmetric,
    )


def round_to_nearest(
    matrix: Float32Array, bits: Bits, group_size: int, *, symmetric: bool = True
) -> GroupedValues:
    """Quantize each weight to the nearest value of its group.

    Args:
        matrix: (in, out).
        bits: Of a quantized value.
        group_size: Inputs that share a scale; `in` need not be a multiple of it.
        symmetric: Without zero points.

    Raises:
        QuantizationError: If the matrix is not finite or the group size is out of range.
    """
    groups, dtype = _groups(matrix, bits, group_size)
    return _assemble(matrix, groups, dtype, bits, symmetric, fit=False)


def hqq(
    matrix: Float32Array, bits: Bits, group_size: int, *, symmetric: bool = False
) -> GroupedValues:
    """Quantize with grids fitted so that sum |W - Wq| ** 0.7 is small.

    Never worse in that error than `round_to_nearest`, group by group.

    Args:
        matrix: (in, out).
        bits: Of a quantized value.
        group_size: Inputs that share a scale; `in` need not be a multiple of it.
        symmetric: Without zero points: only scales are fitted.

    Raises:
        QuantizationError: If the matrix is not finite or the group size is out of range.
    """
    groups, dtype = _groups(matrix, bits, group_size)
    return _assemble(matrix, groups, dtype, bits, symmetric, fit=True)


def gptq(
    matrix: Float32Array,
    moment: Array,
    bits: Bits,
    group_size: int,
    *,
    symmetric: bool = True,
    damping: float = 0.01,
    most_active_first: bool = False,
) -> GroupedValues:
    """Quantize input by input, each compensating the rounding errors before it.

    An input that was always zero on the calibration data passes no error on and keeps its weights.

    Args:
        matrix: (in, out).
        moment: (in, in), X^T X / rows of the layer's inputs (see statistics.collect_moments).
        bits: Of a quantized value.
        group_size: Inputs that share a scale; `in` need not be a multiple of it.
        symmetric: Without zero points.
        damping: Added to the moment's diagonal, as a share of its mean.
        most_active_first: Round inputs in the order of their second moment, the largest first
            (the paper's "act-order"). Groups stay where they are, so their scales are those of the
            weights before any correction.

    Raises:
        QuantizationError: If the matrix or the moment is not finite, shapes differ, the group size
            is out of range, or the moment is singular in spite of damping.
    """
    groups, dtype = _groups(matrix, bits, group_size)
    inputs, outputs = matrix.shape
    factor, order = _upper_factor(moment, inputs, damping, most_active_first)
    scales = np.empty((groups.shape[1], outputs), np.float32)
    zeros = np.empty((groups.shape[1], outputs), np.float32)
    if most_active_first:
        fixed_scales, fixed_zeros = _grid(groups.reshape(-1, group_size), bits, symmetric, dtype)
        scales[:] = fixed_scales.reshape(outputs, -1).T
        zeros[:] = fixed_zeros.reshape(outputs, -1).T
    left = np.ascontiguousarray(matrix[order], np.float32)  # of rounded rows, what rounding took
    quantized = np.zeros((groups.shape[1] * group_size, outputs), np.uint8)
    top = float(2**bits - 1)
    block = max(_GPTQ_BLOCK, group_size)  # both powers of two: a group never spans two blocks
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        within = np.linalg.inv(factor[start:stop, start:stop])
        # The weights that make up best for all that was rounded before this block.
        rest = left[start:stop] + within.T.astype(np.float32) @ (
            factor[:start, start:stop].T.astype(np.float32) @ left[:start]
        )
        spread = within.astype(np.float32)
        for row in range(stop - start):
            at = int(order[start + row])
            group = at // group_size
            if not most_active_first and (start + row) % group_size == 0:
                members = rest[row : row + group_size].T
                scales[group], zeros[group] = _grid(members, bits, symmetric, dtype)
            scale, zero = scales[group], zeros[group]
            chosen = np.clip(np.rint(rest[row] / scale) + zero, 0.0, top)
            quantized[at] = chosen
            rounded = (chosen - zero) * scale
            error = (rest[row] - rounded) / spread[row, row]
            rest[row + 1 :] -= spread[row, row + 1 :, None] * error
            left[start + row] -= rounded
    quantized[inputs:] = zeros[-1]
    packed = quantized.reshape(groups.shape[1], group_size, outputs).transpose(2, 0, 1)
    return GroupedValues(
        np.ascontiguousarray(packed),
        np.ascontiguousarray(scales.T).astype(dtype),
        np.ascontiguousarray(zeros.T).astype(np.uint8),
        inputs,
        bits,
        symmetric,
    )


def _upper_factor(
    moment: Array, inputs: int, damping: float, most_active_first: bool
) -> tuple[Array, NDArray[np.intp]]:
    """Return U, upper and float64, with the damped moment = U U^T, and the order.

    The factor that the paper takes of the moment's inverse is the inverse of U. Its blocks along
    the diagonal are the inverses of those of U, and no others are needed: an input that is to be
    rounded makes up for what was rounded before by a product with U.
    """
    if moment.shape != (inputs, inputs):
        raise QuantizationError(
            f"Second moment: got {moment.shape}, expected {(inputs, inputs)} for a layer of "
            f"{inputs} inputs. Collect it of the layer's own input."
        )
    if not np.isfinite(moment).all():
        raise QuantizationError(
            "Second moment is NaN or infinite. Check the calibration data, or round to nearest."
        )
    diagonal = np.diag(moment).astype(np.float64)
    order = np.argsort(-diagonal, kind="stable") if most_active_first else np.arange(inputs)
    curvature = moment[np.ix_(order, order)].astype(np.float64)
    curvature = (curvature + curvature.T) / 2
    active = diagonal[order] > 0.0
    mean = float(diagonal.mean()) or 1.0
    corner = np.arange(inputs)
    curvature[corner[~active], corner[~active]] = mean
    for attempt in range(_GPTQ_DAMPING_TRIES):
        damped = curvature.copy()
        damped[corner, corner] += damping * mean * 10.0**attempt
        try:
            # Of the reversed matrix the lower factor, reversed again, is the upper one.
            lower = np.linalg.cholesky(damped[::-1, ::-1])
        except np.linalg.LinAlgError:
            continue
        return np.ascontiguousarray(lower[::-1, ::-1]), order
    raise QuantizationError(
        f"Second moment of {inputs} inputs stays singular with its diagonal raised by "
        f"{damping * 10.0 ** (_GPTQ_DAMPING_TRIES - 1):g} of its mean. Use more calibration data, "
        "or round to nearest."
    )


def _groups(
    matrix: Float32Array, bits: Bits, group_size: int
) -> tuple[Float32Array, type[np.floating]]:
    """Return the matrix as (out, groups, group_size), padded with zeros, and the scales' dtype."""
    if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
        raise QuantizationError(
            f"Weight of shape {matrix.shape}: expected a matrix of finite numbers. "
            "Check the source model."
        )
    if group_size < 16 or group_size & (group_size - 1):
        raise QuantizationError(
            f"group_size: got {group_size}, expected a power of two from 16 on."
        )
    inputs, outputs = matrix.shape
    padded = np.zeros((outputs, -(-inputs // group_size) * group_size), np.float32)
    padded[:, :inputs] = matrix.T
    return padded.reshape(outputs, -1, group_size), _scale_dtype(matrix, bits)


def _scale_dtype(matrix: Float32Array, bits: int) -> type[np.floating]:
    largest = float(np.abs(matrix).max()) * 2 / (2**bits - 1)
    return np.float16 if 64 * _HALF_SMALLEST <= largest <= _HALF_LARGEST else np.float32


def _assemble(
    matrix: Float32Array,
    groups: Float32Array,
    dtype: type[np.floating],
    bits: Bits,
    symmetric: bool,
    *,
    fit: bool,
) -> GroupedValues:
    outputs, count, group_size = groups.shape
    flat = groups.reshape(-1, group_size)
    quantized = np.empty(flat.shape, np.uint8)
    scales = np.empty(len(flat), dtype)
    zeros = np.empty(len(flat), np.uint8)
    step = max(1, _CHUNK // group_size)
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        scale, zero = _grid(part, bits, symmetric, dtype)
        if fit:
            scale, zero = _fitted(part, scale, zero, bits, symmetric, dtype)
        scales[start : start + step] = scale
        zeros[start : start + step] = zero
        quantized[start : start + step] = _nearest(part, scale, zero, bits)
    return GroupedValues(
        quantized.reshape(groups.shape),
        scales.reshape(outputs, count),
        zeros.reshape(outputs, count),
        matrix.shape[0],
        bits,
        symmetric,
    )


def _nearest(part: Float32Array, scale: Float32Array, zero: Float32Array, bits: int) -> Array:
    """Return quantized values, as float32, of groups (G, group_size) on their grids (G,)."""
    quantized = part / scale[:, None]
    np.rint(quantized, out=quantized)
    quantized += zero[:, None]
    return np.clip(quantized, 0.0, float(2**bits - 1), out=quantized)


def _values(quantized: Array, scale: Float32Array, zero: Float32Array) -> Float32Array:
    found: Float32Array = (quantized - zero[:, None]) * scale[:, None]
    return found


def _storable(scale: Float32Array, dtype: type[np.floating]) -> Float32Array:
    """Return scales as stored; a group too small for any becomes zeros."""
    smallest = _HALF_SMALLEST if dtype is np.float16 else _SINGLE_SMALLEST
    largest = _HALF_LARGEST if dtype is np.float16 else float(np.finfo(np.float32).max)
    return np.clip(scale, smallest, largest).astype(dtype).astype(np.float32)


def _grid(
    part: Float32Array, bits: int, symmetric: bool, dtype: type[np.floating]
) -> tuple[Float32Array, Float32Array]:
    """Return the best scale and zero point (G,) for groups (G, group_size)."""
    middle, top = 2 ** (bits - 1), 2**bits - 1
    low = np.minimum(part.min(axis=1), 0.0)
    high = np.maximum(part.max(axis=1), 0.0)
    unit = np.maximum(high - low, _SINGLE_SMALLEST)[:, None]  # or squares leave float32
    best_error = np.full(len(part), np.inf, np.float32)
    best_scale = np.ones(len(part), np.float32)
    best_zero = np.full(len(part), middle, np.float32)
    for shrink in _SHRINKING[bits]:
        if symmetric:
            # The negative side has one value more than the positive.
            scale = np.maximum(-low / middle, high / (middle - 1)) * np.float32(shrink)
        else:
            # Halves first: the difference of two large numbers may not be a float32.
            scale = (high / top - low / top) * np.float32(shrink)
        scale = _storable(scale, dtype)
        zero = np.full(len(part), middle, np.float32)
        if not symmetric:
            zero = np.clip(np.rint(-low * np.float32(shrink) / scale), 0.0, top)
        if len(_SHRINKING[bits]) == 1:
            return scale, zero
        error = (part - _values(_nearest(part, scale, zero, bits), scale, zero)) / unit
        error = np.square(error).sum(axis=1)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_zero = np.where(better, zero, best_zero)
    return best_scale, best_zero


def _fitted(
    part: Float32Array,
    scale: Float32Array,
    zero: Float32Array,
    bits: int,
    symmetric: bool,
    dtype: type[np.floating],
) -> tuple[Float32Array, Float32Array]:
    """Return grids improved by half-quadratic steps, each group's best of all steps."""
    top = float(2**bits - 1)
    best_scale, best_zero = scale, zero
    best_error = np.full(len(part), np.inf, np.float32)
    beta = _HQQ_BETA / _HQQ_NORM
    unit = scale[:, None]  # errors are of the order of a step, whatever the weights are
    for _ in range(_HQQ_STEPS):
        quantized = _nearest(part, scale, zero, bits)
        error = part - _values(quantized, scale, zero)
        size = np.abs(error) / unit
        cost = np.power(size, _HQQ_NORM).sum(axis=1)
        better = cost < best_error
        best_error = np.where(better, cost, best_error)
        best_scale, best_zero = (
            np.where(better, scale, best_scale),
            np.where(better, zero, best_zero),
        )
        # The proximal operator of |e| ** p: what is large is taken for an outlier and set aside.
        threshold = np.power(np.maximum(size, 1e-8), _HQQ_NORM - 1.0) / beta
        outlying = np.sign(error) * np.maximum(size - threshold, 0.0) * unit
        target = part - outlying
        if not symmetric:
            shift = np.mean(quantized - target / scale[:, None], axis=1)
            zero = np.clip(np.rint(shift), 0.0, top).astype(np.float32)
        steps = quantized - zero[:, None]
        power = np.square(steps).sum(axis=1)
        along = (steps * target).sum(axis=1)
        fitted = np.where((power > 0.0) & (along > 0.0), along / np.maximum(power, 1.0), scale)
        scale = _storable(fitted.astype(np.float32), dtype)
        beta *= _HQQ_BETA_GROWTH
    return best_scale, best_zero
