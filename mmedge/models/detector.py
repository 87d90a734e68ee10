"""Detector: boxes of objects that texts or example images name, or of fixed classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import cast, overload

import numpy as np

from mmedge.bundle.kinds import DetectorKind
from mmedge.bundle.kinds.detector import OBJECTNESS
from mmedge.bundle.manifest import Manifest
from mmedge.errors import InputError
from mmedge.models.base import Model, Stages
from mmedge.models.batches import encode_ids, token_ids
from mmedge.models.classification import EmbeddingCache, label_prompts
from mmedge.models.images import image_batches, image_sources
from mmedge.models.running import Given, Made, Run, Settings
from mmedge.postprocess.boxes import check_share, corners
from mmedge.postprocess.detections import Detections, select
from mmedge.postprocess.scores import best_classes, best_queries, query_patch
from mmedge.preprocess.decode import ImageSource, frame_size
from mmedge.preprocess.image import ImageProcessor
from mmedge.preprocess.text import TextProcessor
from mmedge.specs import Array, Float32Array, Modality, did_you_mean

__all__ = ["MAX_LABELS", "Detections", "Detector"]

MAX_LABELS = 10_000
"""Largest number of labels of a call."""

_STAGES: Mapping[Modality | None, tuple[str, ...]] = {
    Modality.IMAGE: ("decode", "preprocess", "inference", "boxes"),
    Modality.TEXT: ("tokenize", "inference"),
}
_PROFILED_QUERIES = 8
_SIDES = ("left", "top", "right", "bottom")


@dataclass(frozen=True, slots=True, eq=False)
class _Wanted:
    """Labels of a call, with their queries (L, D), or their positions (L,) among fixed classes."""

    labels: tuple[str, ...]
    queries: Float32Array | None = None
    classes: Array | None = None


class Detector(Model):
    """A detector of objects.

    with mmedge.load("owlv2.mmedge") as detector:
        found = detector.detect("desk.jpg", ["a red mug"], threshold=0.2)
        found.boxes, found.scores, found.labels

    Methods may be called from several threads at once.
    """

    kind = "detector"

    @cached_property
    def _kept(self) -> EmbeddingCache:
        return EmbeddingCache()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the fixed classes; empty where texts name them."""
        return self._section.labels

    @overload
    def detect(  # type: ignore[overload-overlap]  # a path is a collection of texts, too
        self,
        images: ImageSource,
        labels: Sequence[str] | None = None,
        *,
        like: ImageSource | Iterable[ImageSource] | None = None,
        threshold: float | None = None,
        nms: float | None = None,
        batch_size: int | None = None,
    ) -> Detections: ...

    @overload
    def detect(
        self,
        images: Iterable[ImageSource],
        labels: Sequence[str] | None = None,
        *,
        like: ImageSource | Iterable[ImageSource] | None = None,
        threshold: float | None = None,
        nms: float | None = None,
        batch_size: int | None = None,
    ) -> list[Detections]: ...

    def detect(
        self,
        images: ImageSource | Iterable[ImageSource],
        labels: Sequence[str] | None = None,
        *,
        like: ImageSource | Iterable[ImageSource] | None = None,
        threshold: float | None = None,
        nms: float | None = None,
        batch_size: int | None = None,
    ) -> Detections | list[Detections]:
        """Find objects in images.

        The queries of the last 8 lists of labels are kept, so that only the first call encodes
        them. A patch of an open detector has its best label alone; a box of fixed classes may have
        several.

        Args:
            images: One image or several, as encode_image takes them.
            labels: What to look for, up to 10,000 texts, passed to the text encoder as they are;
                with fixed classes some of `labels`, or None for all.
            like: In place of labels: an image of one object, or several, each a class. Labels are
                "image 0", "image 1", ...
            threshold: Only boxes that score higher are returned; None takes the model's own.
            nms: Drop a box that overlaps a better one of its class by more than this share
                (intersection over union); None keeps all. 0.3 is usual for open detectors.
            batch_size: Images that run through the graph at once; None takes the bundle's own.

        Returns:
            The detections of the image, or a list of them for several images.

        Raises:
            ImageError: If an image cannot be read; its path or position is named.
            TextError: If a label cannot be tokenized.
            InputError: If there are no labels or too many, one is empty or given twice, a class is
                unknown, a number is out of range, or there is no image.
            BackendError: If the engine fails, or the model is closed.
        """
        limit = check_share(
            "threshold", self._section.threshold if threshold is None else threshold
        )
        overlap = None if nms is None else check_share("nms", nms)
        size = self._batch_size(self._section.image_encoder, batch_size)
        wanted = self._wanted(labels, like, size)
        found = [
            self._detections(outputs, frame, wanted, limit, overlap)
            for outputs, frame in self._outputs(images, size)
        ]
        if not found:
            raise InputError("Images: got none, expected at least one.")
        return found[0] if image_sources(images) is None else found

    @property
    def runs(self) -> Mapping[str, Run]:
        """Detect objects in images: those that texts name, or all fixed classes."""
        images, both = frozenset({"images"}), frozenset({"images", "texts"})
        fixed = self._section.text_encoder is None
        return {"detect": Run(self._run_detect, images if fixed else both, both)}

    def _run_detect(self, given: Given, settings: Settings) -> Made:
        found = self.detect(
            list(given.images), list(given.texts) or None, threshold=settings.threshold
        )
        rows = [
            {
                "image": str(path),
                "label": str(label),
                "score": float(score),
                **dict(zip(_SIDES, map(float, box), strict=True)),
            }
            for path, one in zip(given.images, found, strict=True)
            for box, score, label in zip(one.boxes, one.scores, one.labels, strict=True)
        ]
        counts = [len(one) for one in found]
        arrays = {
            "image": np.repeat(np.arange(len(found)), counts),
            "boxes": np.concatenate([one.boxes for one in found]),
            "scores": np.concatenate([one.scores for one in found]),
            "class_id": np.concatenate([one.class_id for one in found]),
        }
        return Made(rows, arrays)

    @classmethod
    def stage_names(cls, manifest: Manifest, role: str) -> tuple[str, ...]:
        """Return the stages of a detection in one image, or of the encoding of a label."""
        return _STAGES.get(manifest.modality(role), ())

    def call(self, role: str, sample: object) -> Callable[[], object] | None:
        """Return a detection in one image, with 8 random queries, or the encoding of a label."""
        if role == self._section.text_encoder:
            return lambda: self._encode([str(sample)])
        wanted, limit = self._profiled(), self._section.threshold
        return lambda: [
            self._detections(outputs, frame, wanted, limit, None)
            for outputs, frame in self._outputs(cast(ImageSource, sample), 1)
        ]

    def stages(self, role: str, sample: object) -> Stages | None:
        """Return the call of a role and its stages, each with its input ready."""
        whole = self.call(role, sample)
        assert whole is not None  # noqa: S101, every role has one
        modality = self.manifest.modality(role)
        if modality is Modality.TEXT:
            texts = cast(TextProcessor, self._processor(role))
            fed = texts([str(sample)])
            steps = (lambda: texts([str(sample)]), lambda: self._run(role, fed))
            shown = ", ".join(f"{name} {array.shape}" for name, array in fed.items())
            return Stages(whole, dict(zip(_STAGES[modality], steps, strict=True)), shown)
        processor = self.image_processor
        image = processor.decode(cast(ImageSource, sample))
        feed = processor([image])
        outputs = {name: array[0] for name, array in self._run(role, feed).items()}
        wanted, limit = self._profiled(), self._section.threshold
        parts = (
            lambda: processor.decode(cast(ImageSource, sample)),
            lambda: processor([image]),
            lambda: self._run(role, feed),
            lambda: self._detections(outputs, frame_size(image), wanted, limit, None),
        )
        shown = f"{image.width}x{image.height} image"
        return Stages(whole, dict(zip(_STAGES[modality], parts, strict=True)), shown)

    @property
    def image_processor(self) -> ImageProcessor:
        """Processor from images to the image encoder's input.

        Raises:
            InputError: If the image encoder is not loaded.
        """
        return cast(ImageProcessor, self._processor(self._section.image_encoder))

    @property
    def _section(self) -> DetectorKind:
        return cast(DetectorKind, self.manifest.kind)

    def _wanted(
        self,
        labels: Sequence[str] | None,
        like: ImageSource | Iterable[ImageSource] | None,
        batch_size: int,
    ) -> _Wanted:
        """Return what a call looks for."""
        if isinstance(labels, str):
            raise InputError(f"labels: got the text '{labels}', expected several. Pass [label].")
        if self._section.text_encoder is None:
            return self._fixed(labels, like)
        if (labels is None) == (like is None):
            raise InputError(
                "labels: got " + ("none" if labels is None else "labels and like") + ", expected "
                "texts to look for, such as ['a red mug'], or an image of an object as like=."
            )
        if labels is not None:
            texts = label_prompts(tuple(labels), "{}")
            if len(texts) > MAX_LABELS:
                raise InputError(
                    f"labels: got {len(texts)}, expected at most {MAX_LABELS}. Split the list."
                )
            return _Wanted(texts, self._kept.get(texts, self._encode))
        examples = self._outputs(cast("ImageSource | Iterable[ImageSource]", like), batch_size)
        queries = [
            outputs["class_embeddings"][
                query_patch(outputs["class_embeddings"], outputs["boxes"], outputs.get(OBJECTNESS))
            ]
            for outputs, _ in examples
        ]
        if not queries:
            raise InputError("like: got no image, expected at least one.")
        return _Wanted(tuple(f"image {i}" for i in range(len(queries))), np.stack(queries))

    def _fixed(self, labels: Sequence[str] | None, like: object) -> _Wanted:
        """Return all classes of a closed detector, or some."""
        known = self._section.labels
        if like is not None:
            raise InputError("like: this model detects fixed classes. Use one with a text encoder.")
        if labels is None:
            return _Wanted(known, classes=np.arange(len(known)))
        for label in label_prompts(tuple(labels), "{}"):
            if label not in known:
                raise InputError(
                    f"labels: '{label}' is not one of the {len(known)} classes of this model, "
                    "which Detector.labels lists." + did_you_mean(label, known)
                )
        return _Wanted(tuple(labels), classes=np.array([known.index(label) for label in labels]))

    def _encode(self, texts: Sequence[str]) -> Float32Array:
        """Return the queries of texts: (L, D) float32."""
        role = str(self._section.text_encoder)
        processor = cast(TextProcessor, self._processor(role))
        size, name = self._batch_size(role, None), self._session(role).outputs[0].name

        def run(feed: Mapping[str, Array]) -> Float32Array:
            return self._run(role, feed)[name].astype(np.float32, copy=False)

        with closing(token_ids(texts, processor)) as chunks:
            return np.concatenate([encode_ids(ids, processor, size, run) for ids in chunks])

    def _outputs(
        self, images: ImageSource | Iterable[ImageSource], batch_size: int
    ) -> Iterator[tuple[dict[str, Array], tuple[int, int]]]:
        """Yield the outputs for each image, without the batch axis, and the size of its frame."""
        processor, role = self.image_processor, self._section.image_encoder
        several = image_sources(images)
        frames: list[tuple[int, int]] = []
        if several is None:  # one image, named without a position
            image = processor.decode(cast(ImageSource, images))
            frames.append(frame_size(image))
            batches: Iterable[Mapping[str, Array]] = [processor([image])]
        else:
            batches = image_batches(several, processor, batch_size, frames=frames)
        done = 0
        for batch in batches:
            outputs = self._run(role, batch)
            for row in range(len(batch[processor.config.input])):
                yield {name: array[row] for name, array in outputs.items()}, frames[done]
                done += 1

    def _detections(
        self,
        outputs: Mapping[str, Array],
        frame: tuple[int, int],
        wanted: _Wanted,
        threshold: float,
        overlap: float | None,
    ) -> Detections:
        """Return the detections of one image from its outputs."""
        boxes = corners(outputs["boxes"].astype(np.float32))
        if wanted.queries is not None:
            scores, classes = best_queries(outputs, wanted.queries)
        else:
            logits = outputs["logits"].astype(np.float32)[:, wanted.classes]
            scores, rows, classes = best_classes(logits, len(boxes))
            boxes = boxes[rows]
        return select(
            boxes,
            scores,
            classes,
            wanted.labels,
            size=frame,
            square=self.image_processor.pads,
            threshold=threshold,
            overlap=overlap,
        )

    def _profiled(self) -> _Wanted:
        """Return 8 random queries, or all fixed classes."""
        if self._section.text_encoder is None:
            return self._fixed(None, None)
        role = self.manifest.roles[self._section.image_encoder]
        (shape,) = (out.shape for out in role.outputs if out.name == "class_embeddings")
        drawn = np.random.default_rng(0).standard_normal((_PROFILED_QUERIES, int(shape[-1])))
        return _Wanted(tuple(map(str, range(_PROFILED_QUERIES))), drawn.astype(np.float32))
