"""Resize by a Gaussian blur and linear interpolation, equal to scipy.ndimage's filter and zoom."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from mmedge.specs import Array, Float32Array

__all__ = ["gaussian_resize"]

_TRUNCATE = 4.0  # standard deviations of the blur
_BLOCK = 32  # output rows of one matrix product


def gaussian_resize(image: Array, height: int, width: int, *, square: bool) -> Float32Array:
    """Resize an image as transformers resizes for OWLv2.

    `ndimage.gaussian_filter` with a deviation of (factor - 1) / 2 where the image shrinks, then
    `ndimage.zoom(order=1, grid_mode=True)`; both with mode "mirror".

    Args:
        image: (H, W, 3) uint8.
        height: Of the result.
        width: Of the result.
        square: The image stands at the left top of a black square.

    Returns:
        (height, width, 3) float32, in 0..255.
    """
    side = max(image.shape[:2])
    tall, wide = (side, side) if square else image.shape[:2]
    columns = np.ascontiguousarray(_resize_rows(image, tall, height).transpose(1, 0, 2))
    resized = _resize_rows(columns, wide, width).transpose(1, 0, 2)
    return np.ascontiguousarray(resized)


def _resize_rows(image: Array, length: int, out: int) -> Float32Array:
    """Resize along the first axis, which black rows continue to `length`."""
    places, weights = _taps(len(image), length, out)
    resized = np.empty((out, *image.shape[1:]), np.float32)
    for start in range(0, out, _BLOCK):
        rows = places[start : start + _BLOCK]
        low, high = int(rows.min()), int(rows.max()) + 1
        matrix = np.zeros((len(rows), high - low), np.float32)
        np.add.at(matrix, (np.arange(len(rows))[:, None], rows - low), weights[start:][: len(rows)])
        part = image[low:high].reshape(high - low, -1).astype(np.float32)
        resized[start : start + _BLOCK] = (matrix @ part).reshape(len(rows), *image.shape[1:])
    return resized


@lru_cache(maxsize=16)
def _taps(content: int, length: int, out: int) -> tuple[Array, Array]:
    """Return the rows that an output row is made of, and their weights: (out, T) each.

    Args:
        content: Rows of the image.
        length: Rows with the black ones below it.
        out: Rows of the result.
    """
    factor = length / out
    blur = _kernel(max(0.0, (factor - 1) / 2))
    reach = len(blur) // 2
    centres = _mirrored((np.arange(out) + 0.5) * factor - 0.5, length)
    first = np.floor(centres)
    share = centres - first
    # The blurred neighbours on both sides, joined into one kernel.
    padded = np.pad(blur, 1)
    weights = (1 - share)[:, None] * padded[1:] + share[:, None] * padded[:-1]
    steps = np.arange(-reach, reach + 2)
    places = np.rint(_mirrored(first[:, None] + steps, length)).astype(np.int64)
    weights = np.where(places < content, weights, 0.0)
    return np.minimum(places, content - 1), weights.astype(np.float32)


def _kernel(deviation: float) -> Array:
    reach = int(_TRUNCATE * deviation + 0.5)
    if reach == 0:
        return np.ones(1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    scaled: Array = kernel / kernel.sum()
    return scaled


def _mirrored(places: Array, length: int) -> Array:
    """Reflect places beyond the ends at the centres of the first and the last row."""
    period = max(2 * (length - 1), 1)
    inside: Array = np.abs(places) % period
    return np.minimum(np.where(inside > length - 1, period - inside, inside), length - 1)
