"""Rounding weights by groups: to the nearest, with HQQ and with GPTQ."""

from __future__ import annotations

import numpy as np
import pytest

from mmedge.converters.numerics.group_rounding import (
    Bits,
    GroupedValues,
    gptq,
    hqq,
    relative_error,
    round_to_nearest,
)
from mmedge.errors import QuantizationError
from mmedge.specs import Array, Float32Array


def weights(inputs: int = 96, outputs: int = 40, seed: int = 0) -> Float32Array:
    return (np.random.default_rng(seed).standard_t(4, (inputs, outputs)) * 0.02).astype(np.float32)


def correlated(rows: int, inputs: int, seed: int = 1) -> Float32Array:
    rng = np.random.default_rng(seed)
    few = rng.standard_normal((rows, inputs // 8)) @ np.random.default_rng(9).standard_normal(
        (inputs // 8, inputs)
    )
    return (few + 0.2 * rng.standard_normal((rows, inputs))).astype(np.float32)


def moment_of(x: Float32Array) -> Array:
    return x.T @ x / len(x)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "bound"),
    [(2, 1.0), (4, 0.6), (8, 0.51)],  # of a step of the full range
)
def test_errors_are_within_a_step(bits: Bits, bound: float, symmetric: bool) -> None:
    matrix = np.random.default_rng(0).uniform(-1, 1, (64, 8)).astype(np.float32)
    quantized = round_to_nearest(matrix, bits, 32, symmetric=symmetric)
    step = 2.0 / (2**bits - 2 if symmetric else 2**bits - 1)
    error = np.abs(quantized.matrix() - matrix)
    assert error.max() < (bound + 0.5) * step  # what is clipped may err by more than half a step
    assert np.sqrt(np.square(error).mean()) < step / 3
    assert quantized.values.max() <= 2**bits - 1
    assert (quantized.scales > 0).all()
    assert (quantized.zero_points == 2 ** (bits - 1)).all() == symmetric


def test_more_bits_smaller_groups_and_zero_points_each_err_less() -> None:
    matrix = weights(128)

    def error(bits: Bits, group_size: int, symmetric: bool) -> float:
        return relative_error(
            matrix, round_to_nearest(matrix, bits, group_size, symmetric=symmetric)
        )

    assert error(8, 32, True) < error(4, 32, True) / 8
    assert error(4, 32, True) < error(2, 32, True) / 2
    assert error(4, 16, True) < error(4, 32, True) < error(4, 128, True)
    assert error(4, 32, False) < error(4, 32, True)


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq"])
@pytest.mark.parametrize(("inputs", "group_size"), [(75, 32), (20, 16), (130, 128), (9, 16)])
def test_groups_that_do_not_divide_the_inputs(method: str, inputs: int, group_size: int) -> None:
    matrix = weights(inputs)
    if method == "gptq":
        quantized = gptq(
            matrix, moment_of(correlated(500, max(inputs, 8))[:, :inputs]), 8, group_size
        )
    else:
        quantized = (round_to_nearest if method == "rtn" else hqq)(matrix, 8, group_size)
    assert quantized.values.shape == (40, -(-inputs // group_size), group_size)
    assert quantized.matrix().shape == matrix.shape
    assert relative_error(matrix, quantized) < 0.02
    tail = quantized.values.reshape(40, -1)[:, inputs:]
    assert (tail == quantized.zero_points[:, -1:]).all()  # dequantizes to nothing


def p_error(matrix: Float32Array, quantized: GroupedValues) -> float:
    return float(np.power(np.abs(matrix - quantized.matrix()), 0.7).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_hqq_reduces_the_error_that_it_minimises(bits: Bits, symmetric: bool) -> None:
    matrix = weights(128, 64)
    nearest = round_to_nearest(matrix, bits, 32, symmetric=symmetric)
    fitted = hqq(matrix, bits, 32, symmetric=symmetric)
    assert p_error(matrix, fitted) < 0.99 * p_error(matrix, nearest)


@pytest.mark.parametrize("most_active_first", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 256])
def test_gptq_errs_less_in_outputs_of_correlated_inputs(
    group_size: int, symmetric: bool, most_active_first: bool
) -> None:
    matrix = weights(256)
    seen, unseen = correlated(2000, 256), correlated(500, 256, seed=2)
    nearest = round_to_nearest(matrix, 4, group_size, symmetric=symmetric)
    made = gptq(
        matrix,
        moment_of(seen),
        4,
        group_size,
        symmetric=symmetric,
        most_active_first=most_active_first,
    )

    def output_error(quantized: GroupedValues) -> float:
        return float(np.linalg.norm(unseen @ (quantized.matrix() - matrix)))

    assert output_error(made) < 0.6 * output_error(nearest)
    assert made.values.shape == nearest.values.shape


def test_gptq_of_uncorrelated_inputs_rounds_to_nearest() -> None:
    matrix = weights()
    nearest = round_to_nearest(matrix, 4, 32)
    made = gptq(matrix, np.eye(96, dtype=np.float32), 4, 32)
    np.testing.assert_array_equal(made.values, nearest.values)
    np.testing.assert_array_equal(made.scales, nearest.scales)


def test_gptq_keeps_weights_of_inputs_that_were_always_zero() -> None:
    matrix = weights()
    x = correlated(1000, 96)
    x[:, 40:48] = 0.0
    made = gptq(matrix, moment_of(x), 8, 32)
    assert np.abs(made.matrix()[40:48] - matrix[40:48]).max() < 0.003
    assert np.linalg.norm(made.matrix()[40:48]) > 0.9 * np.linalg.norm(matrix[40:48])


def test_gptq_takes_moments_that_are_singular_or_zero() -> None:
    matrix = weights()
    few = correlated(5, 96)  # rank 5
    for moment in (moment_of(few), np.zeros((96, 96), np.float32)):
        assert relative_error(matrix, gptq(matrix, moment, 8, 32)) < 0.05


@pytest.mark.parametrize("method", [round_to_nearest, hqq])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-30, 1e30])
def test_constant_groups_are_held(method: object, symmetric: bool, value: float) -> None:
    matrix = np.full((64, 4), value, np.float32)
    quantized = method(matrix, 4, 32, symmetric=symmetric)  # type: ignore[operator]
    np.testing.assert_allclose(quantized.matrix(), matrix, rtol=0.07, atol=1e-30)


def test_scales_are_fp16_unless_weights_are_too_small_for_it() -> None:
    matrix = weights()
    assert round_to_nearest(matrix, 4, 32).scales.dtype == np.float16
    small = round_to_nearest(matrix * np.float32(0.1), 4, 32)  # as fresh weights of deep models
    assert small.scales.dtype == np.float16
    assert relative_error(matrix * np.float32(0.1), small) < 0.15
    tiny = round_to_nearest(matrix * np.float32(1e-6), 4, 32)
    assert tiny.scales.dtype == np.float32
    assert relative_error(matrix * np.float32(1e-6), tiny) < 0.15
    mixed = matrix.copy()
    mixed[:, 3] *= np.float32(1e-9)  # one column too small for fp16 becomes nothing
    quantized = round_to_nearest(mixed, 4, 32)
    assert quantized.scales.dtype == np.float16
    assert np.abs(quantized.matrix()[:, 3]).max() == 0.0


def test_sizes_are_those_of_what_is_stored() -> None:
    quantized = round_to_nearest(weights(96, 40), 4, 32)
    assert quantized.size_bytes == 96 * 40 // 2 + 2 * 3 * 40
    quantized = round_to_nearest(weights(96, 40), 4, 32, symmetric=False)
    assert quantized.size_bytes == 96 * 40 // 2 + 2 * 3 * 40 + 2 * 40


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(broken: float) -> None:
    matrix = weights()
    moment = np.eye(96, dtype=np.float32)
    moment[2, 2] = broken
    with pytest.raises(QuantizationError, match="Second moment is NaN or infinite"):
        gptq(matrix, moment, 4, 32)
    matrix[1, 1] = broken
    with pytest.raises(QuantizationError, match="matrix of finite numbers"):
        round_to_nearest(matrix, 4, 32)


def test_moments_of_another_layer_and_odd_groups_are_refused() -> None:
    with pytest.raises(QuantizationError, match=r"got \(64, 64\), expected \(96, 96\)"):
        gptq(weights(), np.eye(64), 4, 32)
    with pytest.raises(QuantizationError, match="group_size: got 24"):
        hqq(weights(), 4, 24)
