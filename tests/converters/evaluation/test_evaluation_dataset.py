"""What held-out samples are made of."""

from __future__ import annotations

from pathlib import Path

from mmedge.converters.data.datasets import read_dataset
from mmedge.converters.evaluation.dataset import evaluation_set
from mmedge.models.classification import label_prompts


def test_a_class_is_asked_for_in_the_words_of_classify(
    evaluation_folder: Path, clip_folder: Path
) -> None:
    data = read_dataset(evaluation_folder)
    template = "a {size} photo of {}"  # braces that name something are text like any other
    tokenizer = clip_folder / "tokenizer.json"
    samples = evaluation_set(data, template=template, tokenizer_file=tokenizer, seed=0)
    assert samples.known.classes
    assert tuple(samples.class_texts) == label_prompts(samples.known.classes, template)
