"""Scores of boxes: of text or image queries, and of fixed classes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mmedge.postprocess.boxes import corners, iou
from mmedge.specs import Array, Float32Array

__all__ = ["best_classes", "best_queries", "query_patch", "sigmoid"]

_NORM_EPSILON = 1e-6  # OWL's
_BLOCK = 1 << 22  # similarities held at once: 16 MB
_QUERY_OVERLAP = 0.8  # of the best, from which a box may stand for the query image


def sigmoid(logits: Array) -> Array:
    """Return 1 / (1 + exp(-x)), in float64, without overflow."""
    values = np.asarray(logits, np.float64)
    decay = np.exp(-np.abs(values))  # at most 1
    return np.where(values >= 0, 1 / (1 + decay), decay / (1 + decay))


def best_queries(patches: Mapping[str, Array], queries: Array) -> tuple[Float32Array, Array]:
    """Return the best query of each patch of an OWL and its score.

    Args:
        patches: `class_embeddings` (P, D), `shift` (P,) and `scale` (P,), at least 0: the logit of
            a query is (cosine + shift) * scale.
        queries: (L, D), L >= 1; of any length, like the embeddings.

    Returns:
        Scores (P,) float32 and queries (P,) int64.
    """
    units, shift, scale = (
        np.asarray(patches[name], np.float32) for name in ("class_embeddings", "shift", "scale")
    )
    units = _unit(units)
    # The logit grows with the cosine, so the best cosine is the best logit.
    best, which = np.full(len(units), -np.inf, np.float32), np.zeros(len(units), np.int64)
    rows, step = np.arange(len(units)), max(1, _BLOCK // len(units))
    for start in range(0, len(queries), step):
        cosines = units @ _unit(queries[start : start + step]).T
        found = cosines.argmax(axis=1)
        better = cosines[rows, found] > best
        best = np.where(better, cosines[rows, found], best)
        which = np.where(better, start + found, which)
    return sigmoid((best + shift) * scale).astype(np.float32), which


def best_classes(logits: Array, count: int) -> tuple[Float32Array, Array, Array]:
    """Return the best pairs of a box and a class, best first.

    Args:
        logits: (Q, C), of a sigmoid for each class.
        count: Pairs, at most Q * C.

    Returns:
        Scores (count,) float32, boxes (count,) int64 and classes (count,) int64.
    """
    flat = logits.reshape(-1)
    count = min(count, flat.size)
    found = np.argpartition(-flat, count - 1)[:count]
    found = found[np.argsort(-flat[found], kind="stable")]
    return sigmoid(flat[found]).astype(np.float32), *np.divmod(found, logits.shape[1])


def query_patch(embeddings: Array, boxes: Array, objectness: Array | None) -> int:
    """Return the patch whose embedding stands for a query image, as OWL chooses it.

    With objectness (OWLv2) it is the patch most like an object. Without it is, of those whose box
    covers the image nearly as well as the best, the one least like the average patch.

    Args:
        embeddings: (P, D) class embeddings.
        boxes: (P, 4) as (centre x, centre y, width, height), fractions of the image.
        objectness: (P,) or None.
    """
    if objectness is not None:
        return int(objectness.argmax())
    overlap = iou(np.array([[0.0, 0.0, 1.0, 1.0]]), corners(boxes))[0]
    chosen = np.flatnonzero(overlap >= overlap.max() * _QUERY_OVERLAP)
    return int(chosen[(embeddings[chosen] @ embeddings.mean(axis=0)).argmin()])


def _unit(rows: Array) -> Float32Array:
    norms = np.linalg.norm(rows, axis=-1, keepdims=True) + np.float32(_NORM_EPSILON)
    units: Float32Array = np.asarray(rows / norms, np.float32)
    return units
