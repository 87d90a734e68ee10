"""Boxes: corners, pixels of a frame, overlap, non-maximum suppression."""

from __future__ import annotations

import numpy as np

from mmedge.errors import InputError
from mmedge.specs import Array, Float32Array

__all__ = ["check_share", "corners", "in_frame", "iou", "nms"]


def corners(boxes: Array) -> Array:
    """Return (x0, y0, x1, y1) of (centre x, centre y, width, height), along the last axis."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return np.concatenate([centre - half, centre + half], axis=-1)


def in_frame(boxes: Array, size: tuple[int, int], *, square: bool) -> Float32Array:
    """Scale boxes to pixels of a frame and clip them to it.

    Args:
        boxes: (N, 4) corners, as fractions of what the model saw.
        size: Width and height of the frame.
        square: The model saw the frame padded to a square, at the right or the bottom.

    Returns:
        (N, 4) float32.
    """
    seen = (max(size), max(size)) if square else size
    pixels = boxes * np.array([*seen, *seen], np.float32)
    clipped: Float32Array = np.clip(pixels, 0, np.array([*size, *size], np.float32))
    return clipped.astype(np.float32)


def iou(left: Array, right: Array, crowd: Array | None = None) -> Array:
    """Return the intersection over union of every pair of boxes.

    Args:
        left: (N, 4) corners.
        right: (M, 4) corners.
        crowd: (M,) bool; a box that is a crowd counts by its share of the left box's area alone,
            as in COCO.

    Returns:
        (N, M) float64 in [0, 1]; 0 where both boxes are empty.
    """
    a, b = np.asarray(left, np.float64)[:, None], np.asarray(right, np.float64)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.maximum(sides, 0).prod(axis=-1)
    areas = [np.maximum(box[..., 2:] - box[..., :2], 0).prod(axis=-1) for box in (a, b)]
    union = areas[0] + areas[1] - shared
    if crowd is not None:
        union = np.where(crowd, areas[0], union)
    shares: Array = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return shares


def nms(boxes: Array, scores: Array, classes: Array, threshold: float) -> Array:
    """Return the boxes that no better box of their class covers, best first.

    Args:
        boxes: (N, 4) corners.
        scores: (N,).
        classes: (N,); boxes of different classes do not suppress each other.
        threshold: Intersection over union above which the worse box goes.

    Returns:
        (K,) int64 positions.
    """
    order = np.argsort(-scores, kind="stable")
    kept = []
    while order.size:
        best, rest = order[0], order[1:]
        kept.append(best)
        covered = iou(boxes[best][None], boxes[rest])[0] > threshold
        order = rest[~(covered & (classes[rest] == classes[best]))]
    return np.array(kept, np.int64)


def check_share(name: str, value: float) -> float:
    """Return a threshold between 0 and 1.

    Raises:
        InputError: If it lies outside.
    """
    if not 0 <= value <= 1:
        raise InputError(f"{name}: got {value}, expected a number from 0 to 1.")
    return value
