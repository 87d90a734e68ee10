"""Bias correction: the mean of a quantized layer's output is that of the float one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from mmedge.converters.numerics.int8_rounding import quantize_weight
from mmedge.converters.passes.linears import Linear
from mmedge.converters.quantization.bias_correction import corrected_bias
from mmedge.errors import QuantizationError
from mmedge.specs import Array

RNG = np.random.default_rng(3)
WEIGHT = RNG.standard_normal((20, 6)).astype(np.float32)
BIAS = RNG.standard_normal(6).astype(np.float32)
X = (RNG.standard_normal((500, 20)) + np.linspace(-3, 5, 20)).astype(np.float32)
# Coarse, so that there is something to correct.
SCALES = (np.abs(WEIGHT).max(0) / 3).astype(np.float32)
QUANTIZED = np.rint(WEIGHT / SCALES).astype(np.int8)


def held(name: str, array: Array) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), const_value=tensor)
    value.type = ir.TensorType(tensor.dtype)
    return value


def layer(*, bias: bool = True, transposed: bool = False) -> Linear:
    x = ir.Value(name="x")
    weight = held("layer.weight", WEIGHT.T.copy() if transposed else WEIGHT)
    node = ir.node("MatMul", [x, weight])
    given = held("layer.bias", BIAS) if bias else None
    return Linear(node, weight, transposed, given, node.outputs[0])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_mean_output_is_the_float_layers(bias: bool, transposed: bool) -> None:
    corrected = corrected_bias(
        layer(bias=bias, transposed=transposed), QUANTIZED, SCALES, X.mean(0)
    )
    assert corrected.dtype == np.float32
    assert corrected.shape == (6,)
    before = BIAS if bias else np.zeros(6, np.float32)
    wanted, quantized = X @ WEIGHT + before, X @ (QUANTIZED * SCALES)
    assert np.abs((quantized + before - wanted).mean(0)).max() > 0.1
    np.testing.assert_allclose((quantized + corrected).mean(0), wanted.mean(0), atol=1e-4)


def test_the_mean_shift_of_quantized_activations_goes_too() -> None:
    clipped = np.clip(np.rint(X), -2, 3)
    corrected = corrected_bias(layer(), QUANTIZED, SCALES, X.mean(0), clipped.mean(0))
    wanted = (X @ WEIGHT + BIAS).mean(0)
    np.testing.assert_allclose(
        (clipped @ (QUANTIZED * SCALES) + corrected).mean(0), wanted, atol=1e-4
    )


def test_exact_int8_weights_keep_their_bias() -> None:
    exact = held("layer.weight", (QUANTIZED * 0.5).astype(np.float32))
    quantized, scales = quantize_weight(np.vstack([QUANTIZED * 0.5, np.full((1, 6), 63.5)]), axis=1)
    assert (scales == 0.5).all()
    same = corrected_bias(replace(layer(), weight=exact), quantized[:-1], scales, X.mean(0))
    np.testing.assert_array_equal(same, BIAS)


def test_a_mismatch_is_refused_by_name() -> None:
    mean = X.mean(0)
    with pytest.raises(QuantizationError, match=r"'layer': got .*expected"):
        corrected_bias(layer(), QUANTIZED.T, SCALES, mean)
    with pytest.raises(QuantizationError, match=r"'layer': got .*expected"):
        corrected_bias(layer(), QUANTIZED, SCALES, mean, mean[1:])
    with pytest.raises(QuantizationError, match="NaN or infinite"):
        corrected_bias(layer(), QUANTIZED, SCALES, np.full(20, np.nan, np.float32))
    computed = replace(layer(), bias=ir.Value(name="computed"))
    with pytest.raises(QuantizationError, match="is computed"):
        corrected_bias(computed, QUANTIZED, SCALES, mean)
