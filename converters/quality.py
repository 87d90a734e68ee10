"""Fidelity figures, in numpy: how far a variant's embeddings are from those of fp32.

Embeddings are (N, D) float32, L2-normalised, throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmedge.bundle.manifest import Quality
from mmedge.errors import ShapeError
from mmedge.specs import Array, Float32Array

__all__ = [
    "TOP_K",
    "EvaluationLabels",
    "cosines",
    "evaluate_variant",
    "recall_at_k",
    "task_figures",
    "top_k_overlap",
    "zero_shot_accuracy",
]

TOP_K = 10
_RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class EvaluationLabels:
    """What is known about an evaluation set of N pictures and N captions.

    Attributes:
        captions: One for each picture, or None where there are none.
        labels: One class for each picture that has one, else None; None where no picture has.
        classes: The different labels, in the order of the label embeddings.
    """

    captions: tuple[str, ...] | None = None
    labels: tuple[str | None, ...] | None = None
    classes: tuple[str, ...] = ()


def cosines(reference: Float32Array, candidate: Float32Array) -> Array:
    """Return the cosine of each row with its reference: (N,) float64.

    Raises:
        ShapeError: If the shapes differ.
    """
    if reference.shape != candidate.shape or reference.ndim != 2:
        raise ShapeError(
            f"Embeddings: got {candidate.shape} against {reference.shape}, expected equal (N, D)."
        )
    left, right = reference.astype(np.float64), candidate.astype(np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        values: Array = (left * right).sum(axis=1) / norms
    # A zero or NaN embedding agrees with nothing.
    return np.where(np.isfinite(values), values, -1.0)


def top_k_overlap(reference: Float32Array, candidate: Float32Array, k: int) -> float:
    """Return the mean share of the k nearest other samples that both embeddings agree on.

    Args:
        reference: (N, D).
        candidate: (N, D), of the same samples.
        k: 1 <= k < N.

    Raises:
        ShapeError: If k is out of range or the shapes differ.
    """
    count = len(reference)
    if reference.shape != candidate.shape or not 1 <= k < count:
        raise ShapeError(
            f"top_k_overlap: got {candidate.shape} against {reference.shape} and k = {k}; expected "
            "equal shapes and 1 <= k < N."
        )
    shared = sum(
        len(set(left) & set(right))
        for left, right in zip(
            _neighbours(reference, k).tolist(), _neighbours(candidate, k).tolist(), strict=True
        )
    )
    return shared / (count * k)


def recall_at_k(queries: Float32Array, gallery: Float32Array, relevant: Array, k: int) -> float:
    """Return the share of queries that find a relevant entry among their k nearest.

    Args:
        queries: (Q, D).
        gallery: (N, D).
        relevant: (Q, N) bool.
        k: At least 1; more than N counts as N.
    """
    similarity = queries @ gallery.T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return float(np.take_along_axis(relevant, nearest, axis=1).any(axis=1).mean())


def zero_shot_accuracy(
    images: Float32Array, class_texts: Float32Array, targets: Sequence[int]
) -> float:
    """Return the share of pictures whose nearest class text is the right one.

    Args:
        images: (N, D).
        class_texts: (C, D), one for each class.
        targets: N indices into the classes.
    """
    predicted = (images @ class_texts.T).argmax(axis=1)
    return float((predicted == np.asarray(targets)).mean())


def task_figures(
    images: Float32Array,
    texts: Float32Array,
    class_texts: Float32Array,
    known: EvaluationLabels,
) -> dict[str, float]:
    """Return what can be said about the tasks, by name.

    Equal captions count as relevant to each other's pictures.

    Args:
        images: (N, D).
        texts: (N, D) of the captions; not read where there are none.
        class_texts: (C, D) of the classes; not read where there are no labels.
        known: Captions and labels.
    """
    figures: dict[str, float] = {}
    if known.captions is not None:
        captions = np.asarray(known.captions)
        relevant = captions[:, None] == captions[None, :]
        for k in _RECALL_AT:
            if k < len(captions):
                figures[f"text_to_image_recall@{k}"] = recall_at_k(texts, images, relevant, k)
        for k in _RECALL_AT:
            if k < len(captions):
                figures[f"image_to_text_recall@{k}"] = recall_at_k(images, texts, relevant, k)
    if known.labels is not None and len(known.classes) > 1:
        rows = [row for row, label in enumerate(known.labels) if label is not None]
        targets = [known.classes.index(str(known.labels[row])) for row in rows]
        figures["zero_shot_accuracy"] = zero_shot_accuracy(images[rows], class_texts, targets)
    return figures


def evaluate_variant(
    reference: Float32Array, candidate: Float32Array, *, data: str, task: dict[str, float]
) -> Quality:
    """Compare a variant's embeddings of held-out samples with those of fp32.

    Args:
        reference: (N, D) of fp32, N >= 2.
        candidate: (N, D) of the variant.
        data: What the samples are.
        task: Task figures of the variant.
    """
    values = cosines(reference, candidate)
    k = min(TOP_K, len(values) - 1)
    return Quality(
        cosine_mean=float(values.mean()),
        cosine_p1=float(np.percentile(values, 1)),
        cosine_min=float(values.min()),
        top_k=k,
        top_k_overlap=top_k_overlap(reference, candidate, k),
        task=task,
        samples=len(values),
        data=data,
    )


def _neighbours(embeddings: Float32Array, k: int) -> Array:
    """Return the k nearest other rows of each row: (N, k) int64."""
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :k]
