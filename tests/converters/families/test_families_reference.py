"""Inputs that the source's own model gets are fed, or shown to be without effect."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmedge.converters.families.reference import check_reference
from mmedge.errors import ParityError, SourceError

VALUES = torch.tensor([[1.0, 2.0, 0.0], [3.0, 1.0, 2.0]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


class Keeps(nn.Module):
    """Returns its first input, as a tower would its embedding."""

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor]:
        return (values,)


def pooled(values: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SimpleNamespace:
    """A reference that masks what is 0 anyway, scaled: a cosine does not see a scale."""
    return SimpleNamespace(
        pooler_output=2 * values * (1 if attention_mask is None else attention_mask)
    )


def test_an_input_without_effect_need_not_be_fed() -> None:
    given = {"values": VALUES, "attention_mask": MASK, "something_else": MASK}
    check_reference("text_encoder", Keeps(), {"values": VALUES}, pooled, given)


def test_an_input_with_an_effect_must_be_fed() -> None:
    values = VALUES + 1
    given = {"values": values, "attention_mask": MASK}
    with pytest.raises(ParityError, match="does not take attention_mask, which"):
        check_reference("text_encoder", Keeps(), {"values": values}, pooled, given)


def test_outputs_of_another_shape_or_value_are_told_apart() -> None:
    fed = {"values": VALUES}
    with pytest.raises(ParityError, match=r"gives \(2, 3\), the source's own model \(2, 2\)"):
        check_reference("encoder", Keeps(), fed, lambda values: values[:, :2], {"values": VALUES})
    with pytest.raises(ParityError, match=r"smallest cosine .*the inputs differ"):
        check_reference("encoder", Keeps(), fed, pooled, {"values": VALUES.flip(1)})


def test_a_model_that_refuses_its_processor_s_inputs_is_a_source_error() -> None:
    def refuse(values: torch.Tensor) -> torch.Tensor:
        raise IndexError("index out of range in self")

    with pytest.raises(SourceError, match="index out of range"):
        check_reference("encoder", Keeps(), {"values": VALUES}, refuse, {"values": VALUES})
