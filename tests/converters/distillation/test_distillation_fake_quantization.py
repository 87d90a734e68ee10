"""Fake quantization: the numbers of the int8 pass, and gradients as the papers give them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mmedge.converters.distillation.fake_quantization import (
    ActivationQuantizer,
    FakeQuantized,
    RoundedWeight,
)
from mmedge.converters.numerics.int8_rounding import Range, quantize_weight
from mmedge.errors import QuantizationError


class _Attention(nn.Module):
    """Three layers that read one tensor and one that reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.out = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.out(self.q(x) * self.k(x) + self.v(x.view(-1, 4)).view(x.shape))
        return hidden


def every_range(low: float = -1.0, high: float = 1.0) -> dict[str, Range]:
    return {name: Range(low, high) for name in ("q", "k", "v", "out")}


def test_weights_are_those_of_the_int8_pass() -> None:
    weight = np.random.default_rng(0).normal(0, 1, (6, 10)).astype(np.float32)
    weight[2] = 0.0
    quantized, scales = quantize_weight(weight, axis=0)
    got = RoundedWeight()(torch.from_numpy(weight))
    np.testing.assert_array_equal(got.numpy(), quantized * scales[:, None])


def test_a_weights_gradient_passes_straight_through() -> None:
    weight = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
    RoundedWeight()(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones(3, 4))


@pytest.mark.parametrize("given", [Range(-0.7, 2.1), Range(0.0, 3.0), Range(-5.0, 0.0)])
def test_activations_are_those_of_a_quantize_linear(given: Range) -> None:
    quantizer = ActivationQuantizer(given)
    scale, zero = quantizer.range().affine()
    assert (scale, zero) == (pytest.approx(given.affine()[0], rel=1e-6), given.affine()[1])
    x = np.random.default_rng(1).normal(0, 2, 1000).astype(np.float32)
    quantized = np.clip(np.rint(x / np.float32(scale)) + zero, 0, 255)
    with torch.no_grad():
        got = quantizer(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(got, ((quantized - zero) * np.float32(scale)).astype(np.float32))


def test_symmetric_activations_have_zero_point_0() -> None:
    quantizer = ActivationQuantizer(Range(-0.5, 2.54), symmetric=True)
    assert quantizer.range().high == pytest.approx(2.54)
    assert quantizer.range().low == -quantizer.range().high
    assert not quantizer.offset.requires_grad


def test_the_step_and_the_zero_point_learn_as_in_lsq_plus() -> None:
    quantizer = ActivationQuantizer(Range(-1.0, 1.55))  # step 0.01, zero point 100
    # Inside, below and above what can be represented.
    x = torch.tensor([0.123, -4.0, 9.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([1.0, 0.0, 0.0]))
    # Esser et al. eq. 3: round(v) - v inside, the outermost value beyond; times the step, as
    # its logarithm is learned.
    expected = (12 - 12.3) + (0 - 100) + (255 - 100)
    assert float(quantizer.log_step.grad) == pytest.approx(0.01 * expected, rel=1e-3)
    # Bhalgat et al.: only what is clamped; a zero point higher by 1 moves it by a step downwards.
    assert float(quantizer.offset.grad) == pytest.approx(255 * 2 * -0.01, rel=1e-3)


def test_layers_that_read_one_tensor_share_a_quantizer() -> None:
    ranges = every_range() | {"k": Range(-3.0, 0.5)}
    student = FakeQuantized(_Attention(), ranges, [torch.zeros(1, 3, 4)])
    assert len(student.quantizers) == 2
    learned = student.ranges()
    assert learned["q"] == learned["k"] == learned["v"] != learned["out"]
    # What any of them was seen to read is within.
    assert learned["q"].low == pytest.approx(-3.0, rel=0.01)
    assert learned["q"].high == pytest.approx(1.0, rel=0.02)


def test_excluded_layers_and_layers_without_a_range_stay_in_float() -> None:
    module = _Attention()
    ranges = every_range()
    del ranges["out"]
    student = FakeQuantized(module, ranges, [torch.zeros(1, 3, 4)], keep=("v",))
    assert set(student.ranges()) == {"q", "k"}
    assert torch.equal(student.module.v.weight, module.v.weight)
    assert not torch.equal(student.module.q.weight, module.q.weight)


def test_the_module_itself_is_not_changed() -> None:
    module = _Attention()
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    before = module(x)
    FakeQuantized(module, every_range(), [x])
    assert torch.equal(module(x), before)


def test_names_without_a_layer_are_reported_and_keep_their_range() -> None:
    ranges = every_range() | {"elsewhere": Range(-7.0, 7.0)}
    student = FakeQuantized(_Attention(), ranges, [torch.zeros(1, 3, 4)])
    assert student.untouched == ("elsewhere",)
    assert student.ranges()["elsewhere"] == Range(-7.0, 7.0)


def test_large_tables_are_rounded_row_by_row_and_small_ones_are_not() -> None:
    large, small = nn.Embedding(4096, 16), nn.Embedding(64, 16)
    module = nn.Sequential(large, nn.Linear(16, 4))
    student = FakeQuantized(module, {"1": Range(-1, 1)}, [torch.zeros(1, 2, dtype=torch.int64)])
    quantized, scales = quantize_weight(large.weight.detach().numpy(), axis=0)
    rounded = student.module[0].weight.detach().numpy()  # type: ignore[index, union-attr]
    np.testing.assert_array_equal(rounded, quantized * scales[:, None])
    module = nn.Sequential(small, nn.Linear(16, 4))
    student = FakeQuantized(module, {"1": Range(-1, 1)}, [torch.zeros(1, 2, dtype=torch.int64)])
    assert torch.equal(student.module[0].weight, small.weight)  # type: ignore[index]


def test_a_module_without_linear_layers_is_refused() -> None:
    with pytest.raises(QuantizationError, match="Nothing to train"):
        FakeQuantized(nn.LayerNorm(4), every_range(), [torch.zeros(1, 4)])


def test_a_range_that_is_not_finite_names_its_layer() -> None:
    with pytest.raises(QuantizationError, match="'out' reads is NaN or infinite"):
        FakeQuantized(
            _Attention(), every_range() | {"out": Range(0, float("inf"))}, [torch.zeros(1, 3, 4)]
        )
