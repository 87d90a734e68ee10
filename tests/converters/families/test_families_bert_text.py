"""Dual encoders with a BERT for texts, and MetaCLIP 2: as with transformers, end to end."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from describing import changed_config, describe
from models.tiny_bert_text import MODELS, write_model
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mmedge import DualEncoder
from mmedge.converters import ConvertConfig, convert
from mmedge.errors import SourceError
from mmedge.specs import Modality

QUANTIZED = "chinese_clip"
TEXTS = ["a red circle", "blue", "a picture of a green star of a red ring " * 5, "红 色 的 圆"]


@dataclass(frozen=True)
class Converted:
    folder: Path
    bundle: Path
    reference: Any


@pytest.fixture(scope="module", params=MODELS)
def converted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Converted:
    place = tmp_path_factory.mktemp(request.param)
    folder = write_model(request.param, place / "source")
    bundle = place / "model.mmedge"
    int8 = ("int8-dynamic",) if request.param == QUANTIZED else ()
    convert(ConvertConfig(str(folder), bundle, precisions=("fp32", *int8)))
    return Converted(folder, bundle, transformers.AutoModel.from_pretrained(folder).eval())


def test_texts_and_images_embed_as_with_transformers(
    converted: Converted, evaluation_folder: Path
) -> None:
    files = sorted(evaluation_folder.glob("*.png"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted.folder)
    processor = AutoImageProcessor.from_pretrained(converted.folder, backend="pil")
    with DualEncoder.load(converted.bundle, precision="fp32") as model:
        length = model.text_processor.config.max_length
        fed = tokenizer(
            TEXTS, padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        assert fed["input_ids"].shape[1] == length  # the long text is cut
        pixels = processor([Image.open(path) for path in files], return_tensors="pt")
        with torch.inference_mode():
            texts = converted.reference.get_text_features(**fed).pooler_output
            images = converted.reference.get_image_features(**pixels).pooler_output
            scores = converted.reference(**fed, **pixels).logits_per_image.softmax(dim=-1)
        for got, expected in (
            (model.encode_text(TEXTS), texts),
            (model.encode_image(files), images),
        ):
            unit = torch.nn.functional.normalize(expected, dim=-1).numpy()
            np.testing.assert_allclose(got, unit, atol=2e-5)
            assert unit.std(axis=0).mean() > 0.01  # they differ
        # One at a time too, so that padding is seen to have no effect.
        alone = np.concatenate([model.encode_text(text) for text in TEXTS])
        np.testing.assert_allclose(alone, model.encode_text(TEXTS), atol=2e-5)
        found = model.classify(files, TEXTS, template="{}").probabilities
        np.testing.assert_allclose(found, scores.numpy(), atol=1e-3)


@pytest.mark.parametrize("converted", [QUANTIZED], indirect=True)
def test_int8_runs_and_is_near(converted: Converted, evaluation_folder: Path) -> None:
    files = sorted(evaluation_folder.glob("*.png"))
    with DualEncoder.load(converted.bundle, precision="int8-dynamic") as small:
        images, texts = small.encode_image(files), small.encode_text(TEXTS)
    with DualEncoder.load(converted.bundle, precision="fp32") as model:
        assert (images * model.encode_image(files)).sum(axis=1).min() > 0.97
        assert (texts * model.encode_text(TEXTS)).sum(axis=1).min() > 0.97


def test_more_words_than_rows_are_refused(tmp_path: Path) -> None:
    folder = write_model("chinese_clip", tmp_path / "source")
    copy = changed_config(folder, tmp_path, text_config={"vocab_size": 8})
    with pytest.raises(SourceError, match="the embedding table has 8 rows"):
        describe(copy)


def test_a_tower_of_metaclip_2_alone_is_taken(tmp_path: Path) -> None:
    folder = write_model("metaclip_2", tmp_path / "source")
    model = transformers.MetaClip2VisionModelWithProjection.from_pretrained(folder)
    model.save_pretrained(tmp_path / "vision")
    shutil.copy(folder / "preprocessor_config.json", tmp_path / "vision")
    spec = describe(tmp_path / "vision").spec
    assert list(spec.kind.encoders) == [Modality.IMAGE]  # type: ignore[union-attr]
