"""Saturation-safe int8 weights for x86 without VNNI (`paired` methods).

An x86 processor without VNNI multiplies uint8 by int8 with VPMADDUBSW, which adds the products of
two neighbours along the input in 16 bits and saturates there: 255 * 127 * 2 is twice too much.
ONNX Runtime then gives wrong outputs or, with exact sums requested, takes up to a third longer.
With |w0| + |w1| <= 128 the sum is 32640 at most: the fast kernel is exact.

Halving the range does that too, at twice the rounding error. Large neighbours of large weights
are rare, so here only such pairs are cut, and each column takes the scale with which
rounding and cutting together err least: about 1.4 times the error of plain int8 where weights are
spread as a normal distribution.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, VPMADDUBSW.
"""

from __future__ import annotations

import numpy as np

from mmedge.specs import Array, Float32Array

__all__ = ["pair_weight"]

_LARGEST_SUM = 128
# What the largest weight of a column becomes: from the range in which nothing is ever cut to the
# whole range of int8.
_TOPS = (64, 72, 80, 88, 96, 104, 112, 120, 127)
_COLUMNS = 64  # at a time, so that what is tried stays in the caches


def pair_weight(weight: Float32Array, scales: Float32Array) -> tuple[Array, Float32Array]:
    """Quantize symmetrically, one scale a column, so that no pair of values passes 128.

    Args:
        weight: (in, out), finite. A pair is an even row and the next.
        scales: (out,) those of plain int8, with which the largest weight becomes 127.

    Returns:
        (in, out) int8, and (out,) float32 scales.
    """
    quantized = np.zeros((len(weight) + len(weight) % 2, len(scales)), np.int8)
    chosen = np.zeros(len(scales), np.float32)
    for start in range(0, len(scales), _COLUMNS):
        part = slice(start, start + _COLUMNS)
        quantized[:, part], chosen[part] = _pair_columns(weight[:, part], scales[part])
    return quantized[: len(weight)], chosen


def _pair_columns(weight: Float32Array, scales: Float32Array) -> tuple[Array, Float32Array]:
    """Return the values of least error, padded to an even number of rows, and the scales."""
    padded = np.pad(weight, ((0, len(weight) % 2), (0, 0)))
    pairs = padded.reshape(-1, 2, len(scales))
    least = np.full(len(scales), np.inf, np.float32)
    quantized, chosen = np.zeros_like(pairs), scales
    for top in _TOPS:
        wider = scales * np.float32(127 / top)
        found = _cut(np.rint(pairs / wider))
        errors = np.square(found * wider - pairs).sum(axis=(0, 1))
        better = errors < least
        np.copyto(quantized, found, where=better)
        chosen = np.where(better, wider, chosen)
        least = np.minimum(errors, least)
    return quantized.reshape(padded.shape), chosen


def _cut(values: Float32Array) -> Float32Array:
    """Clip pairs (pairs, 2, out) to the limit, both values alike."""
    sizes = np.abs(values)
    excess = np.maximum(sizes.sum(axis=1) - _LARGEST_SUM, 0)
    # Codes are at most 127, so each of a pair that is too much is larger than half of what is.
    half = np.floor(excess / 2)
    sizes[:, 0] -= excess - half
    sizes[:, 1] -= half
    return np.copysign(sizes, values)
