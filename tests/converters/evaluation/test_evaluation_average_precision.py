"""Mean average precision against pycocotools, and its intervals."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest

from mmedge.converters.evaluation.average_precision import (
    THRESHOLDS,
    Boxes,
    match_boxes,
    mean_precision,
    precision_figures,
)
from mmedge.specs import Array

CLASSES = 3


def scene(rng: np.random.Generator, *, crowds: bool) -> Boxes:
    """True boxes of an image, few or none, many of them overlapping."""
    count = int(rng.integers(0, 6))
    starts = rng.uniform(0, 60, (count, 2))
    corners = np.concatenate([starts, starts + rng.uniform(5, 40, (count, 2))], axis=1)
    crowd = rng.random(count) < 0.3 if crowds else np.zeros(count, bool)
    return Boxes(corners, rng.integers(0, CLASSES, count), crowd)


def detected(rng: np.random.Generator, real: Boxes) -> Boxes:
    """Detections of a scene: moved, missing, doubled, of wrong classes, with equal scores."""
    copies = rng.integers(0, 3, len(real.corners))
    corners = np.repeat(real.corners, copies, axis=0)
    corners = corners + np.tile(rng.normal(0, 2.5, (len(corners), 2)), 2)
    classes = np.repeat(real.classes, copies)
    wrong = rng.random(len(classes)) < 0.2
    classes = np.where(wrong, rng.integers(0, CLASSES, len(classes)), classes)
    more = np.sort(rng.uniform(0, 100, (int(rng.integers(0, 3)), 2, 2)), axis=1).reshape(-1, 4)
    corners = np.concatenate([corners, more])
    classes = np.concatenate([classes, rng.integers(0, CLASSES, len(more))])
    return Boxes(corners, classes, rng.integers(1, 12, len(classes)) / 12)


def sides(corners: Array) -> list[float]:
    left, top, right, bottom = map(float, corners)
    return [left, top, right - left, bottom - top]


def expected(truth: list[Boxes], found: list[Boxes]) -> Any:
    """The 12 figures of pycocotools."""
    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    annotations = [
        {
            "id": 1 + len(truth) * at + image,
            "image_id": image,
            "category_id": int(one.classes[at]),
            "bbox": sides(one.corners[at]),
            "area": float(np.prod(sides(one.corners[at])[2:])),
            "iscrowd": int(one.marks[at]),
        }
        for image, one in enumerate(truth)
        for at in range(len(one.corners))
    ]
    results = [
        {
            "image_id": image,
            "category_id": int(one.classes[at]),
            "bbox": sides(one.corners[at]),
            "score": float(one.marks[at]),
        }
        for image, one in enumerate(found)
        for at in range(len(one.corners))
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        known = coco.COCO()
        known.dataset = {
            "images": [{"id": image} for image in range(len(truth))],
            "annotations": annotations,
            "categories": [{"id": each, "name": str(each)} for each in range(CLASSES)],
        }
        known.createIndex()
        judged = evaluation.COCOeval(known, known.loadRes(results), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return judged.stats


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("crowds", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_that_of_pycocotools(seed: int, crowds: bool) -> None:
    rng = np.random.default_rng([seed, crowds])
    truth = [scene(rng, crowds=crowds) for _ in range(30)]
    found = [detected(rng, one) for one in truth]
    stats = expected(truth, found)
    matches = match_boxes(truth, found, CLASSES)
    assert 0.05 < stats[0] < 0.95
    assert mean_precision(matches) == pytest.approx(stats[0], abs=1e-9)
    assert mean_precision(matches, slice(0, 1)) == pytest.approx(stats[1], abs=1e-9)
    assert mean_precision(matches, slice(5, 6)) == pytest.approx(stats[2], abs=1e-9)
    figures, _ = precision_figures(matches, matches)
    assert figures["map"].value == pytest.approx(stats[0], abs=1e-9)
    assert figures["map_50"].value == pytest.approx(stats[1], abs=1e-9)


def test_right_boxes_are_1_and_no_boxes_0() -> None:
    rng = np.random.default_rng(0)
    truth = [scene(rng, crowds=False) for _ in range(8)]
    same = [Boxes(one.corners, one.classes, np.ones(len(one.corners))) for one in truth]
    none = [Boxes(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0)) for _ in truth]
    assert mean_precision(match_boxes(truth, same, CLASSES)) == pytest.approx(1)
    assert mean_precision(match_boxes(truth, none, CLASSES)) == 0
    assert mean_precision(match_boxes(none, same, CLASSES)) == 0
    figures, drops = precision_figures(
        match_boxes(truth, same, CLASSES), match_boxes(truth, none, CLASSES)
    )
    assert (figures["map"].value, drops["map"].value) == (0, pytest.approx(1))
    assert drops["map"].low == pytest.approx(1)  # of the same draws


def test_a_hundred_detections_of_a_class_count() -> None:
    truth = [Boxes(np.array([[0.0, 0.0, 10.0, 10.0]]), np.zeros(1, np.int64), np.zeros(1, bool))]
    corners = np.concatenate([np.tile([[50.0, 50.0, 60.0, 60.0]], (100, 1)), truth[0].corners])
    scores = np.linspace(1, 0.5, 101)
    classes = np.zeros(101, np.int64)
    assert mean_precision(match_boxes(truth, [Boxes(corners, classes, scores)], 1)) == 0
    scores = scores[::-1]
    assert mean_precision(match_boxes(truth, [Boxes(corners, classes, scores)], 1)) == 1


def test_intervals_hold_the_value_and_of_a_difference_are_narrow() -> None:
    rng = np.random.default_rng(3)
    truth = [scene(rng, crowds=False) for _ in range(60)]
    found = [detected(rng, one) for one in truth]
    slightly = [Boxes(one.corners + 0.3, one.classes, one.marks) for one in found]
    fp32, other = (match_boxes(truth, each, CLASSES) for each in (found, slightly))
    figures, drops = precision_figures(fp32, other)
    for figure in (*figures.values(), *drops.values()):
        assert figure.low <= figure.value <= figure.high
    assert drops["map"].value == pytest.approx(mean_precision(fp32) - mean_precision(other))
    width = figures["map"].high - figures["map"].low
    assert 0 < drops["map"].high - drops["map"].low < width / 2
    assert len(THRESHOLDS) == 10
