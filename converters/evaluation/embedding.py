"""How much of fp32 is left in a variant: agreement of embeddings, and what tasks lose by it.

    quality = evaluate_variant(fp32, replace(fp32, images=int8), Modality.IMAGE, known, data="...")
    quality.figures["interchangeability"]  # value, low and high
    drop("recall@1", quality)  # what is lost to fp32, with the interval of the paired difference

Every figure is larger for a better variant and carries a 95 % interval from a bootstrap over the
samples (`bootstrap.py`); what is compared for each sample, and how ties and broken embeddings
count, is in `neighbours.py`. A variant is judged with the other encoder in fp32, so that a loss is
its own; `task_quality` judges two variants together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmedge.bundle.figures import Figure
from mmedge.bundle.manifest import Quality
from mmedge.converters.evaluation.bootstrap import mean_figure, mean_figures, percentile_figure
from mmedge.converters.evaluation.metrics import METRICS, RECALL_AT, Metric, drop, interchangeable
from mmedge.converters.evaluation.neighbours import (
    Ranks,
    Search,
    neighbour_agreement,
    rank_correlation,
    ranks_of_relevant,
)
from mmedge.converters.numerics.distance import cosines
from mmedge.errors import ShapeError
from mmedge.specs import Array, Float32Array, Modality

__all__ = [
    "METRICS",
    "TOP_K",
    "Embeddings",
    "EvaluationLabels",
    "Figure",
    "Metric",
    "TaskQuality",
    "drop",
    "evaluate_variant",
    "interchangeable",
    "mixed_indexes",
    "recall_at_k",
    "task_quality",
    "top_k_overlap",
    "zero_shot_accuracy",
]

TOP_K = 10
# Samples among which ranks are correlated: sorting all of 20,000 x 20,000 would take minutes, and
# the mean over so many samples is known well enough.
_MAX_RANKED = 2000


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


@dataclass(frozen=True)
class Embeddings:
    """What a pair of encoders makes of an evaluation set.

    Attributes:
        images: (N, D).
        texts: (M, D); of the captions where there are any, M = N then.
        class_texts: (C, D), one for each class; may be empty.
    """

    images: Float32Array
    texts: Float32Array
    class_texts: Float32Array

    def of(self, modality: Modality) -> Float32Array:
        """Return the samples of one modality."""
        return self.texts if modality is Modality.TEXT else self.images


@dataclass(frozen=True)
class TaskQuality:
    """Task figures of a pair of encoders, and what they lose to fp32.

    Attributes:
        figures: By name; empty where nothing is known about the samples.
        drops: fp32's figure less this one, under the same names.
    """

    figures: dict[str, Figure]
    drops: dict[str, Figure]


def evaluate_variant(
    reference: Embeddings,
    candidate: Embeddings,
    modality: Modality,
    known: EvaluationLabels,
    *,
    data: str,
    seed: int = 0,
) -> Quality:
    """Compare a variant of one encoder with fp32 on held-out samples.

    Args:
        reference: Of fp32, two samples of the modality or more.
        candidate: The same with the variant's embeddings in the place of one modality's.
        modality: Whose encoder the variant is.
        known: What is known about the samples.
        data: What the samples are.
        seed: Of everything that is drawn.

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
        top_k=k,
        samples=len(values),
        data=data,
    )


def task_quality(
    reference: Embeddings, candidate: Embeddings, known: EvaluationLabels, *, seed: int = 0
) -> TaskQuality:
    """Return the task figures of two encoders together, and what they lose to fp32.

    Equal captions count as relevant to each other's pictures. A recall is only told where there are
    more samples than are looked at.

    Args:
        reference: Of fp32.
        candidate: Of the variants, one or both encoders being quantized.
        known: Captions and labels.
        seed: Of everything that is drawn.

    Raises:
        ShapeError: If there is not one embedding for each thing that is known.
    """
    return _compare(_task_values(reference, known), _task_values(candidate, known), seed)


def mixed_indexes(
    reference: Float32Array, candidate: Float32Array, seed: int = 0
) -> tuple[Float32Array, Float32Array]:
    """Return what an index holds that was filled by both: half and half, and the other way round.

    Args:
        reference: (N, D).
        candidate: (N, D), of the same samples.
        seed: Of which half is whose.
    """
    half = np.zeros((len(reference), 1), bool)
    half[np.random.default_rng(seed).permutation(len(reference))[: len(reference) // 2]] = True
    return np.where(half, reference, candidate), np.where(half, candidate, reference)


def top_k_overlap(reference: Float32Array, candidate: Float32Array, k: int) -> float:
    """Return the mean share of the k nearest other samples that both embeddings agree on.

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
    """Return the share of queries that find a vector of their group among their k nearest.

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
    images: Float32Array, class_texts: Float32Array, targets: Sequence[int]
) -> float:
    """Return the share of pictures whose nearest class text is the right one.

    Args:
        images: (N, D).
        class_texts: (C, D), one for each class.
        targets: N indices into the classes.
    """
    return recall_at_k(images, class_texts, np.asarray(targets), np.arange(len(class_texts)), 1)


def _rank_correlations(fp32: Float32Array, variant: Float32Array, seed: int) -> Array:
    if len(fp32) > _MAX_RANKED:
        chosen = np.random.default_rng(seed).permutation(len(fp32))[:_MAX_RANKED]
        fp32, variant = fp32[chosen], variant[chosen]
    return rank_correlation(Search(fp32, fp32, own=True), Search(variant, variant, own=True))


def _task_values(embeddings: Embeddings, known: EvaluationLabels) -> list[dict[str, Array]]:
    """Return what the tasks give for each sample: one dict for each set of samples."""
    values: list[dict[str, Array]] = []
    if known.captions is not None:
        groups = _groups(known.captions)
        images, texts = embeddings.images, embeddings.texts
        to_image = ranks_of_relevant(Search(texts, images), groups, groups)
        to_text = ranks_of_relevant(Search(images, texts), groups, groups)
        values.append(
            {
                name: hits
                for k in _recalls(len(groups))
                for name, hits in (
                    (f"text_to_image_recall@{k}", to_image.hits(k)),
                    (f"image_to_text_recall@{k}", to_text.hits(k)),
                    # A sample is a picture with its caption: drawn together.
                    (f"recall@{k}", (to_image.hits(k) + to_text.hits(k)) / 2),
                )
            }
        )
    if known.labels is not None and len(known.classes) > 1:
        rows = [row for row, label in enumerate(known.labels) if label is not None]
        targets = np.array([known.classes.index(str(known.labels[row])) for row in rows])
        search = Search(embeddings.images[rows], embeddings.class_texts)
        ranks = ranks_of_relevant(search, targets, np.arange(len(known.classes)))
        values.append({"zero_shot_accuracy": ranks.hits(1)})
    return values


def _mixed_recall(
    reference: Embeddings,
    candidate: Embeddings,
    modality: Modality,
    known: EvaluationLabels,
    seed: int,
) -> TaskQuality:
    """Return what fp32 queries of the other modality find in an index filled by both variants."""
    if known.captions is None:
        return TaskQuality({}, {})
    groups = _groups(known.captions)
    queries = reference.of(Modality.IMAGE if modality is Modality.TEXT else Modality.TEXT)
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
