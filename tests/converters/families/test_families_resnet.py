"""ResNet: convolutions, batch norms folded, and ConvNeXt's preprocessing."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from describing import describe
from families.image_models import check_agrees_with_transformers, check_is_judged_by_its_classes
from models.tiny_models import RESNET_SIDE
from transformers import (
    ConvNextImageProcessorPil,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

from mmedge import Encoder
from mmedge.bundle import open_bundle
from mmedge.bundle.nodes import load_nodes
from mmedge.converters import ConvertConfig, convert
from mmedge.converters.graphs.export import export_role
from mmedge.converters.methods.configs import StaticInt8
from mmedge.converters.quantization.quantize import quantize
from mmedge.converters.quiet import quiet_libraries
from mmedge.errors import QuantizationError, SourceError
from mmedge.preprocess.config import ImageConfig
from mmedge.preprocess.steps import Crop, Resize
from mmedge.runtimes.backends import open_session


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


def test_int8_reaches_the_convolutions(resnet_bundle: Path) -> None:
    bundle = open_bundle(resnet_bundle)
    variant = bundle.variant("image_encoder", "int8-static")
    table = load_nodes(bundle.file(str(variant.nodes)))
    kinds = Counter((node.op_type, node.precision) for node in table.nodes)
    assert kinds == {("Conv", "int8"): 12, ("Gemm", "int8"): 1}
    assert set(variant.models) == {"onnxruntime", "portable"}


def test_int8_of_an_encoder_without_a_head_is_static_alone(
    resnet_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    ResNetModel.from_pretrained(resnet_folder).save_pretrained(source)
    shutil.copy(resnet_folder / "preprocessor_config.json", source)
    named = ConvertConfig(str(source), tmp_path / "a.mmedge", precisions=("fp32", "int8"))
    with pytest.raises(QuantizationError, match="int8-static alone"):
        convert(named)
    report = convert(replace(named, calibration=photo_folder))
    assert [variant.variant for variant in report.variants] == ["fp32", "int8-static"]
    assert any("no int8-dynamic" in note for note in report.notes)


@pytest.mark.slow
def test_int8_of_a_real_size_resnet_agrees_with_fp32(tmp_path: Path) -> None:
    """Weights are random, batch norms settled on images: it shows the arithmetic, no accuracy."""
    torch.manual_seed(0)
    model = ResNetModel(ResNetConfig()).train()
    rng = np.random.default_rng(0)

    def images(count: int) -> list[dict[str, np.ndarray]]:
        coarse = rng.standard_normal((count, 1, 3, 7, 7)).astype(np.float32)
        smooth = coarse.repeat(32, axis=3).repeat(32, axis=4)
        noise = rng.standard_normal(smooth.shape).astype(np.float32)
        return [{"pixel_values": image} for image in smooth + 0.3 * noise]

    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.momentum = None  # the mean over all batches
        model(torch.from_numpy(np.concatenate([x["pixel_values"] for x in images(16)])))
    model.eval().save_pretrained(tmp_path)
    processor = {"size": {"shortest_edge": 224}, "crop_pct": 0.875}
    ConvNextImageProcessorPil(**processor).save_pretrained(tmp_path)
    spec = describe(tmp_path).spec.roles["image_encoder"]()
    fp32 = tmp_path / "fp32.onnx"
    with quiet_libraries():
        export_role("image_encoder", spec, fp32)
    calibration, held_out = images(16), images(8)

    def run(path: Path) -> np.ndarray:
        with open_session(path) as session:
            return np.concatenate([session.run(feed)["embedding"] for feed in held_out])

    expected = run(fp32)
    for form in ("operators", "qdq"):
        config = StaticInt8(form=form)  # type: ignore[arg-type]
        entries = quantize(fp32, tmp_path / f"{form}.onnx", config, calibration=lambda: calibration)
        assert Counter(entry.precision for entry in entries) == {"int8": 53}
        got = run(tmp_path / f"{form}.onnx")
        assert (got * expected).sum(axis=1).min() > 0.97
        # Each embedding is nearest to its own image's.
        assert ((got @ expected.T).argmax(axis=1) == np.arange(len(held_out))).all()


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
