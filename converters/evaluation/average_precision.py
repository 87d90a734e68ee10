"""Mean average precision of boxes, by COCO's rules.

T.-Y. Lin et al., Microsoft COCO: Common Objects in Context, 2014, and its program: IoU thresholds
from 0.5 to 0.95, precision at 101 values of recall, at most 100 detections of a class in an image,
boxes of all sizes. A crowd takes any number of detections, none of which counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmedge.bundle.quality import Figure
from mmedge.postprocess.boxes import iou
from mmedge.specs import Array

__all__ = ["THRESHOLDS", "Boxes", "Matches", "match_boxes", "mean_precision", "precision_figures"]

THRESHOLDS = np.linspace(0.5, 0.95, 10)

_RECALLS = np.linspace(0.0, 1.0, 101)
_MOST = 100
_DRAWS = 200  # of the bootstrap; each needs every precision again
_BLOCK = 1 << 21  # values of one block of draws


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """Boxes of one image.

    Attributes:
        corners: (N, 4).
        classes: (N,) integers.
        marks: (N,) scores of detections; of true boxes whether each is a crowd.
    """

    corners: Array
    classes: Array
    marks: Array


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """Detections of one class in all images, best first.

    Attributes:
        images: (N,) positions of their images.
        right: (T, N) bool, by threshold: takes a true box.
        counted: (T, N) bool: right or wrong, not of a crowd.
        positives: (I,) true boxes of each image, crowds left out.
    """

    images: Array
    right: Array
    counted: Array
    positives: Array


def match_boxes(truth: Sequence[Boxes], found: Sequence[Boxes], classes: int) -> list[Matches]:
    """Match detections with true boxes, class by class.

    Args:
        truth: Of each image.
        found: Of each image.
        classes: Number of classes.

    Returns:
        Of each class that has a true box other than a crowd.
    """
    matched = (_match_class(truth, found, each) for each in range(classes))
    return [one for one in matched if one.positives.any()]


def _match_class(truth: Sequence[Boxes], found: Sequence[Boxes], each: int) -> Matches:
    scores, images, right, counted = [], [], [], []
    positives = np.zeros(len(truth), np.int64)
    for image, (real, made) in enumerate(zip(truth, found, strict=True)):
        kept = real.classes == each
        crowd = real.marks[kept].astype(bool)
        order = np.argsort(crowd, kind="stable")  # crowds last
        positives[image] = np.count_nonzero(~crowd)
        chosen = np.flatnonzero(made.classes == each)
        chosen = chosen[np.argsort(-made.marks[chosen], kind="stable")][:_MOST]
        taken, ignored = _match_image(made.corners[chosen], real.corners[kept][order], crowd[order])
        scores.append(made.marks[chosen])
        images.append(np.full(len(chosen), image))
        right.append(taken)
        counted.append(~ignored)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return Matches(
        np.concatenate(images)[order],
        np.concatenate(right, axis=1)[:, order],
        np.concatenate(counted, axis=1)[:, order],
        positives,
    )


def _match_image(made: Array, real: Array, crowd: Array) -> tuple[Array, Array]:
    """Return which detections take a true box, and which are of a crowd: (T, N) bool each."""
    right = np.zeros((len(THRESHOLDS), len(made)), bool)
    ignored = np.zeros_like(right)
    if not len(made) or not len(real):
        return right, ignored
    overlaps = iou(made, real, crowd)
    single = int(np.count_nonzero(~crowd))
    for row, threshold in enumerate(THRESHOLDS):
        free = np.ones(len(real), bool)
        for at in range(len(made)):
            best = _best(np.where(free, overlaps[at], -1.0), single, min(threshold, 1 - 1e-10))
            if best is None:
                continue
            ignored[row, at] = crowd[best]
            right[row, at] = not crowd[best]
            free[best] = crowd[best]
    return right, ignored


def _best(overlaps: Array, single: int, threshold: float) -> int | None:
    """Return the true box of most overlap, the last of equal ones; a crowd where none is left."""
    for start, part in ((0, overlaps[:single]), (single, overlaps[single:])):
        if len(part) and part.max() >= threshold:
            return start + len(part) - 1 - int(part[::-1].argmax())
    return None


def mean_precision(matches: Sequence[Matches], thresholds: slice = slice(None)) -> float:
    """Return the mean over classes, thresholds and recalls: mAP; 0 without a class.

    Args:
        matches: From match_boxes.
        thresholds: Which of THRESHOLDS; all of them for mAP@[.5:.95].
    """
    if not matches:
        return 0.0
    rows = [_precisions(one, np.ones((1, len(one.positives))))[0, thresholds] for one in matches]
    return float(np.mean(rows))


def _precisions(matches: Matches, weights: Array) -> Array:
    """Return the mean precision over recalls: (D, T).

    Args:
        matches: Of one class.
        weights: (D, I): how often each image counts.
    """
    total = weights @ matches.positives
    each = weights[:, None, matches.images]
    right = (each * matches.right).cumsum(axis=-1)
    wrong = (each * (matches.counted & ~matches.right)).cumsum(axis=-1)
    recall = right / np.maximum(total, 1)[:, None, None]
    precision = right / np.maximum(right + wrong, np.spacing(1))
    # From each place on, the best that comes.
    envelope = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
    means = np.zeros(recall.shape[:2])
    for at in np.ndindex(*means.shape):
        places = np.searchsorted(recall[at], _RECALLS, side="left")
        reached = places[places < recall.shape[-1]]
        means[at] = envelope[at][reached].sum() / len(_RECALLS)
    return means


def precision_figures(
    reference: Sequence[Matches], candidate: Sequence[Matches], seed: int = 0
) -> tuple[dict[str, Figure], dict[str, Figure]]:
    """Return mAP and mAP at an IoU of 0.5 of a variant, and what it loses of fp32's.

    Intervals are those of images drawn with replacement, the same for both.

    Args:
        reference: fp32's, from match_boxes.
        candidate: The variant's, of the same images.
        seed: Of the draws.
    """
    count = len(reference[0].positives)
    draws = np.random.default_rng([seed, 7]).multinomial(count, [1 / count] * count, _DRAWS)
    weights = np.concatenate([np.ones((1, count)), draws])
    fp32, ours = _means(reference, weights), _means(candidate, weights)
    names = {"map": slice(None), "map_50": slice(0, 1)}
    figures = {name: _figure(ours[:, part].mean(axis=1)) for name, part in names.items()}
    drops = {name: _figure((fp32 - ours)[:, part].mean(axis=1)) for name, part in names.items()}
    return figures, drops


def _means(matches: Sequence[Matches], weights: Array) -> Array:
    """Return the mean over the classes that are drawn: (D, T)."""
    sums = np.zeros((len(weights), len(THRESHOLDS)))
    present = np.zeros((len(weights), 1))
    for one in matches:
        step = max(1, _BLOCK // max(1, len(THRESHOLDS) * len(one.images)))
        for start in range(0, len(weights), step):
            part = slice(start, start + step)
            drawn = (weights[part] @ one.positives > 0)[:, None]
            sums[part] += np.where(drawn, _precisions(one, weights[part]), 0.0)
            present[part] += drawn
    means: Array = sums / np.maximum(present, 1)
    return means


def _figure(values: Array) -> Figure:
    """Return the first value, with the middle 95 % of the others."""
    value = float(values[0])
    low, high = np.percentile(values[1:], [2.5, 97.5]).tolist()
    return Figure(value=value, low=min(low, value), high=max(high, value))
