"""Images as patches of a budget, at about their own aspect ratio (SigLIP 2 NaFlex)."""

from __future__ import annotations

import math

import numpy as np

from mmedge.errors import ImageError
from mmedge.preprocess.steps import Patches
from mmedge.specs import Array, Float32Array

__all__ = ["cut", "patch_grid"]

_PRECISION = 1e-5  # at which the reference ends its search for the scale
_LARGEST_SCALE = 100.0


def patch_grid(step: Patches, width: int, height: int) -> tuple[int, int]:
    """Return rows and columns of patches: the largest scale of an image that keeps the budget.

    As transformers searches for it, so that both agree on every size.

    Raises:
        ImageError: If the image is so long that no scale keeps the budget.
    """
    low, high = _PRECISION / 10, _LARGEST_SCALE
    while high - low >= _PRECISION:
        scale = (low + high) / 2
        if math.prod(_grid(step, width, height, scale)) <= step.count:
            low = scale
        else:
            high = scale
    rows, columns = _grid(step, width, height, low)
    if rows * columns > step.count:
        raise ImageError(
            f"Image of {width}x{height} pixels: too long, it would be {rows}x{columns} patches at "
            f"the smallest scale, more than the {step.count} that the model takes. Crop it first."
        )
    return rows, columns


def _grid(step: Patches, width: int, height: int, scale: float) -> tuple[int, int]:
    rows, columns = (max(math.ceil(side * scale / step.size), 1) for side in (height, width))
    return rows, columns


def cut(step: Patches, image: Float32Array) -> tuple[Float32Array, Array]:
    """Cut an image (3, rows * size, columns * size) into patches.

    Returns:
        (count, size * size * 3) float32: patches row by row, each pixel by pixel, zeros behind the
        last; and (2,) int64: rows and columns.
    """
    channels, height, width = image.shape
    rows, columns = height // step.size, width // step.size
    patches = image.reshape(channels, rows, step.size, columns, step.size)
    flat = patches.transpose(1, 3, 2, 4, 0).reshape(rows * columns, -1)
    out = np.zeros((step.count, flat.shape[1]), np.float32)
    out[: len(flat)] = flat
    return out, np.array([rows, columns], np.int64)
