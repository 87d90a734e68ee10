"""ResNet: convolutions, batch norms folded, and ConvNeXt's preprocessing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from describing import describe
from families.image_models import check_agrees_with_transformers, check_is_judged_by_its_classes
from models.tiny_models import RESNET_SIDE
from transformers import ResNetForImageClassification, ResNetModel

from mmedge import Encoder
from mmedge.errors import SourceError
from mmedge.preprocess.config import ImageConfig
from mmedge.preprocess.steps import Crop, Resize


@pytest.fixture(scope="module")
def encoder(resnet_bundle: Path) -> Iterator[Encoder]:
    with Encoder.load(resnet_bundle, precision="fp32") as model:
        yield model


def test_images_embed_and_classify_as_with_transformers(
    encoder: Encoder, resnet_folder: Path, evaluation_folder: Path
) -> None:
    model = ResNetForImageClassification.from_pretrained(resnet_folder).eval()
    check_agrees_with_transformers(
        encoder, resnet_folder, evaluation_folder, model,
        lambda outputs: outputs.pooler_output.flatten(1),
    )  # fmt: skip


def test_variants_are_judged_by_their_classes(
    resnet_bundle: Path, resnet_folder: Path, evaluation_folder: Path
) -> None:
    model = ResNetForImageClassification.from_pretrained(resnet_folder).eval()
    check_is_judged_by_its_classes(resnet_bundle, resnet_folder, evaluation_folder, model)


def test_an_encoder_alone_embeds_by_its_mean(resnet_folder: Path, tmp_path: Path) -> None:
    model = ResNetModel.from_pretrained(resnet_folder).eval()
    model.save_pretrained(tmp_path)
    shutil.copy(resnet_folder / "preprocessor_config.json", tmp_path)
    spec = describe(tmp_path).spec.roles["image_encoder"]()
    assert [output.name for output in spec.outputs] == ["embedding"]
    pixels = spec.sample({"batch": 2}, 1)["pixel_values"]
    assert spec.module is not None
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(model(pixels).pooler_output.flatten(1), dim=-1)
        torch.testing.assert_close(spec.module(pixels), expected)


@pytest.mark.parametrize(
    ("edge", "crop_pct", "expected"),
    [
        (RESNET_SIDE, 0.875, [("shortest_edge", 36), (RESNET_SIDE, RESNET_SIDE)]),
        (48, 0.95, [("shortest_edge", 50), (48, 48)]),
        (384, 0.875, [("exact", 384)]),
    ],
)
def test_images_are_cropped_as_convnext_s_processor_does(
    edge: int,
    crop_pct: float,
    expected: list[tuple[object, int]],
    resnet_folder: Path,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(resnet_folder, tmp_path / "copy")
    values = json.loads((folder / "preprocessor_config.json").read_text())
    values |= {"size": {"shortest_edge": edge}, "crop_pct": crop_pct}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    described = describe(folder)
    config = described.spec.processors["image"]
    assert isinstance(config, ImageConfig)
    got: list[tuple[object, int]] = []
    for step in config.steps:
        if isinstance(step, Resize):
            got.append((step.mode, step.height))
        elif isinstance(step, Crop):
            got.append((step.height, step.width))
    assert got == expected
    described.freeze(tmp_path / "out")  # compared with transformers' own processor


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("config.json", {"depths": [1]}, "config.json: transformers rejects it .out_features"),
        (
            "config.json",
            {"depths": [1], "out_features": ["stage1"], "out_indices": [1]},
            "hidden_sizes: .*expected one for each of the 1 stages",
        ),
        ("config.json", {"depths": [1, 1 << 40]}, "depths: .*expected integers from 1 to 1024"),
        ("config.json", {"depths": [1, 3]}, "the checkpoint lacks"),
        ("config.json", {"hidden_sizes": [32, 65]}, "the weights do not fit config.json"),
        ("config.json", {"embedding_size": 0}, "embedding_size: got 0"),
        ("config.json", {"num_channels": 1}, "num_channels: got 1, expected 3"),
        ("config.json", {"id2label": {}}, "id2label: .*classes that classifier.1.weight has"),
        (
            "preprocessor_config.json",
            {"crop_pct": 1e-9},
            "crop_pct: got 1e-09, expected a number above",
        ),
        ("preprocessor_config.json", {"crop_pct": "x"}, "crop_pct: got 'x'"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    file: str, changes: dict[str, object], expected: str, resnet_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(resnet_folder, tmp_path / "copy")
    values = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(values))
    with pytest.raises(SourceError, match=expected):
        describe(folder)
