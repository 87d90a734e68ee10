"""Figures of merit for an image-text model, from embeddings alone. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def recall_at_k(queries: Array, gallery: Array, k: int) -> float:
    """Return the share of queries whose own gallery entry is among the k most similar.

    Ties count against the model: an entry as similar as the right one ranks before it, so that
    collapsed embeddings score nothing.

    Args:
        queries: (N, D) float, L2-normalised; query i belongs to gallery entry i.
        gallery: (N, D) float, L2-normalised.
        k: Matches per query.
    """
    similarities = queries.astype(np.float64) @ gallery.astype(np.float64).T
    own = np.diagonal(similarities)[:, None]
    rank = (similarities >= own).sum(axis=1)  # 1 where only the right entry is on top
    return float((rank <= k).mean())


def zero_shot_accuracy(
    images: Array, prompts: Array, labels: Sequence[str], truth: Sequence[str]
) -> float:
    """Return the share of images whose most similar prompt is that of the true label.

    Args:
        images: (N, D) float, L2-normalised.
        prompts: (L, D) float, L2-normalised; prompt j is for labels[j].
        labels: L labels.
        truth: N labels.
    """
    best = (images @ prompts.T).argmax(axis=1)
    return float(np.mean([labels[int(j)] == t for j, t in zip(best, truth, strict=True)]))


def pair_accuracy(images: Array, right: Array, wrong: Array) -> float:
    """Return the share of images more similar to the right text than to the wrong one.

    Args:
        images: (N, D) float, L2-normalised.
        right: (N, D) float, L2-normalised, the text of each image.
        wrong: (N, D) float, L2-normalised, a text that is nearly true of it.
    """
    return float(((images * right).sum(axis=1) > (images * wrong).sum(axis=1)).mean())
