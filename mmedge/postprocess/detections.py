"""Detections: the boxes of one frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmedge.postprocess.boxes import in_frame, nms
from mmedge.specs import Array, Float32Array

__all__ = ["Detections", "select"]


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """N boxes of one frame, best first.

    `xyxy`, `confidence` and `class_id` are the names that the supervision library uses.

    Attributes:
        boxes: (N, 4) float32: left, top, right, bottom in pixels of the frame, inside of it.
        scores: (N,) float32 in [0, 1].
        labels: (N,) str.
        class_id: (N,) int64, the label's position among those requested, or among the model's.
    """

    boxes: Float32Array
    scores: Float32Array
    labels: Array
    class_id: Array

    @property
    def xyxy(self) -> Float32Array:
        """The boxes."""
        return self.boxes

    @property
    def confidence(self) -> Float32Array:
        """The scores."""
        return self.scores

    def __len__(self) -> int:
        return len(self.scores)


def select(
    boxes: Array,
    scores: Array,
    classes: Array,
    labels: Sequence[str],
    *,
    size: tuple[int, int],
    square: bool,
    threshold: float,
    overlap: float | None,
) -> Detections:
    """Return the detections of a frame.

    Args:
        boxes: (N, 4) corners, as fractions of what the model saw.
        scores: (N,).
        classes: (N,) positions in `labels`.
        labels: Names.
        size: Width and height of the frame.
        square: See in_frame.
        threshold: Only scores above it are kept.
        overlap: Threshold of the suppression within a class; None for no suppression.
    """
    pixels = in_frame(boxes, size, square=square)
    inside = (pixels[:, 2:] > pixels[:, :2]).all(axis=1)
    kept = np.flatnonzero((scores > threshold) & inside)
    if overlap is None:
        kept = kept[np.argsort(-scores[kept], kind="stable")]
    else:
        kept = kept[nms(pixels[kept], scores[kept], classes[kept], overlap)]
    names = np.array([labels[each] for each in classes[kept]], np.str_)
    return Detections(pixels[kept], scores[kept].astype(np.float32), names, classes[kept])
