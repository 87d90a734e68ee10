"""Figures of a dual encoder's variant beside fp32: agreement, index recall, task losses.

Every figure is larger for a better variant and carries a 95 % interval from a bootstrap over the
samples (`bootstrap.py`); what is compared for each sample, and how ties and broken embeddings
count, is in `neighbours.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmedge.bundle.differences import cosines
from mmedge.bundle.quality import Figure, Quality
from mmedge.converters.evaluation.bootstrap import mean_figure, mean_figures, percentile_figure
from mmedge.converters.evaluation.neighbours import (
    Ranks,
    Search,
    neighbour_agreement,
    rank_correlation,
    ranks_of_relevant,
)
from mmedge.errors import ShapeError
from mmedge.specs import Array, Float32Array, Modality

__all__ = [
    "RECALL_AT",
    "TOP_K",
    "Embeddings",
    "Labels",
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
    # A modality that the model lacks has no rows.
    counts = [len(rows) for rows in (reference.items, reference.texts) if len(rows) > 1]
    k = min(TOP_K, *(count - 1 for count in counts))
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
            **_index_recall(reference, candidate, modality, k, seed),
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


def _index_recall(
    reference: Embeddings, candidate: Embeddings, modality: Modality, k: int, seed: int
) -> dict[str, Figure]:
    """Return how much of what fp32 finds across modalities an index of both variants finds.

    One index is built with the variant and searched by fp32's queries of the other modality; the
    other is built with fp32's other modality and searched by the variant's queries.
    """
    fp32, variant = reference.of(modality), candidate.of(modality)
    other = reference.items if modality is Modality.TEXT else reference.texts
    if len(other) < 2:
        return {}
    built = neighbour_agreement(Search(other, fp32), [Search(other, variant)], k)[0]
    searched = neighbour_agreement(Search(fp32, other), [Search(variant, other)], k)[0]
    one, two = mean_figure(built, seed), mean_figure(searched, seed)
    both = {end: (getattr(one, end) + getattr(two, end)) / 2 for end in ("value", "low", "high")}
    return {
        "index_recall_fp32_queries": one,
        "index_recall_fp32_index": two,
        # The two may be of different samples; the mean of their intervals is at least as wide as
        # that of their mean.
        "index_recall": Figure(**both),
    }


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
