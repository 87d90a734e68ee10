"""Evaluation of dual encoders: agreement of embeddings with fp32, and task losses.

Every figure is larger for a better variant and carries a 95 % interval from a bootstrap over the
samples (`bootstrap.py`); what is compared for each sample, and how ties and broken embeddings
count, is in `neighbours.py`. A variant is evaluated with the other encoder in fp32, so that a
loss is its own; `task_quality` evaluates two variants together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from mmedge.bundle.differences import cosines
from mmedge.bundle.kinds import DualEncoderKind
from mmedge.bundle.quality import Figure, Quality
from mmedge.converters.evaluation.base import SYNTHETIC, Collected, Evaluation, Metric, Subject
from mmedge.converters.evaluation.bootstrap import mean_figure, mean_figures, percentile_figure
from mmedge.converters.evaluation.neighbours import (
    Ranks,
    Search,
    neighbour_agreement,
    rank_correlation,
    ranks_of_relevant,
)
from mmedge.converters.families.base import RoleSpec
from mmedge.errors import CalibrationError, ShapeError
from mmedge.specs import Array, Float32Array, Modality

__all__ = [
    "METRICS",
    "RECALL_AT",
    "TOP_K",
    "Embeddings",
    "Labels",
    "Retrieval",
    "TaskQuality",
    "evaluate_variant",
    "interchangeable",
    "mixed_indexes",
    "recall_at_k",
    "task_quality",
    "top_k_overlap",
    "zero_shot_accuracy",
]

TOP_K = 10
RECALL_AT = (1, 5, 10)
"""Values of k for recall@k."""
# Samples among which ranks are correlated: sorting all of 20,000 x 20,000 would take minutes, and
# the mean over so many samples is known well enough.
_MAX_RANKED = 2000
# Of ten nearest neighbours nine are found whichever of both made the vectors, and of a hundred
# searches across modalities at most one fails that did not fail before.
_INTERCHANGEABLE_FROM = 0.9
_MIXED_RECALL_DROP = 0.01


def _metrics() -> Iterator[tuple[str, Metric]]:
    for k in RECALL_AT:
        about = (
            "share of captions that find their image, and of images that find their caption, "
            f"among the nearest {k}: the mean of the two directions"
        )
        yield f"recall@{k}", Metric(f"recall@{k}", about, agreement=False)
    about = "share of images whose label is the nearest of all labels"
    yield "zero-shot", Metric("zero_shot_accuracy", about, agreement=False)
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


def interchangeable(quality: Quality) -> bool:
    """Return whether a variant's embeddings can share an index with those of fp32.

    So it is where the 95 % intervals of interchangeability and mixed_index lie above 0.9, and an
    index filled by both loses no more than 0.01 of recall@1 where captions allow it. Of the loss
    the value counts and not its interval: that of a few hundred captions is wider than the limit.

    Cosines cannot decide this: what a small difference does to a search depends on how densely
    the vectors lie, and a difference that all share can put one variant's vectors before the
    other's.

    Args:
        quality: Of the variant.
    """
    lost = quality.drops.get("mixed_recall@1")
    if lost is not None and lost.value > _MIXED_RECALL_DROP:
        return False
    agreement = (quality.figures.get(name) for name in ("interchangeability", "mixed_index"))
    return all(figure is not None and figure.low >= _INTERCHANGEABLE_FROM for figure in agreement)


@dataclass(frozen=True)
class Labels:
    """Labels of an evaluation set of N items (images or sounds) and N captions.

    Attributes:
        captions: One for each item, or None where there are none.
        labels: One class for each item that has one, else None; None where no item has.
        classes: The different labels, in the order of the label embeddings.
    """

    captions: tuple[str, ...] | None = None
    labels: tuple[str | None, ...] | None = None
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of an evaluation set.

    Attributes:
        items: (N, D), of the images or sounds.
        texts: (M, D); of the captions where there are any, M = N then.
        class_texts: (C, D), one for each class; may be empty.
        modality: Of the items.
    """

    items: Float32Array
    texts: Float32Array
    class_texts: Float32Array
    modality: Modality = Modality.IMAGE

    def of(self, modality: Modality) -> Float32Array:
        """Return the samples of one modality."""
        return self.texts if modality is Modality.TEXT else self.items


@dataclass(frozen=True)
class TaskQuality:
    """Task metrics of a pair of encoders, and their drops from fp32.

    Attributes:
        figures: By name; empty without captions or labels.
        drops: fp32's figure less this one, under the same names.
    """

    figures: dict[str, Figure]
    drops: dict[str, Figure]


class Retrieval(Evaluation):
    """Evaluation of dual encoders: agreement, cross-modal retrieval, zero-shot accuracy."""

    metrics = METRICS

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        kind, data = subject.model.kind, subject.data
        assert isinstance(kind, DualEncoderKind)  # noqa: S101, the registry's
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
            if metric.agreement
            or (name == "zero-shot" and len(self._labels.classes) > 1)
            or (name.startswith("recall@") and captioned > int(name.removeprefix("recall@")))
        )

    def about(self, spec: RoleSpec) -> str:
        """Return what a role is judged on, in words."""
        data, item = self.subject.data, self._item
        if self.subject.processors[spec.processors[0]].modality is Modality.TEXT:
            if data is not None and self._labels.captions is not None:
                return f"{data.name}: {len(self._labels.captions)} captions"
            return f"synthetic: {SYNTHETIC} texts of random vocabulary"
        noise = "noise images" if item is Modality.IMAGE else "sounds"
        if data is None or item is None or not data.items(item):
            return f"synthetic: {SYNTHETIC} {noise}"
        plural = {Modality.IMAGE: "images", Modality.AUDIO: "sounds"}.get(item, "samples")
        return f"{data.name}: {len(data.items(item))} {plural}"

    def quality(
        self, role: str, spec: RoleSpec, reference: Mapping[str, Collected], candidate: Collected
    ) -> Quality:
        """Compare a variant of one encoder with fp32."""
        modality = next(m for m, name in self._kind.encoders.items() if name == role)
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
        """Return whether a variant's embeddings may stand in one index with those of fp32."""
        return interchangeable(quality)

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


def evaluate_variant(
    reference: Embeddings,
    candidate: Embeddings,
    modality: Modality,
    known: Labels,
    *,
    data: str,
    seed: int = 0,
) -> Quality:
    """Compare a variant of one encoder with fp32 on held-out samples.

    Args:
        reference: Of fp32, two samples of the modality or more.
        candidate: The same with the variant's embeddings in the place of one modality's.
        modality: Modality of the variant's encoder.
        known: What is known about the samples.
        data: What the samples are.
        seed: Random seed.

    Raises:
        ShapeError: If the embeddings are not of the same samples, or of fewer than two.
    """
    fp32, variant = reference.of(modality), candidate.of(modality)
    values = cosines(fp32, variant)
    if len(values) < 2:
        raise ShapeError(
            f"Evaluation on {data}: got {len(values)} samples, expected 2 or more, so that one has "
            "a neighbour. Evaluate on more."
        )
    k = min(TOP_K, len(values) - 1)
    one, other = mixed_indexes(fp32, variant, seed)
    searches = ((variant, variant), (fp32, variant), (variant, fp32), (fp32, one), (variant, other))
    alone, *crossed = neighbour_agreement(
        Search(fp32, fp32, own=True),
        [Search(queries, vectors, own=True) for queries, vectors in searches],
        k,
    )
    agreement = mean_figures(
        {
            "cosine_mean": values,
            "top_k_overlap": alone,
            "interchangeability": (crossed[0] + crossed[1]) / 2,
            "mixed_index": (crossed[2] + crossed[3]) / 2,
        },
        seed,
    )
    task = task_quality(reference, candidate, known, seed=seed)
    mixed_task = _mixed_recall(reference, candidate, modality, known, seed)
    return Quality(
        figures={
            "cosine_mean": agreement["cosine_mean"],
            "cosine_p1": percentile_figure(values, 1, seed),
            "cosine_min": percentile_figure(values, 0, seed),
            "top_k_overlap": agreement["top_k_overlap"],
            "rank_correlation": mean_figure(_rank_correlations(fp32, variant, seed), seed),
            "interchangeability": agreement["interchangeability"],
            "mixed_index": agreement["mixed_index"],
            **task.figures,
            **mixed_task.figures,
        },
        drops={**task.drops, **mixed_task.drops},
        samples=len(values),
        data=data,
        settings={"top_k": k},
    )


def task_quality(
    reference: Embeddings, candidate: Embeddings, known: Labels, *, seed: int = 0
) -> TaskQuality:
    """Return the task metrics of two encoders together, and their drops from fp32.

    Equal captions count as relevant to each other's items. Recall is only reported with
    more than k samples.

    Args:
        reference: Of fp32.
        candidate: Of the variants, one or both encoders being quantized.
        known: Captions and labels.
        seed: Random seed.

    Raises:
        ShapeError: If there is not one embedding for each thing that is known.
    """
    return _compare(_task_values(reference, known), _task_values(candidate, known), seed)


def mixed_indexes(
    reference: Float32Array, candidate: Float32Array, seed: int = 0
) -> tuple[Float32Array, Float32Array]:
    """Return two mixed indexes: half of each variant, and the other halves.

    Args:
        reference: (N, D).
        candidate: (N, D), of the same samples.
        seed: Random seed of the split.
    """
    half = np.zeros((len(reference), 1), bool)
    half[np.random.default_rng(seed).permutation(len(reference))[: len(reference) // 2]] = True
    return np.where(half, reference, candidate), np.where(half, candidate, reference)


def top_k_overlap(reference: Float32Array, candidate: Float32Array, k: int) -> float:
    """Return the mean overlap of the k nearest other samples in both embeddings.

    Args:
        reference: (N, D).
        candidate: (N, D), of the same samples.
        k: 1 <= k < N.

    Raises:
        ShapeError: If k is out of range or the shapes differ.
    """
    truth, found = (Search(rows, rows, own=True) for rows in (reference, candidate))
    return float(neighbour_agreement(truth, [found], k).mean())


def recall_at_k(
    queries: Float32Array,
    vectors: Float32Array,
    query_groups: Array,
    vector_groups: Array,
    k: int,
) -> float:
    """Return recall@k: the share of queries with a vector of their group in the top k.

    Args:
        queries: (Q, D).
        vectors: (N, D).
        query_groups: (Q,) integers.
        vector_groups: (N,) integers.
        k: At least 1; more than N counts as N.

    Raises:
        ShapeError: If the shapes do not go together.
    """
    ranks = ranks_of_relevant(Search(queries, vectors), query_groups, vector_groups)
    return float(ranks.hits(k).mean())


def zero_shot_accuracy(
    items: Float32Array, class_texts: Float32Array, targets: Sequence[int]
) -> float:
    """Return zero-shot accuracy: the share of items nearest to the right class text.

    Args:
        items: (N, D).
        class_texts: (C, D), one for each class.
        targets: N indices into the classes.
    """
    return recall_at_k(items, class_texts, np.asarray(targets), np.arange(len(class_texts)), 1)


def _rank_correlations(fp32: Float32Array, variant: Float32Array, seed: int) -> Array:
    if len(fp32) > _MAX_RANKED:
        chosen = np.random.default_rng(seed).permutation(len(fp32))[:_MAX_RANKED]
        fp32, variant = fp32[chosen], variant[chosen]
    return rank_correlation(Search(fp32, fp32, own=True), Search(variant, variant, own=True))


def _task_values(embeddings: Embeddings, known: Labels) -> list[dict[str, Array]]:
    """Return the task metrics of each sample: one dict for each set of samples."""
    values: list[dict[str, Array]] = []
    if known.captions is not None:
        groups = _groups(known.captions)
        items, texts = embeddings.items, embeddings.texts
        name = embeddings.modality.value
        to_item = ranks_of_relevant(Search(texts, items), groups, groups)
        to_text = ranks_of_relevant(Search(items, texts), groups, groups)
        values.append(
            {
                figure: hits
                for k in _recalls(len(groups))
                for figure, hits in (
                    (f"text_to_{name}_recall@{k}", to_item.hits(k)),
                    (f"{name}_to_text_recall@{k}", to_text.hits(k)),
                    # A sample is an item with its caption: drawn together.
                    (f"recall@{k}", (to_item.hits(k) + to_text.hits(k)) / 2),
                )
            }
        )
    if known.labels is not None and len(known.classes) > 1:
        rows = [row for row, label in enumerate(known.labels) if label is not None]
        targets = np.array([known.classes.index(str(known.labels[row])) for row in rows])
        search = Search(embeddings.items[rows], embeddings.class_texts)
        ranks = ranks_of_relevant(search, targets, np.arange(len(known.classes)))
        values.append({"zero_shot_accuracy": ranks.hits(1)})
    return values


def _mixed_recall(
    reference: Embeddings,
    candidate: Embeddings,
    modality: Modality,
    known: Labels,
    seed: int,
) -> TaskQuality:
    """Return recall of fp32 queries of the other modality in an index of both variants."""
    if known.captions is None:
        return TaskQuality({}, {})
    groups = _groups(known.captions)
    queries = reference.items if modality is Modality.TEXT else reference.texts
    fp32, variant = reference.of(modality), candidate.of(modality)

    def ranks(vectors: Float32Array) -> Ranks:
        return ranks_of_relevant(Search(queries, vectors), groups, groups)

    alone = ranks(fp32)
    mixed = [ranks(vectors) for vectors in mixed_indexes(fp32, variant, seed)]
    names = {f"mixed_recall@{k}": k for k in _recalls(len(groups))}
    return _compare(
        [{name: alone.hits(k) for name, k in names.items()}],
        [{name: np.mean([r.hits(k) for r in mixed], axis=0) for name, k in names.items()}],
        seed,
    )


def _recalls(samples: int) -> list[int]:
    return [k for k in RECALL_AT if k < samples]


def _groups(captions: Sequence[str]) -> Array:
    groups: Array = np.unique(np.asarray(captions), return_inverse=True)[1]
    return groups


def _compare(
    reference: Sequence[dict[str, Array]], candidate: Sequence[dict[str, Array]], seed: int
) -> TaskQuality:
    figures: dict[str, Figure] = {}
    drops: dict[str, Figure] = {}
    for before, after in zip(reference, candidate, strict=True):
        figures |= mean_figures(after, seed)
        drops |= mean_figures({name: before[name] - after[name] for name in after}, seed)
    return TaskQuality(figures, drops)
