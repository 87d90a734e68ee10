"""Optimization profiles from dynamic axes."""

from __future__ import annotations

import numpy as np
import pytest

from mmedge.errors import InputError
from mmedge.runtimes.engines.profiles import shape_profile, shape_profiles
from mmedge.runtimes.engines.spec import ShapeProfile, ShapeRange
from mmedge.specs import Axis, TensorSpec

INPUTS = (
    TensorSpec("input_ids", np.dtype(np.int64), ("batch", "sequence")),
    TensorSpec("scale", np.dtype(np.float32), (1, 4)),
)
AXES = {"batch": Axis(1, 2, 8), "sequence": Axis(4, 16, 77), "patches": Axis(1, 50, 200)}


def test_named_axes_vary_and_fixed_ones_do_not() -> None:
    assert shape_profile(INPUTS, AXES) == ShapeProfile(
        {
            "input_ids": ShapeRange((1, 4), (2, 16), (8, 77)),
            "scale": ShapeRange((1, 4), (1, 4), (1, 4)),
        }
    )


def test_a_scalar_input_has_a_profile() -> None:
    spec = TensorSpec("temperature", np.dtype(np.float32), ())
    assert shape_profile([spec], {}).ranges["temperature"] == ShapeRange((), (), ())


def test_an_axis_without_bounds_is_named_with_its_input() -> None:
    with pytest.raises(
        InputError, match=r"input_ids int64\(batch, sequence\).*only for \['batch'\]"
    ) as caught:
        shape_profile(INPUTS, {"batch": Axis(1, 1, 1)})
    assert "axes={'batch': Axis(1, 1, 8)}" in str(caught.value)


def test_a_sum_has_the_bounds_of_its_names_and_the_past_may_be_empty() -> None:
    mask = TensorSpec("mask", np.dtype(np.int64), ("batch", "past + sequence"))
    made = shape_profile([mask], AXES | {"past": Axis(0, 32, 100)})
    assert made.ranges["mask"] == ShapeRange((1, 4), (2, 48), (8, 177))


def test_several_profiles_keep_their_order_and_none_comes_twice() -> None:
    one, many = AXES | {"batch": Axis(1, 1, 1)}, AXES
    made = shape_profiles(INPUTS, [one, many, one])
    assert made == (shape_profile(INPUTS, one), shape_profile(INPUTS, many))


def test_no_bounds_at_all_are_refused() -> None:
    with pytest.raises(InputError, match="at least one set of bounds"):
        shape_profiles(INPUTS, [])
