"""What a dual encoder is judged on, and by which metric."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluations import retrieval

from mmedge.errors import CalibrationError, ConversionError
from mmedge.models.classification import label_prompts

COUNT = 20
CAPTIONS = tuple(f"caption {index}" for index in range(COUNT))
ONE, TWO = ("red",) * COUNT, ("red", "blue") * 10


def test_prompts_are_those_of_classify(tmp_path: Path) -> None:
    template = "a {size} photo of {}"  # braces that name something are text like any other
    evaluation = retrieval(tmp_path, COUNT, labels=TWO, template=template)
    assert evaluation.samples.items["text"][-2:] == label_prompts(("blue", "red"), template)


def test_captions_are_encoded_where_each_image_has_one(tmp_path: Path) -> None:
    assert retrieval(tmp_path, COUNT, CAPTIONS).samples.items["text"] == CAPTIONS
    assert len(retrieval(tmp_path, COUNT).samples.items["text"]) == 64
    assert len(retrieval(tmp_path, 0).samples.items["image"]) == 64


@pytest.mark.parametrize(
    ("captions", "labels", "default", "available", "unavailable"),
    [
        (CAPTIONS, None, "recall@1", ("recall@10", "cosine-p1", "top-k"), ("zero-shot",)),
        (CAPTIONS, TWO, "recall@1", ("recall@1", "zero-shot"), ()),
        (None, TWO, "zero-shot", ("zero-shot",), ("recall@1",)),
        (None, ONE, "cosine-p1", ("interchangeability",), ("zero-shot", "recall@5")),
        (None, None, "cosine-p1", ("cosine-min", "index-recall"), ("recall@5",)),
    ],
)
def test_metrics_follow_the_data(
    captions: tuple[str, ...] | None,
    labels: tuple[str, ...] | None,
    default: str,
    available: tuple[str, ...],
    unavailable: tuple[str, ...],
    tmp_path: Path,
) -> None:
    evaluation = retrieval(tmp_path, COUNT, captions, labels)
    assert evaluation.default_metric() == default
    for metric in (default, *available):
        evaluation.check_metric(metric)
    for metric in unavailable:
        with pytest.raises(
            CalibrationError, match=f"'{metric}' cannot be measured.*--evaluate"
        ) as refused:
            evaluation.check_metric(metric)
        assert ("caption" in str(refused.value)) == metric.startswith("recall@")
        assert ("labels" in str(refused.value)) == (metric == "zero-shot")


def test_recall_needs_more_samples_than_it_looks_at(tmp_path: Path) -> None:
    evaluation = retrieval(tmp_path, 10, CAPTIONS)
    evaluation.check_metric("recall@5")
    with pytest.raises(CalibrationError, match="'recall@10'"):
        evaluation.check_metric("recall@10")


def test_an_unknown_metric_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"got 'recal@1'.*Did you mean recall@1"):
        retrieval(tmp_path, COUNT, CAPTIONS).check_metric("recal@1")


def test_one_sample_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="one sample is too few"):
        retrieval(tmp_path, 1)


def test_fp32_loses_nothing(tmp_path: Path) -> None:
    assert retrieval(tmp_path, COUNT, CAPTIONS).drop("recall@1", None).value == 0
