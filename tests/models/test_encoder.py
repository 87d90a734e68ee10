"""Encoder: embeddings and classes of one modality."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_models import IMAGE_LABELS

import mmedge
from mmedge import Encoder
from mmedge.errors import BundleError, DTypeError, ImageError, InputError
from mmedge.models import Skipped


@pytest.fixture(scope="module")
def encoder(vit_bundle: Path) -> Iterator[Encoder]:
    with mmedge.load(vit_bundle, precision="fp32") as model:
        assert isinstance(model, Encoder)
        yield model


def test_classes_of_a_batch_are_those_of_each_image(
    encoder: Encoder, evaluation_folder: Path
) -> None:
    files = sorted(evaluation_folder.glob("*.png"))[:5]
    found = encoder.classify(files, batch_size=2)
    assert found.probabilities.shape == (5, len(IMAGE_LABELS))
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=1e-6)
    for row, file in zip(found.probabilities, files, strict=True):
        np.testing.assert_allclose(encoder.classify(file).probabilities[0], row, atol=1e-6)


def test_prepared_images_are_classified(encoder: Encoder, evaluation_folder: Path) -> None:
    files = sorted(evaluation_folder.glob("*.png"))[:3]
    tensor = encoder.image_processor(files)["pixel_values"]
    expected = encoder.classify(files).probabilities
    got = encoder.classify(tensor, batch_size=2).probabilities
    np.testing.assert_allclose(got, expected, atol=1e-6)
    with pytest.raises(DTypeError, match="expected float32"):
        encoder.classify(tensor.astype(np.float64))


def test_images_that_cannot_be_read_are_skipped_or_raise(
    encoder: Encoder, evaluation_folder: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    good = sorted(evaluation_folder.glob("*.png"))[0]
    with pytest.raises(ImageError, match=r"images\[1\]"):
        encoder.classify([good, bad])
    skipped: list[Skipped] = []
    assert encoder.classify([bad, good], skipped=skipped).probabilities.shape == (1, 6)
    assert encoder.classify([bad], skipped=skipped).probabilities.shape == (0, 6)
    assert encoder.encode_image([bad], skipped=skipped).shape == (0, encoder.embedding_dim)
    assert [one.position for one in skipped] == [0, 0, 0]
    with pytest.raises(InputError, match="got none"):
        encoder.classify([])


def test_an_encoder_without_a_head_has_no_classes(tiny_bundle: mmedge.Bundle) -> None:
    import json

    path = tiny_bundle.path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tasks"] = ["retrieval"]
    manifest["kind"] = {
        "type": "encoder", "encoders": {"image": "image_encoder"},
        "embedding_dim": manifest["kind"]["embedding_dim"],
    }  # fmt: skip
    del manifest["roles"]["text_encoder"], manifest["processors"]["text"]
    path.write_text(json.dumps(manifest))
    with mmedge.load(tiny_bundle.path) as model:
        assert isinstance(model, Encoder)
        assert model.labels == ()
        image = np.zeros((8, 8, 3), np.uint8)
        assert model.encode_image(image).shape == (1, model.embedding_dim)
        with pytest.raises(BundleError, match="no classification head"):
            model.classify(image)
        with pytest.raises(InputError, match="holds no text_encoder"):
            model.encode_text("a")


def test_an_encoder_is_not_a_dual_encoder(vit_bundle: Path) -> None:
    with pytest.raises(BundleError, match="is a Encoder bundle, not a DualEncoder"):
        mmedge.DualEncoder.load(vit_bundle)
