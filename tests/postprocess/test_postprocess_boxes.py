"""Overlap, suppression and clipping of boxes, against the same written out pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedge.errors import InputError
from mmedge.postprocess.boxes import check_share, corners, in_frame, iou, nms
from mmedge.postprocess.detections import select
from mmedge.specs import Array

SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed: int, count: int) -> Array:
    """Boxes on a coarse grid, so that many touch, coincide or are empty."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, 5, (count, 2))
    return np.concatenate([starts, starts + rng.integers(0, 4, (count, 2))], axis=1).astype(float)


def overlap(a: Array, b: Array, *, crowd: bool = False) -> float:
    """Intersection over union of two boxes of whole numbers, by counting squares."""
    cells = [
        {(x, y) for x in range(int(c[0]), int(c[2])) for y in range(int(c[1]), int(c[3]))}
        for c in (a, b)
    ]
    union = len(cells[0]) if crowd else len(cells[0] | cells[1])
    return len(cells[0] & cells[1]) / union if union else 0.0


@given(SEEDS)
def test_overlap_is_that_of_counted_squares(seed: int) -> None:
    left, right = drawn(seed, 4), drawn(seed + 1, 3)
    crowd = np.array([True, False, False])
    expected = [
        [overlap(a, b, crowd=bool(c)) for b, c in zip(right, crowd, strict=True)] for a in left
    ]
    np.testing.assert_allclose(iou(left, right, crowd), expected, atol=1e-12)
    assert iou(left, right[:0]).shape == (4, 0)


@given(SEEDS, st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_the_front_covers_dropped_variants(seed: int, threshold: float) -> None:
    boxes = drawn(seed, 12)
    rng = np.random.default_rng(seed)
    scores, classes = rng.integers(0, 6, 12) / 5, rng.integers(0, 2, 12)
    kept = nms(boxes, scores, classes, threshold)
    expected: list[int] = []
    for each in sorted(range(12), key=lambda i: -scores[i]):  # stable, like nms
        better = [k for k in expected if classes[k] == classes[each]]
        if all(overlap(boxes[k], boxes[each]) <= threshold for k in better):
            expected.append(each)
    assert kept.tolist() == expected


def test_boxes_are_scaled_and_clipped_to_the_frame() -> None:
    boxes = corners(np.array([[0.5, 0.5, 0.5, 0.5], [0.0, 0.9, 0.4, 0.4]]))
    np.testing.assert_allclose(
        in_frame(boxes, (200, 100), square=False), [[50, 25, 150, 75], [0, 70, 40, 100]]
    )
    np.testing.assert_allclose(  # of a square of 200, whose lower half is padding
        in_frame(boxes, (200, 100), square=True), [[50, 50, 150, 100], [0, 100, 40, 100]]
    )


def test_boxes_in_the_padding_or_of_low_score_are_left_out() -> None:
    boxes = corners(np.array([[0.5, 0.25, 0.2, 0.2], [0.5, 0.8, 0.2, 0.2], [0.2, 0.2, 0.1, 0.1]]))
    scores, classes = np.array([0.6, 0.9, 0.7], np.float32), np.array([1, 0, 0])
    options = {"size": (200, 100), "square": True, "overlap": None}
    found = select(boxes, scores, classes, ("a", "b"), threshold=0.6, **options)  # type: ignore[arg-type]
    assert found.labels.tolist() == ["a"]  # above the threshold, not at it
    found = select(boxes, scores, classes, ("a", "b"), threshold=0.5, **options)  # type: ignore[arg-type]
    assert found.labels.tolist() == ["a", "b"]
    assert found.class_id.tolist() == [0, 1]
    assert len(found) == 2
    assert found.xyxy is found.boxes
    assert found.confidence is found.scores
    none = select(boxes, scores, classes, ("a", "b"), threshold=0.95, **options)  # type: ignore[arg-type]
    assert (none.boxes.shape, none.labels.shape, none.labels.dtype.kind) == ((0, 4), (0,), "U")


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_threshold_that_is_no_share_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="expected a number from 0 to 1"):
        check_share("nms", value)
