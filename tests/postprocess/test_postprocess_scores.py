"""Scores of queries and classes, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmedge.postprocess import scores
from mmedge.postprocess.scores import best_classes, best_queries, query_patch, sigmoid
from mmedge.specs import Array


def patches(count: int, size: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(count)
    embeddings = rng.standard_normal((count, size)).astype(np.float32)
    return embeddings, rng.standard_normal(count).astype(np.float32), np.exp(embeddings[:, 0])


def test_a_sigmoid_never_overflows() -> None:
    values = np.array([-1e4, -20.0, 0.0, 3.0, 1e4])
    np.testing.assert_allclose(sigmoid(values), torch.from_numpy(values).sigmoid().numpy())


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_the_best_query_is_that_of_all_logits(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "_BLOCK", block)  # one query at a time, and all at once
    embeddings, shift, scale = patches(7, 5)
    queries = np.random.default_rng(1).standard_normal((9, 5)).astype(np.float32) * 3
    queries[4] = queries[2]  # of equal queries the first
    units = [torch.nn.functional.normalize(torch.from_numpy(e)) for e in (embeddings, queries)]
    shifted = units[0] @ units[1].T + torch.from_numpy(shift)[:, None]
    logits = shifted * torch.from_numpy(scale)[:, None]
    outputs = {"class_embeddings": embeddings, "shift": shift, "scale": scale}
    got, which = best_queries(outputs, queries)
    np.testing.assert_allclose(got, logits.sigmoid().max(dim=1).values.numpy(), atol=1e-5)
    np.testing.assert_array_equal(which, logits.argmax(dim=1).numpy())
    assert len(set(which.tolist())) > 2


def test_a_box_may_have_several_classes() -> None:
    logits = np.array([[3.0, 2.0, -5.0], [-4.0, 1.0, -6.0]], np.float32)
    got, rows, classes = best_classes(logits, 3)
    np.testing.assert_allclose(got, sigmoid(np.array([3.0, 2.0, 1.0])), rtol=1e-6)
    assert (rows.tolist(), classes.tolist()) == ([0, 0, 1], [0, 1, 1])
    assert len(best_classes(logits, 100)[0]) == 6


def test_the_patch_of_a_query_image() -> None:
    embeddings = np.array([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]], np.float32)
    boxes = np.array([[0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 0.9, 0.95], [0.5, 0.5, 0.2, 0.2]])
    # The small box is out; of the others, the first is less like the mean.
    assert query_patch(embeddings - [[2.0, 0.0]], boxes, None) == 0
    assert query_patch(embeddings, boxes, np.array([0.1, 0.3, 0.2])) == 1
