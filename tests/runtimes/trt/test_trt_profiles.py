"""Optimization profiles from dynamic axes."""

from __future__ import annotations

import numpy as np
import pytest

from mmedge.errors import InputError
from mmedge.runtimes.trt.engines import ShapeProfile, ShapeRange
from mmedge.runtimes.trt.profiles import shape_profile, shape_profiles
from mmedge.specs import TensorSpec

INPUTS = (
    TensorSpec("input_ids", np.dtype(np.int64), ("batch", "sequence")),
    TensorSpec("scale", np.dtype(np.float32), (1, 4)),
)
AXES = {"batch": (1, 2, 8), "sequence": (4, 16, 77), "patches": (1, 50, 200)}


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
    with pytest.raises(InputError, match="'sequence' of input 'input_ids', only for") as caught:
        shape_profile(INPUTS, {"batch": (1, 1, 1)})
    assert "axes={'batch': (1, 1, 8)}" in str(caught.value)


@pytest.mark.parametrize("bounds", [(0, 1, 2), (2, 1, 3), (1, 4, 3)])
def test_impossible_bounds_are_refused(bounds: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="'batch': got the bounds"):
        shape_profile(INPUTS, AXES | {"batch": bounds})


def test_several_profiles_keep_their_order_and_none_comes_twice() -> None:
    one, many = AXES | {"batch": (1, 1, 1)}, AXES
    made = shape_profiles(INPUTS, [one, many, one])
    assert made == (shape_profile(INPUTS, one), shape_profile(INPUTS, many))


def test_no_bounds_at_all_are_refused() -> None:
    with pytest.raises(InputError, match="at least one set of bounds"):
        shape_profiles(INPUTS, [])
