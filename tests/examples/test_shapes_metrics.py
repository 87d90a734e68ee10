"""The figures of merit, on embeddings whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest
from metrics import pair_accuracy, recall_at_k, zero_shot_accuracy


def test_recall_of_perfect_embeddings_is_one() -> None:
    assert recall_at_k(np.eye(8), np.eye(8), 1) == 1.0


def test_recall_counts_the_rank_of_the_right_entry() -> None:
    gallery = np.eye(4)
    queries = np.array([[1, 0, 0, 0], [0.9, 0.4, 0, 0], [0.5, 0.6, 0.4, 0], [0.4, 0.3, 0.2, 0.1]])
    assert [recall_at_k(queries, gallery, k) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


def test_collapsed_embeddings_score_nothing() -> None:
    same = np.ones((10, 4)) / 2
    assert recall_at_k(same, same, 1) == 0.0
    assert recall_at_k(same, same, 5) == 0.0


def test_zero_shot_accuracy_counts_right_labels() -> None:
    images = np.eye(3)[[0, 1, 2, 2]]
    truth = ["a", "b", "c", "a"]
    assert zero_shot_accuracy(images, np.eye(3), ["a", "b", "c"], truth) == 0.75


def test_pair_accuracy_asks_for_more_than_a_tie() -> None:
    images = np.eye(2)
    assert pair_accuracy(images, np.eye(2), np.eye(2)[::-1]) == 1.0
    assert pair_accuracy(images, np.eye(2), np.eye(2)) == pytest.approx(0.0)
