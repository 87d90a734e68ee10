"""DINOv2: images of another size than in training, registers, a head over CLS token and patches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from describing import describe
from families.image_models import check_agrees_with_transformers, check_is_judged_by_its_classes
from models.tiny_models import DINOV2_SIDE, write_dinov2
from transformers import (
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersForImageClassification,
)

from mmedge import Encoder
from mmedge.converters.families.reference import check_reference
from mmedge.errors import SourceError


@pytest.fixture(scope="module")
def encoder(dinov2_bundle: Path) -> Iterator[Encoder]:
    with Encoder.load(dinov2_bundle, precision="fp32") as model:
        yield model


def test_images_embed_and_classify_as_with_transformers(
    encoder: Encoder, dinov2_folder: Path, evaluation_folder: Path
) -> None:
    model = Dinov2ForImageClassification.from_pretrained(dinov2_folder).eval()
    check_agrees_with_transformers(
        encoder, dinov2_folder, evaluation_folder, model, lambda outputs: outputs.pooler_output
    )


def test_variants_are_judged_by_their_classes(
    dinov2_bundle: Path, dinov2_folder: Path, evaluation_folder: Path
) -> None:
    model = Dinov2ForImageClassification.from_pretrained(dinov2_folder).eval()
    check_is_judged_by_its_classes(dinov2_bundle, dinov2_folder, evaluation_folder, model)


def test_registers_are_left_out_of_the_mean_patch(tmp_path: Path) -> None:
    folder = write_dinov2(tmp_path / "registers", registers=True)
    described = describe(folder)
    spec = described.spec.roles["image_encoder"]()
    processors = described.freeze(tmp_path / "out")
    reference = described.spec.references["image_encoder"]
    check_reference(described.source, "image_encoder", spec, processors, reference)
    model = Dinov2WithRegistersForImageClassification.from_pretrained(folder).eval()
    pixels = spec.sample({"batch": 2}, 1)["pixel_values"]
    assert pixels.shape == (2, 3, DINOV2_SIDE, DINOV2_SIDE)
    assert spec.module is not None
    with torch.inference_mode():
        expected = model(pixels).logits
        torch.testing.assert_close(spec.module(pixels)[1], expected)


def test_an_encoder_alone_embeds_by_its_cls_token(dinov2_folder: Path, tmp_path: Path) -> None:
    model = Dinov2Model.from_pretrained(dinov2_folder).eval()
    model.save_pretrained(tmp_path)
    shutil.copy(dinov2_folder / "preprocessor_config.json", tmp_path)
    spec = describe(tmp_path).spec.roles["image_encoder"]()
    assert [output.name for output in spec.outputs] == ["embedding"]
    pixels = spec.sample({"batch": 2}, 1)["pixel_values"]
    assert spec.module is not None
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(model(pixels).pooler_output, dim=-1)
        torch.testing.assert_close(spec.module(pixels), expected)


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("preprocessor_config.json", {"crop_size": 30}, "expected multiples of the patch of 7"),
        ("preprocessor_config.json", {"do_center_crop": False}, "of any size, expected one size"),
        ("config.json", {"mlp_ratio": 3}, "the weights do not fit config.json: .*mlp"),
        ("config.json", {"id2label": {"0": "a"}}, "id2label: .*the 6 classes that classifier"),
        ("config.json", {"num_attention_heads": 5}, "num_attention_heads: .*a divisor of"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    file: str, changes: dict[str, object], expected: str, dinov2_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(dinov2_folder, tmp_path / "copy")
    values = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(values))
    with pytest.raises(SourceError, match=expected):
        describe(folder)
