from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedge.converters.quality import (
    EvaluationLabels,
    cosines,
    evaluate_variant,
    recall_at_k,
    task_figures,
    top_k_overlap,
    zero_shot_accuracy,
)
from mmedge.errors import ShapeError
from mmedge.specs import Array


def unit(rows: Array) -> Array:
    vectors: Array = np.asarray(rows, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def random_unit(count: int, dim: int, seed: int) -> Array:
    return unit(np.random.default_rng(seed).normal(size=(count, dim)))


def test_cosines_by_hand() -> None:
    reference = unit([[1, 0], [1, 0], [1, 0], [1, 0]])
    candidate = np.array([[2, 0], [0, 1], [-1, 0], [1, 1]], np.float32)
    np.testing.assert_allclose(cosines(reference, candidate), [1, 0, -1, 2**-0.5], atol=1e-7)


def test_a_zero_or_nan_embedding_agrees_with_nothing() -> None:
    candidate = np.array([[0, 0], [np.nan, 1]], np.float32)
    assert cosines(unit([[1, 0], [0, 1]]), candidate).tolist() == [-1, -1]


def test_cosines_need_equal_shapes() -> None:
    with pytest.raises(ShapeError):
        cosines(np.ones((2, 3), np.float32), np.ones((3, 3), np.float32))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 7))
def test_overlap_is_one_for_itself_and_for_a_rotation(seed: int, k: int) -> None:
    vectors = random_unit(12, 6, seed)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(6, 6)))[0]
    assert top_k_overlap(vectors, vectors, k) == 1
    assert top_k_overlap(vectors, (vectors @ rotation).astype(np.float32), k) == 1


def test_overlap_counts_shared_neighbours_and_not_oneself() -> None:
    angles = np.array([0, 1, 10, 11, 100])
    reference = unit(np.stack([np.cos(np.deg2rad(angles)), np.sin(np.deg2rad(angles))], 1))
    angles[1] = 13
    moved = unit(np.stack([np.cos(np.deg2rad(angles)), np.sin(np.deg2rad(angles))], 1))
    # Nearest before: 1, 0, 3, 2, 3; after: 2, 3, 3, 2, 1.
    assert top_k_overlap(reference, moved, 1) == pytest.approx(2 / 5)
    with pytest.raises(ShapeError):
        top_k_overlap(reference, moved, 5)


def test_recall_by_hand() -> None:
    gallery = unit([[1, 0], [0, 1], [-1, 0]])
    queries = unit([[1, 0.1], [1, 0.2], [-1, 0.1]])
    relevant = np.eye(3, dtype=bool)
    assert recall_at_k(queries, gallery, relevant, 1) == pytest.approx(2 / 3)
    assert recall_at_k(queries, gallery, relevant, 2) == 1


def test_zero_shot_by_hand() -> None:
    images = unit([[1, 0], [0.9, 0.1], [0, 1]])
    assert zero_shot_accuracy(images, unit([[1, 0], [0, 1]]), [0, 1, 1]) == pytest.approx(2 / 3)


def test_equal_captions_are_relevant_to_each_others_pictures() -> None:
    images = unit([[1, 0], [0, 1], [-1, 0]])
    texts = unit([[0, 1], [0, 1], [-1, 0]])
    one = task_figures(images, texts, texts, EvaluationLabels(captions=("a", "b", "c")))
    same = task_figures(images, texts, texts, EvaluationLabels(captions=("a", "a", "c")))
    assert one["text_to_image_recall@1"] == pytest.approx(2 / 3)
    assert same["text_to_image_recall@1"] == 1
    assert set(one) == {"text_to_image_recall@1", "image_to_text_recall@1"}


def test_pictures_without_a_label_do_not_count_for_zero_shot() -> None:
    images = unit([[1, 0], [0, 1], [0, 1]])
    known = EvaluationLabels(labels=("x", None, "y"), classes=("x", "y"))
    figures = task_figures(images, images, unit([[1, 0], [0, 1]]), known)
    assert figures == {"zero_shot_accuracy": 1}
    assert task_figures(images, images, images, EvaluationLabels()) == {}


def test_evaluate_variant_reports_what_it_measured() -> None:
    reference = random_unit(40, 8, 0)
    same = evaluate_variant(reference, reference, data="here", task={"x": 1.0})
    assert (same.cosine_mean, same.top_k_overlap) == (pytest.approx(1), 1)
    assert (same.top_k, same.samples, same.data, same.task) == (10, 40, "here", {"x": 1.0})
    noise = np.random.default_rng(1).normal(size=reference.shape)
    worse = evaluate_variant(reference, unit(reference + 0.3 * noise), data="here", task={})
    assert worse.cosine_min <= worse.cosine_p1 <= worse.cosine_mean < 0.95
    assert worse.top_k_overlap < 0.9
    assert evaluate_variant(reference[:3], reference[:3], data="", task={}).top_k == 2
