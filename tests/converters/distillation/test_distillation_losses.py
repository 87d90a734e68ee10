"""The losses of distillation against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mmedge.converters.distillation.losses import contrastive_loss, joint_embedding_loss
from mmedge.errors import QuantizationError, ShapeError


def test_the_joint_embedding_loss_sums_squared_distances() -> None:
    f = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    g = torch.tensor([[0.0, 0.0], [3.0, 2.0]])
    # 1 for the first pair, 9 for the second.
    assert float(joint_embedding_loss(f, g)) == 10.0


def test_the_contrastive_loss_equals_the_formula() -> None:
    z = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    other = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # Cosines: first row 1 and 0.6, second row 0 and 0.8; the partner stands on the diagonal.
    first = -math.log(math.exp(1 / 0.5) / (math.exp(1 / 0.5) + math.exp(0.6 / 0.5)))
    second = -math.log(math.exp(0.8 / 0.5) / (math.exp(0.0) + math.exp(0.8 / 0.5)))
    got = float(contrastive_loss(z, other, 0.5))
    assert got == pytest.approx((first + second) / 2, abs=1e-6)


def test_identical_embeddings_cannot_be_ranked() -> None:
    same = torch.ones(5, 3)
    assert float(contrastive_loss(same, same, 0.07)) == pytest.approx(math.log(5), abs=1e-5)


def test_a_swapped_partner_costs_more() -> None:
    z = torch.eye(3)
    assert contrastive_loss(z, z, 0.1) < contrastive_loss(z, z.roll(1, 0), 0.1)


@pytest.mark.parametrize("shapes", [((2, 3), (3, 3)), ((3,), (3,))])
def test_unpaired_weights_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    one, other = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ShapeError, match="Embed the same samples"):
        joint_embedding_loss(one, other)
    with pytest.raises(ShapeError, match="Embed the same samples"):
        contrastive_loss(one, other, 1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(QuantizationError, match="temperature"):
        contrastive_loss(torch.eye(2), torch.eye(2), temperature)
