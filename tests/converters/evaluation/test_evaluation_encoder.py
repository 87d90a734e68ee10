"""What a lone encoder is judged on: classes where it has them, neighbours anyway."""

from __future__ import annotations

from pathlib import Path

import bundles
import numpy as np
import pytest
import torch

from mmedge.bundle.kinds import ClassHead, EncoderKind
from mmedge.bundle.tensors import ProcessorFeed
from mmedge.converters.data.datasets import Dataset, Sample
from mmedge.converters.evaluation.base import Subject
from mmedge.converters.evaluation.encoder import Encoding
from mmedge.converters.families.base import ModelSpec, RoleSpec
from mmedge.errors import CalibrationError
from mmedge.preprocess.registry import open_processor
from mmedge.specs import Array, Compare, Modality, TensorSpec

LABELS = ("cat", "dog", "crane", "crane")
COUNT = 20
FLOAT = np.dtype(np.float32)
SPEC = RoleSpec(
    module=None,
    inputs=(),
    outputs=(TensorSpec("embedding", FLOAT, ("batch", 4)), TensorSpec("logits", FLOAT, (4,))),
    axes={},
    sample=lambda _sizes, _seed: {"pixel_values": torch.zeros(1)},
    trace_sizes={},
    proof_sizes=(),
    feeds={"pixel_values": ProcessorFeed(processor="image")},
    compare={"embedding": Compare.ROWS, "logits": Compare.TOKENS},
)


def encoding(samples: list[Sample], labels: tuple[str, ...] = LABELS) -> Encoding:
    head = ClassHead(labels=labels) if labels else None
    kind = EncoderKind(encoders={Modality.IMAGE: "image_encoder"}, embedding_dim=4, class_head=head)
    processors = {"image": open_processor(bundles.PROCESSORS["image"], Path())}
    data = Dataset("held-out", tuple(samples)) if samples else None
    return Encoding(Subject(ModelSpec(kind, (), {}), processors, Path(), data, "a {}", 0))


def images(*labels: str | None, folder: str = "photos") -> list[Sample]:
    return [Sample(image=Path(folder) / f"{i}.png", label=name) for i, name in enumerate(labels)]


def embeddings(seed: int = 0) -> Array:
    rows = np.random.default_rng(seed).standard_normal((COUNT, 4)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("samples", "labels", "default", "measured"),
    [
        (images(*("cat", "crane") * 10), LABELS, "accuracy", {"accuracy", "class-agreement"}),
        (images(*("cat", None) * 10), LABELS, "accuracy", {"accuracy", "class-agreement"}),
        (images(*(None,) * COUNT), LABELS, "class-agreement", {"class-agreement"}),
        (images(*("house", "tree") * 10), LABELS, "class-agreement", {"class-agreement"}),
        (images(None, None, folder="dog"), LABELS, "accuracy", {"accuracy"}),
        (images("cat", "dog"), (), "cosine-p1", {"cosine-p1", "top-k"}),
        ([], LABELS, "class-agreement", {"class-agreement", "interchangeability"}),
    ],
)
def test_metrics_follow_head_and_labels(
    samples: list[Sample], labels: tuple[str, ...], default: str, measured: set[str]
) -> None:
    evaluation = encoding(samples, labels)
    assert evaluation.default_metric() == default
    available = set(evaluation.available())
    assert measured <= available
    assert ("accuracy" in available) == (default == "accuracy")
    assert not {"recall@1", "zero-shot", "index-recall"} & available
    if "accuracy" not in available:
        with pytest.raises(CalibrationError, match="'accuracy' cannot be measured"):
            evaluation.check_metric("accuracy")


def test_a_label_that_the_model_lacks_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"'dogs' is none of the model's .* mean dog\?"):
        encoding(images("cat", "dogs"))


def test_classes_are_compared_with_fp32_and_with_the_labels() -> None:
    truth = ["cat"] * 5 + ["dog"] * 5 + ["crane"] * 5 + [None] * 5
    evaluation = encoding(images(*truth))
    rows = embeddings()
    # fp32: all right; either of the equal labels is. The variant: two cats taken for dogs.
    fp32 = np.array([0] * 5 + [1] * 5 + [2, 3, 2, 3, 3] + [0] * 5)
    ours = fp32.copy()
    ours[:2] = 1
    ours[10] = 3  # another index of the same label
    quality = evaluation.quality(
        "image_encoder",
        SPEC,
        {"image_encoder": {"embedding": rows, "logits": fp32}},
        {"embedding": rows, "logits": ours},
    )
    assert quality.value("class_agreement") == pytest.approx(17 / 20)
    assert quality.value("accuracy") == pytest.approx(13 / 15)
    assert quality.drops["accuracy"].value == pytest.approx(2 / 15)
    assert quality.value("cosine_min") == pytest.approx(1)
    assert evaluation.drop("class-agreement", quality).value == pytest.approx(3 / 20)
    assert evaluation.drop("accuracy", quality).value == pytest.approx(2 / 15)


def test_only_the_class_of_logits_is_stored() -> None:
    evaluation, logits = encoding([]), np.eye(4, dtype=np.float32)[[2, 0]]
    assert evaluation.keep(logits, Compare.TOKENS).tolist() == [2, 0]
    assert evaluation.keep(logits, Compare.ROWS) is logits


def test_without_a_head_embeddings_alone_are_judged() -> None:
    evaluation, rows = encoding(images(*(None,) * COUNT), ()), embeddings()
    collected = {"embedding": rows}
    quality = evaluation.quality(
        "image_encoder", SPEC, {"image_encoder": collected}, {"embedding": embeddings(1)}
    )
    assert quality.drops == {}
    assert "class_agreement" not in quality.figures
    assert quality.value("interchangeability") < 1  # type: ignore[operator]
