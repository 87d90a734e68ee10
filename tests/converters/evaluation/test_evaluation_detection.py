"""How boxes of a variant are matched with those of fp32."""

from __future__ import annotations

import numpy as np
import pytest

from mmedge.converters.evaluation.detection import found_share
from mmedge.specs import Array

BOXES = np.array([[0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.0, 0.6, 0.2, 0.9]])
SCORES = np.array([0.6, 0.3, 0.1])
CLASSES = np.array([0, 1, 0])


def share(boxes: Array, classes: Array) -> tuple[float, float]:
    return found_share(BOXES, SCORES, CLASSES, boxes, np.ones(len(boxes)), classes)


def test_the_same_boxes_agree_in_any_order() -> None:
    order = [2, 0, 1]
    assert share(BOXES[order], CLASSES[order]) == (pytest.approx(1), pytest.approx(1))


def test_what_is_missing_counts_by_its_score() -> None:
    assert share(BOXES[1:], CLASSES[1:]) == (pytest.approx(0.4), pytest.approx(0.4))
    assert share(BOXES, np.array([1, 1, 0])) == (pytest.approx(0.4), pytest.approx(0.4))
    moved = BOXES.copy()
    moved[1, 2:] += 0.1  # an IoU of 0.16 / 0.25
    assert share(moved, CLASSES) == (pytest.approx(1), pytest.approx(0.7 + 0.3 * 0.64))
    moved[1] += 0.3
    assert share(moved, CLASSES) == (pytest.approx(0.7), pytest.approx(0.7))


def test_a_box_is_taken_once_and_among_the_best_alone() -> None:
    twice = np.array([BOXES[0], BOXES[0]])
    found = found_share(twice, SCORES[:2], np.zeros(2), BOXES[:1], np.ones(1), np.zeros(1))
    assert found == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    many = np.concatenate([np.tile([[0.8, 0.0, 0.9, 0.1]], (20, 1)), BOXES])
    assert share(many, np.zeros(23)) == (0, 0)
    assert share(np.zeros((0, 4)), np.zeros(0)) == (0, 0)
