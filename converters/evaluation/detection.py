"""Evaluation of detectors: mean average precision, and agreement of boxes with fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import cast

import numpy as np

from mmedge.bundle.kinds import DetectorKind
from mmedge.bundle.quality import Figure, Quality
from mmedge.converters.data.coco import Objects
from mmedge.converters.evaluation.average_precision import (
    Boxes,
    Matches,
    match_boxes,
    precision_figures,
)
from mmedge.converters.evaluation.base import Collected, Evaluation, Metric, Subject
from mmedge.converters.evaluation.bootstrap import mean_figures
from mmedge.converters.families.base import RoleSpec
from mmedge.postprocess.boxes import corners, in_frame, iou
from mmedge.postprocess.scores import best_classes, best_queries
from mmedge.preprocess.image import ImageProcessor
from mmedge.specs import Array

__all__ = ["Detection", "found_share"]

KEPT = 100
"""Boxes kept of an image, the best ones: as many as COCO counts."""

_REFERENCE, _AMONG = 10, 20
_OVERLAP = 0.5
_PATCHES = ("class_embeddings", "boxes", "shift", "scale")

_NEEDS = "true boxes (a COCO file), of the model's own classes where these are fixed"

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "map": Metric(
            "map", "mean average precision at IoU 0.5 to 0.95", agreement=False, needs=_NEEDS
        ),
        "map-50": Metric(
            "map_50", "mean average precision at IoU 0.5", agreement=False, needs=_NEEDS
        ),
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
    """Boxes of images; an open detector looks for the categories of the data, or for its texts.

    Of an image the 100 best boxes are kept. For an open detector those are patches with their
    embeddings, chosen by the queries of the fp32 text encoder.
    """

    metrics = METRICS

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        data, section = subject.data, self._section
        self._labels = section.labels
        if data is not None and data.categories and section.text_encoder is not None:
            self._labels = data.categories
            prompts = [subject.template.replace("{}", label) for label in data.categories]
            text = {"text": prompts}
            self._given = replace(self._given, items={**self._given.items, **text})
            self.samples = replace(self.samples, items={**self.samples.items, **text})

    def default_metric(self) -> str:
        """Return map with true boxes, else box-agreement."""
        return "box-agreement" if self._truth is None else "map"

    def available(self) -> tuple[str, ...]:
        """Return every metric; map only with true boxes of classes that the model has."""
        return tuple(self.metrics)[0 if self._truth is not None else 2 :]

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
        spec: RoleSpec,  # noqa: ARG002, images are counted
        reference: Mapping[str, Collected],
        candidate: Collected,
    ) -> Quality:
        """Compare a variant with fp32, image by image."""
        fp32 = self._boxes(reference)
        ours = self._boxes({**reference, role: candidate})
        shares = np.array([found_share(*pair) for pair in zip(fp32, ours, strict=True)])
        figures = mean_figures({"box_agreement": shares[:, 0], "box_overlap": shares[:, 1]})
        drops: dict[str, Figure] = {}
        if self._truth is not None:
            precise, drops = precision_figures(self._matches(fp32), self._matches(ours))
            figures |= precise
        images = bool(self._given.items.get("image"))
        name = self.subject.data.name if self.subject.data and images else "synthetic"
        data = f"{name}: {len(shares)} samples"
        return Quality(figures=figures, drops=drops, samples=len(shares), data=data)

    def together(
        self, reference: Mapping[str, Collected], candidate: Mapping[str, Collected]
    ) -> Mapping[str, Figure]:
        """Return the loss of mAP with every role in a variant of its own."""
        if self._truth is None:
            return {}
        fp32, ours = (self._matches(self._boxes(each)) for each in (reference, candidate))
        return precision_figures(fp32, ours)[1]

    @property
    def _truth(self) -> Sequence[Objects] | None:
        """The true boxes of every image; None where some have none, or of unknown classes."""
        data = self.subject.data
        if data is None or not set(data.categories) <= set(self._labels):
            return None
        found = [each.objects for each in data.samples if each.objects is not None]
        boxed = any(set(one.labels) for one in found)
        return found if boxed and len(found) == len(data.samples) else None

    def _matches(self, found: Sequence[Boxes]) -> list[Matches]:
        """Match the boxes of every image with the true ones, in pixels as on the device."""
        processor = cast(ImageProcessor, self.subject.processors["image"])
        position = {label: at for at, label in reversed(list(enumerate(self._labels)))}
        truth, ours = [], []
        for real, made in zip(self._truth or (), found, strict=True):
            classes = np.array([position[label] for label in real.labels], np.int64)
            crowd = np.array(real.crowd, bool)
            truth.append(Boxes(np.array(real.boxes).reshape(-1, 4), classes, crowd))
            pixels = in_frame(made.corners, real.size, square=processor.pads)
            ours.append(Boxes(pixels, made.classes, made.marks))
        return match_boxes(truth, ours, len(self._labels))

    def _boxes(self, collected: Mapping[str, Collected]) -> list[Boxes]:
        """Return the boxes of each image, best first, as fractions of what the model sees."""
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
            found.append(Boxes(corners(boxes[order]), classes[order], scores[order]))
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


def found_share(reference: Boxes, other: Boxes) -> tuple[float, float]:
    """Return how much of an image's best boxes another set holds, weighted by score.

    Each of the 10 best boxes takes the one that overlaps it most of the other set's 20 best of its
    class that are not taken yet.

    Args:
        reference: Boxes, best first.
        other: The other set, best first.

    Returns:
        The share found at an IoU of at least 0.5, and the mean IoU of what was found.
    """
    count = min(_REFERENCE, len(reference.corners))
    overlaps = iou(reference.corners[:count], other.corners[:_AMONG])
    overlaps[reference.classes[:count, None] != other.classes[None, :_AMONG]] = 0.0
    found = np.zeros(count)
    for row in range(count if len(other.corners) else 0):
        best = int(overlaps[row].argmax())
        if overlaps[row, best] >= _OVERLAP:
            found[row] = overlaps[row, best]
            overlaps[:, best] = 0.0
    weights = reference.marks[:count].astype(np.float64)
    weights = weights / weights.sum() if weights.sum() > 0 else np.full(count, 1 / count)
    return float(weights @ (found > 0)), float(weights @ found)
