"""What a budget can be set on, what a variant loses of it, and whether its vectors may be mixed.

`mmedge.converters.evaluation.embedding` has these names too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mmedge.bundle.figures import Figure
from mmedge.bundle.manifest import Quality
from mmedge.errors import CalibrationError, ConversionError
from mmedge.specs import did_you_mean

__all__ = ["METRICS", "RECALL_AT", "Metric", "drop", "interchangeable"]

RECALL_AT = (1, 5, 10)
"""How many of the nearest a recall looks at."""

# Of ten nearest neighbours nine are found whichever of both made the vectors, and of a hundred
# searches across modalities at most one fails that did not fail before.
_INTERCHANGEABLE_FROM = 0.9
_MIXED_RECALL_DROP = 0.01


@dataclass(frozen=True)
class Metric:
    """A figure that a budget can be set on; larger is better for all of them.

    Attributes:
        figure: Its name in `Quality.figures`.
        about: What it is, for people.
        agreement: Whether it is agreement with fp32, of which fp32 itself has 1.
    """

    figure: str
    about: str
    agreement: bool


def _metrics() -> Iterator[tuple[str, Metric]]:
    for k in RECALL_AT:
        about = (
            "share of captions that find their picture, and of pictures that find their caption, "
            f"among the nearest {k}: the mean of the two directions"
        )
        yield f"recall@{k}", Metric(f"recall@{k}", about, agreement=False)
    about = "share of pictures whose label is the nearest of all labels"
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


def drop(metric: str, quality: Quality) -> Figure:
    """Return what a variant loses of a metric to fp32, with its 95 % interval.

    Of agreement with fp32 that is what is missing to 1; of a task figure it is fp32's figure less
    the variant's, and below 0 where the variant happens to be better.

    Args:
        metric: A name of METRICS.
        quality: Of the variant.

    Raises:
        ConversionError: If the metric is unknown.
        CalibrationError: If the evaluation data could not tell it.
    """
    if metric not in METRICS:
        raise ConversionError(
            f"Unknown metric: got '{metric}', expected one of {', '.join(METRICS)}."
            + did_you_mean(metric, METRICS)
        )
    asked = METRICS[metric]
    known = quality.figures if asked.agreement else quality.drops
    if asked.figure not in known:
        told = [
            name
            for name, other in METRICS.items()
            if other.figure in (quality.figures if other.agreement else quality.drops)
        ]
        raise CalibrationError(
            f"Metric '{metric}' cannot be told from {quality.data or 'the evaluation data'}; what "
            f"can: {', '.join(told)}. Recall needs a caption for each picture and more pictures "
            "than are looked at, zero-shot accuracy two labels or more: give such data with "
            "--evaluate."
        )
    figure = known[asked.figure]
    if not asked.agreement:
        return figure
    return Figure(value=1 - figure.value, low=1 - figure.high, high=1 - figure.low)


def interchangeable(quality: Quality) -> bool:
    """Return whether a variant's vectors may stand in one index with those of fp32.

    So it is where the 95 % intervals of interchangeability and mixed_index lie above 0.9, and an
    index filled by both loses no more than 0.01 of recall@1 where captions can tell. Of the loss
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
