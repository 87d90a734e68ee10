"""Evaluation of detectors: agreement of boxes with fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import cast

import numpy as np

from mmedge.bundle.kinds import DetectorKind
from mmedge.bundle.quality import Quality
from mmedge.converters.evaluation.base import Collected, Evaluation, Metric
from mmedge.converters.evaluation.bootstrap import mean_figures
from mmedge.converters.families.base import RoleSpec
from mmedge.postprocess.boxes import corners, iou
from mmedge.postprocess.scores import best_classes, best_queries
from mmedge.specs import Array

__all__ = ["Detection", "found_share"]

KEPT = 100
"""Boxes kept of an image, the best ones: as many as COCO counts."""

_REFERENCE, _AMONG = 10, 20
_OVERLAP = 0.5
_PATCHES = ("class_embeddings", "boxes", "shift", "scale")

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "box-agreement": Metric(
            "box_agreement",
            "share of fp32's 10 best boxes of an image, by score, among the 20 best, with the "
            "same label at an IoU of 0.5",
            agreement=True,
        ),
        "box-overlap": Metric(
            "box_overlap", "mean IoU of those boxes with fp32's, 0 where missing", agreement=True
        ),
    }
)


class Detection(Evaluation):
    """Boxes of images; the queries of an open detector are the labels or texts of the data.

    Of an image the 100 best boxes are kept. For an open detector those are patches with their
    embeddings, chosen by the queries of the fp32 text encoder.
    """

    metrics = METRICS

    def default_metric(self) -> str:
        """Return box-agreement."""
        return "box-agreement"

    def available(self) -> tuple[str, ...]:
        """Return every metric."""
        return tuple(self.metrics)

    def collect(
        self,
        spec: RoleSpec,
        run: Callable[[Mapping[str, Array]], Mapping[str, Array]],
        feeds: Iterable[Mapping[str, Array]],
        advance: Callable[[], None],
        reference: Mapping[str, Collected],
    ) -> dict[str, Array]:
        """Collect the embeddings of texts, or the best boxes of images."""
        section = self._section
        if all(item.name != "boxes" for item in spec.outputs):
            return super().collect(spec, run, feeds, advance, reference)
        texts = section.text_encoder
        queries = None if texts is None else next(iter(reference[texts].values()))
        kept: dict[str, list[Array]] = {}
        for feed in feeds:
            outputs = run(feed)
            for row in range(len(outputs["boxes"])):
                one = {name: np.asarray(array[row]) for name, array in outputs.items()}
                for name, array in _best(one, queries).items():
                    kept.setdefault(name, []).append(array)
            advance()
        return {name: np.stack(rows) for name, rows in kept.items()}

    def quality(
        self,
        role: str,
        spec: RoleSpec,
        reference: Mapping[str, Collected],
        candidate: Collected,
    ) -> Quality:
        """Compare a variant with fp32, image by image."""
        fp32 = self._boxes(reference)
        ours = self._boxes({**reference, role: candidate})
        pairs = zip(fp32, ours, strict=True)
        shares = np.array([found_share(*one, *other) for one, other in pairs])
        figures = mean_figures({"box_agreement": shares[:, 0], "box_overlap": shares[:, 1]})
        return Quality(figures=figures, samples=len(shares), data=self.about(spec))

    def _boxes(self, collected: Mapping[str, Collected]) -> list[tuple[Array, Array, Array]]:
        """Return corners (K, 4), scores (K,) and classes (K,) of each image, best first."""
        images = collected[self._section.image_encoder]
        texts = self._section.text_encoder
        queries = None if texts is None else next(iter(collected[texts].values()))
        found = []
        for row, boxes in enumerate(images["boxes"]):
            if queries is None:
                scores, classes = images["scores"][row], images["classes"][row]
            else:
                patches = {name: array[row] for name, array in images.items()}
                scores, classes = best_queries(patches, queries)
            order = np.argsort(-scores, kind="stable")
            found.append((corners(boxes[order]), scores[order], classes[order]))
        return found

    @property
    def _section(self) -> DetectorKind:
        return cast(DetectorKind, self.subject.model.kind)


def _best(outputs: Mapping[str, Array], queries: Array | None) -> dict[str, Array]:
    """Return the best boxes of an image, with what they are scored by."""
    boxes = outputs["boxes"].astype(np.float32)
    if queries is None:
        scores, rows, classes = best_classes(outputs["logits"].astype(np.float32), KEPT)
        return {"boxes": boxes[rows], "scores": scores, "classes": classes}
    patches = {name: outputs[name].astype(np.float32) for name in _PATCHES}
    scores, _ = best_queries(patches, queries)
    chosen = np.argsort(-scores, kind="stable")[:KEPT]
    return {name: array[chosen] for name, array in patches.items()}


def found_share(
    boxes: Array,
    scores: Array,
    classes: Array,
    other_boxes: Array,
    other_scores: Array,  # noqa: ARG001, in order already
    other_classes: Array,
) -> tuple[float, float]:
    """Return how much of an image's best boxes another set holds, weighted by score.

    Each of the 10 best boxes takes the one that overlaps it most of the other set's 20 best of its
    class that are not taken yet.

    Args:
        boxes: (K, 4) corners, best first.
        scores: (K,).
        classes: (K,).
        other_boxes: (M, 4) corners, best first.
        other_scores: (M,).
        other_classes: (M,).

    Returns:
        The share found at an IoU of at least 0.5, and the mean IoU of what was found.
    """
    count = min(_REFERENCE, len(boxes))
    overlaps = iou(boxes[:count], other_boxes[:_AMONG])
    overlaps[classes[:count, None] != other_classes[None, :_AMONG]] = 0.0
    found = np.zeros(count)
    for row in range(count if len(other_boxes) else 0):
        best = int(overlaps[row].argmax())
        if overlaps[row, best] >= _OVERLAP:
            found[row] = overlaps[row, best]
            overlaps[:, best] = 0.0
    weights = scores[:count].astype(np.float64)
    weights = weights / weights.sum() if weights.sum() > 0 else np.full(count, 1 / count)
    return float(weights @ (found > 0)), float(weights @ found)
