"""Evaluation of dual encoders: agreement of embeddings with fp32, and task losses.

A variant is evaluated with the other encoder in fp32, so that a loss is its own; `together`
evaluates two variants together. The figures are in `embedding_figures.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from mmedge.bundle.kinds import EmbeddingKind
from mmedge.bundle.quality import Figure, Quality
from mmedge.converters.evaluation.base import SYNTHETIC, Collected, Evaluation, Metric, Subject
from mmedge.converters.evaluation.embedding_figures import (
    RECALL_AT,
    Embeddings,
    Labels,
    evaluate_variant,
    interchangeable,
    task_quality,
)
from mmedge.converters.families.base import RoleSpec
from mmedge.errors import CalibrationError
from mmedge.specs import Float32Array, Modality

__all__ = ["METRICS", "Retrieval"]


def _metrics() -> Iterator[tuple[str, Metric]]:
    for k in RECALL_AT:
        about = (
            "share of captions that find their image, and of images that find their caption, "
            f"among the nearest {k}: the mean of the two directions"
        )
        needs = f"a caption for each sample and more than {k} samples"
        yield f"recall@{k}", Metric(f"recall@{k}", about, agreement=False, needs=needs)
    about = "share of images whose label is the nearest of all labels"
    needs = "two labels or more"
    yield "zero-shot", Metric("zero_shot_accuracy", about, agreement=False, needs=needs)
    about = (
        "share of what fp32 finds across modalities that is found by fp32 queries in an index "
        "built with the variant, and by the variant's queries in an index built with fp32: the mean"
    )
    needs = "an encoder of texts and one of images or sounds"
    yield "index-recall", Metric("index_recall", about, agreement=True, needs=needs)
    for name, figure, about in (
        ("cosine-mean", "cosine_mean", "mean cosine with fp32's embedding of the same sample"),
        ("cosine-p1", "cosine_p1", "first percentile of the cosine with fp32"),
        ("cosine-min", "cosine_min", "smallest cosine with fp32"),
        ("top-k", "top_k_overlap", "share of fp32's nearest neighbours found within the variant"),
        (
            "rank-correlation",
            "rank_correlation",
            "Spearman's correlation of a sample's similarities to all others with fp32's",
        ),
        (
            "interchangeability",
            "interchangeability",
            "share of fp32's nearest neighbours found by queries of one in vectors of the other",
        ),
    ):
        yield name, Metric(figure, about, agreement=True)


METRICS: Mapping[str, Metric] = MappingProxyType(dict(_metrics()))
"""By the name that `mmedge convert --metric` takes. recall@K is the mean of both directions rather
than the worse one: the worse of two noisy figures looks worse than either is."""


class Retrieval(Evaluation):
    """Evaluation of dual encoders: agreement, cross-modal retrieval, zero-shot accuracy."""

    metrics = METRICS
    batch = 8

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        kind, data = subject.model.kind, subject.data
        assert isinstance(kind, EmbeddingKind)  # noqa: S101, the registry's
        self._kind = kind
        self._item = next((m for m in kind.encoders if m is not Modality.TEXT), None)
        self._labels = Labels()
        self._class_texts: tuple[str, ...] = ()
        if data is None or self._item is None or not data.items(self._item):
            return
        samples = [s for s in data.samples if getattr(s, self._item.value) is not None]
        if len(samples) < 2:
            raise CalibrationError(f"{data.name}: one sample is too few to evaluate on. Add more.")
        if Modality.TEXT not in kind.encoders:
            return
        captions = tuple(s.caption for s in samples if s.caption is not None)
        complete = captions if len(captions) == len(samples) else None
        classes = tuple(sorted({s.label for s in samples if s.label is not None}))
        self._labels = Labels(
            captions=complete,
            labels=tuple(s.label for s in samples) if classes else None,
            classes=classes,
        )
        self._class_texts = tuple(subject.template.replace("{}", label) for label in classes)
        self._set_texts(complete)

    def _set_texts(self, captions: Sequence[str] | None) -> None:
        """Use one caption for each item where all have one, else synthetic texts."""
        name = next(n for n, p in self.subject.processors.items() if p.modality is Modality.TEXT)
        texts = captions or self.synthetic(name)
        items = {**self.samples.items, name: (*texts, *self._class_texts)}
        self.samples = replace(self.samples, items=items)

    def default_metric(self) -> str:
        """Return the measurable task metric, else cosine-p1."""
        if self._labels.captions is not None:
            return "recall@1"
        return "zero-shot" if len(self._labels.classes) > 1 else "cosine-p1"

    def available(self) -> tuple[str, ...]:
        """Return agreement, recall where there are enough captions, accuracy with labels."""
        captioned = len(self._labels.captions or ())
        return tuple(
            name
            for name, metric in METRICS.items()
            if (metric.agreement and (name != "index-recall" or len(self._kind.encoders) > 1))
            or (name == "zero-shot" and len(self._labels.classes) > 1)
            or (name.startswith("recall@") and captioned > int(name.removeprefix("recall@")))
        )

    def about(self, spec: RoleSpec) -> str:
        """Return what a role is judged on, in words."""
        data, item = self.subject.data, self._item
        if self.subject.processors[spec.processors[0]].modality is Modality.TEXT:
            captions = self._labels.captions
            if data is not None and self._item is None:  # texts alone
                captions = data.captions
            if data is not None and captions:
                return f"{data.name}: {len(captions)} captions"
            return f"synthetic: {SYNTHETIC} texts of random vocabulary"
        names = {Modality.IMAGE: "noise images", Modality.VIDEO: "videos"}
        noise = names.get(item or Modality.IMAGE, "sounds")
        if data is None or item is None or not data.items(item):
            return f"synthetic: {SYNTHETIC} {noise}"
        names = {Modality.IMAGE: "images", Modality.AUDIO: "sounds", Modality.VIDEO: "videos"}
        plural = names.get(item, "samples")
        return f"{data.name}: {len(data.items(item))} {plural}"

    def quality(
        self, role: str, spec: RoleSpec, reference: Mapping[str, Collected], candidate: Collected
    ) -> Quality:
        """Compare a variant of one encoder, or of the prompter, with fp32."""
        modality = next((m for m, name in self._kind.encoders.items() if name == role), None)
        if modality is None:
            theirs, ours = (
                self._prompted(reference, rows) for rows in (reference[role], candidate)
            )
            pairs = f"{len(ours.texts)} pairs of a text and a video"
            return evaluate_variant(theirs, ours, Modality.TEXT, self._labels, data=pairs)
        return evaluate_variant(
            self._embeddings(reference),
            self._embeddings({**reference, role: candidate}),
            modality,
            self._labels,
            data=self.about(spec),
        )

    def together(
        self, reference: Mapping[str, Collected], candidate: Mapping[str, Collected]
    ) -> Mapping[str, Figure]:
        """Return the loss of each task figure with both encoders in variants of their own."""
        ours = self._embeddings({**reference, **candidate})
        return task_quality(self._embeddings(reference), ours, self._labels).drops

    def interchangeable(self, quality: Quality) -> bool:
        """Return whether a variant's embeddings can share an index with those of fp32."""
        return interchangeable(quality)

    def _prompted(self, reference: Mapping[str, Collected], prompted: Collected) -> Embeddings:
        """Return embeddings with each text adapted to its video; classes are left as they are."""
        rows = _only_output(prompted).reshape(-1, self._kind.embedding_dim)
        return replace(self._embeddings(reference), texts=rows)

    def _embeddings(self, collected: Mapping[str, Collected]) -> Embeddings:
        """Split the text embeddings into texts and class texts."""
        rows = {
            modality: _only_output(collected[name])
            for modality, name in self._kind.encoders.items()
        }
        nothing = np.empty((0, self._kind.embedding_dim), np.float32)
        texts = rows.get(Modality.TEXT, nothing)
        count = len(texts) - len(self._class_texts)
        item = self._item or Modality.IMAGE
        return Embeddings(rows.get(item, nothing), texts[:count], texts[count:], item)


def _only_output(collected: Collected) -> Float32Array:
    return next(iter(collected.values())).astype(np.float32, copy=False)
