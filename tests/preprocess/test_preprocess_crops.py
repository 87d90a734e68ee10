"""Crops: boxes of an image, and boxes that are none of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmedge.errors import InputError, ShapeError
from mmedge.preprocess.crops import Crops

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def test_boxes_are_cut_out_rounded_outwards_and_cut_off_at_the_border() -> None:
    crops = Crops(IMAGE, [[2, 3, 10, 9], [4.7, 5.2, 8.1, 8.9], [-5, -1e9, 3, 2], [29, 19, 31, 99]])
    assert len(crops) == 4
    expected = [PIXELS[3:9, 2:10], PIXELS[5:9, 4:9], PIXELS[:2, :3], PIXELS[19:, 29:]]
    for crop, part in zip(crops, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(crop), part)
    assert [crop.size for crop in crops[1:3]] == [(5, 4), (3, 2)]


@pytest.mark.parametrize("nothing", [[], np.empty((0, 4)), np.empty((0,))])
def test_no_boxes_are_no_crops(nothing: Any) -> None:
    assert list(Crops(IMAGE, nothing)) == []


@pytest.mark.parametrize(
    "box",
    [[5, 5, 5, 9], [9, 5, 5, 9], [5, 9, 9, 5], [np.nan, 0, 5, 5], [0, 0, np.inf, 5]],
)
def test_empty_boxes_are_refused_by_position(box: list[float]) -> None:
    with pytest.raises(InputError, match=r"boxes\[1\]: got .* left < right"):
        Crops(IMAGE, [[0, 0, 4, 4], box])


@pytest.mark.parametrize("box", [[30, 0, 40, 5], [-9, 0, 0, 5], [0, 20, 5, 25], [0, -9, 5, 0]])
def test_boxes_outside_the_image_are_refused(box: list[float]) -> None:
    with pytest.raises(InputError, match=r"boxes\[0\]: .* outside the image of 30x20 pixels"):
        Crops(IMAGE, [box])


@pytest.mark.parametrize("boxes", [[1, 2, 3, 4], [[1, 2, 3]], np.zeros((2, 2, 4))])
def test_boxes_of_another_shape_are_refused(boxes: Any) -> None:
    with pytest.raises(ShapeError, match=r"expected \(N, 4\)"):
        Crops(IMAGE, boxes)


@pytest.mark.parametrize("boxes", [["a"], [[1, 2, 3, 4], [5]], None])
def test_boxes_that_are_not_numbers_are_refused(boxes: Any) -> None:
    with pytest.raises(InputError, match="Boxes:"):
        Crops(IMAGE, boxes)
