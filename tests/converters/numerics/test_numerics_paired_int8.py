"""Int8 weights whose pairs fit into sums of 16 bits."""

from __future__ import annotations

import numpy as np
import pytest

from mmedge.converters.numerics.int8_rounding import quantize_weight, relative_error
from mmedge.converters.numerics.paired_int8 import pair_weight
from mmedge.specs import Array, Float32Array


def plain_scales(weight: Float32Array) -> Float32Array:
    return quantize_weight(weight, axis=1)[1]


def sums(quantized: Array) -> Array:
    """The largest sizes that the products of a pair can add up to, over 255."""
    padded = np.abs(np.pad(quantized.astype(int), ((0, len(quantized) % 2), (0, 0))))
    return np.asarray(padded[0::2] + padded[1::2])


@pytest.mark.parametrize("rows", [64, 65, 1])
def test_no_pair_can_saturate(rows: int) -> None:
    weight = np.random.default_rng(0).standard_normal((rows, 40)).astype(np.float32)
    weight[:, 0] = 1.0  # every pair would be twice too much
    weight[:, 1] = 0.0
    weight[::2, 2], weight[1::2, 2] = 3.0, -3.0
    quantized, scales = pair_weight(weight, plain_scales(weight))
    assert (quantized.dtype, quantized.shape) == (np.int8, weight.shape)
    assert (scales.dtype, scales.shape) == (np.float32, (40,))
    assert sums(quantized).max() <= 128
    np.testing.assert_allclose((quantized * scales)[:, :3], weight[:, :3], rtol=1e-6)


def test_the_error_is_well_below_that_of_seven_bits() -> None:
    weight = np.random.default_rng(1).standard_normal((512, 64)).astype(np.float32)
    plain, scales = quantize_weight(weight, axis=1)
    halved = np.float32(2) * scales
    seven_bits = relative_error(weight, np.rint(weight / halved) * halved)
    quantized, wider = pair_weight(weight, scales)
    error = relative_error(weight, quantized * wider)
    assert relative_error(weight, plain * scales) < error < 0.8 * seven_bits


def test_large_weights_with_small_neighbours_keep_the_whole_range() -> None:
    weight = np.random.default_rng(2).uniform(-0.01, 0.01, (64, 8)).astype(np.float32)
    weight[4] = 1.0
    plain, scales = quantize_weight(weight, axis=1)
    quantized, same = pair_weight(weight, scales)
    np.testing.assert_array_equal(quantized, plain)
    np.testing.assert_array_equal(same, scales)
