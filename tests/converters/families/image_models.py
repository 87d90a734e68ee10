"""What every family of image models is held to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models.tiny_models import IMAGE_LABELS
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mmedge import Encoder
from mmedge.bundle import open_bundle
from mmedge.models import verify_bundle

__all__ = ["check_agrees_with_transformers", "check_is_judged_by_its_classes"]


def _outputs(folder: Path, images: list[Path], model: Any) -> tuple[Any, torch.Tensor]:
    """Return what transformers gives for images: the encoder's outputs and the logits."""
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    from PIL import Image

    pixels = processor([Image.open(path) for path in images], return_tensors="pt")
    with torch.inference_mode():
        return model.base_model(**pixels), model(**pixels).logits


def check_agrees_with_transformers(
    encoder: Encoder,
    folder: Path,
    images: Path,
    model: Any,
    pooled: Callable[[Any], torch.Tensor],
) -> None:
    """Check embeddings and probabilities of fp32 against transformers' own."""
    files = sorted(images.glob("*.png"))
    outputs, logits = _outputs(folder, files, model)
    expected = torch.nn.functional.normalize(pooled(outputs), dim=-1).numpy()
    got = encoder.encode_image(files)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert expected.std(axis=0).mean() > 0.01  # they differ
    assert encoder.labels == IMAGE_LABELS
    found = encoder.classify(files)
    assert found.labels == IMAGE_LABELS
    probabilities = logits.softmax(dim=-1).numpy()
    np.testing.assert_allclose(found.probabilities, probabilities, atol=1e-4)
    assert len(set(probabilities.argmax(axis=1))) > 2  # classes of all kinds
    one = encoder.classify(files[0])
    np.testing.assert_allclose(one.probabilities, probabilities[:1], atol=1e-4)


def check_is_judged_by_its_classes(bundle: Path, folder: Path, images: Path, model: Any) -> None:
    """Check that the quality of fp32 is its accuracy, and that int8 runs and agrees."""
    manifest = open_bundle(bundle).manifest
    assert all(result.passed for result in verify_bundle(open_bundle(bundle)))
    variants = {one.name: one for one in manifest.roles["image_encoder"].variants}
    assert {"fp32", "int8-dynamic", "int8-static"} <= set(variants)
    lines = (images / "captions.jsonl").read_text().splitlines()
    truth = [json.loads(line)["label"] for line in lines]
    _, logits = _outputs(folder, [images / json.loads(line)["image"] for line in lines], model)
    right = [IMAGE_LABELS[i] == label for i, label in zip(logits.argmax(1), truth, strict=True)]
    fp32, int8 = (variants[name].quality for name in ("fp32", "int8-static"))
    assert fp32 is not None
    assert fp32.value("accuracy") == np.mean(right)
    assert fp32.drops["accuracy"].value == 0
    assert int8 is not None
    assert int8.value("class_agreement") > 0.8
    assert int8.value("cosine_min") > 0.98
    with Encoder.load(bundle, precision="int8-static") as encoder:
        classes = encoder.classify(sorted(images.glob("*.png"))).probabilities.argmax(1)
    assert np.mean(classes == logits.argmax(1).numpy()) > 0.8
