"""Detections compared with those of a reference, whatever the order of equal scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmedge.models import Detections
from mmedge.specs import Array

__all__ = ["same_boxes"]


def same_boxes(got: Detections, expected: Sequence[Array]) -> None:
    """Assert that detections are the expected ones, best first.

    Args:
        got: What was detected.
        expected: Boxes (N, 4) in pixels, scores (N,) and classes (N,).
    """
    boxes, scores, classes = expected
    assert len(got) == len(scores)
    assert (np.diff(got.scores) <= 0).all()
    np.testing.assert_allclose(got.scores, np.sort(scores)[::-1], atol=1e-4)
    rows = [
        np.column_stack([one_boxes, 100 * one_scores, 1000 * one_classes])
        for one_boxes, one_scores, one_classes in (
            (got.boxes, got.scores, got.class_id),
            (boxes, scores, classes),
        )
    ]
    distances = np.abs(rows[0][:, None] - rows[1][None]).max(axis=2)
    nearest = distances.argmin(axis=1)
    assert sorted(nearest) == list(range(len(got)))
    assert distances.min(axis=1).max(initial=0.0) < 2e-2
