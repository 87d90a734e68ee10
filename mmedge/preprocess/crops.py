"""Boxes of an image as images, cut out one at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import numpy as np
from PIL import Image

from mmedge.errors import InputError, ShapeError
from mmedge.specs import Array

__all__ = ["Crops"]


class Crops(Sequence[Image.Image]):
    """Parts of one image, each cut out when it is asked for.

    Args:
        image: A decoded image.
        boxes: (N, 4) left, top, right, bottom in pixels; rounded outwards to whole pixels, and
            cut off at the image's border.

    Raises:
        ShapeError: If the boxes are not (N, 4).
        InputError: If one is not finite, is empty, or lies outside the image; it is named.
    """

    def __init__(self, image: Image.Image, boxes: Array | Sequence[Sequence[float]]) -> None:
        self._image = image
        self._boxes = _whole_pixels(image, _checked(boxes))

    def __len__(self) -> int:
        return len(self._boxes)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [self._image.crop(box) for box in self._boxes[index]]
        return self._image.crop(self._boxes[index])


def _checked(boxes: Array | Sequence[Sequence[float]]) -> Array:
    try:
        array = np.asarray(boxes, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"Boxes: not numbers ({error}). Pass (N, 4) numbers.") from error
    if array.size == 0:
        return array.reshape(0, 4)
    if array.ndim != 2 or array.shape[1] != 4:
        raise ShapeError(
            f"Boxes: got {array.shape}, expected (N, 4): left, top, right, bottom in pixels."
        )
    return array


def _whole_pixels(image: Image.Image, boxes: Array) -> list[tuple[int, int, int, int]]:
    whole = []
    for position, box in enumerate(boxes.tolist()):
        left, top, right, bottom = box
        if not all(map(math.isfinite, box)) or left >= right or top >= bottom:
            raise InputError(
                f"boxes[{position}]: got {box}, expected finite numbers with left < right and "
                "top < bottom."
            )
        cut = (
            max(math.floor(left), 0),
            max(math.floor(top), 0),
            min(math.ceil(right), image.width),
            min(math.ceil(bottom), image.height),
        )
        if cut[0] >= cut[2] or cut[1] >= cut[3]:
            raise InputError(
                f"boxes[{position}]: {box} lies outside the image of {image.width}x{image.height} "
                "pixels. Pass boxes in pixels of this very image, upright, at its full size."
            )
        whole.append(cut)
    return whole
