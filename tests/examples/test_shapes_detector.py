"""The committed detector: it loads offline, reaches its figures, and bad int8 is caught."""

from __future__ import annotations

import json
from pathlib import Path

import draw_detections
import encoder_rows
import numpy as np
import pytest
import torch
from dataset import model_pixels
from detector_rows import BAD, DETECTOR, GOAL, REMEDY, detection_figures
from drawing import render
from encoder_rows import (
    LARGEST_LOSS,
    calibration_scenes,
    caught,
    convert_source,
    write_outliers,
)
from evaluate_encoders import main
from PIL import Image
from safetensors.torch import load_file
from small_detector import to_pixels
from transformers import CLIPTokenizerFast, OwlViTForObjectDetection, OwlViTImageProcessorPil
from world import scenes

from mmedge.converters.report import ConversionReport

SCENES = 48


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_outliers(DETECTOR, tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def report(outliers: Path, tmp_path_factory: pytest.TempPathFactory) -> ConversionReport:
    """The detector with outliers, in fp32, and its image encoder in int8."""
    work = tmp_path_factory.mktemp("bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_rows, "CALIBRATION", 48)
        patch.setattr(encoder_rows, "JUDGED", 32)
        data = calibration_scenes(work, "annotations.json")
    precisions = [f"image_encoder:{name}" for name in ("fp32", BAD, REMEDY)]
    return convert_source(outliers, work, precisions, data)


def test_the_folder_is_complete_and_small() -> None:
    names = {path.name for path in DETECTOR.iterdir()}
    wanted = {"config.json", "model.safetensors", "preprocessor_config.json", "metrics.json"}
    assert names == wanted | {"tokenizer.json", "tokenizer_config.json"}
    assert sum(path.stat().st_size for path in DETECTOR.iterdir()) < 8e6
    weights = load_file(DETECTOR / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_training_sees_the_pixels_that_the_processor_makes() -> None:
    image = render(scenes("test", 1)[0], 224)
    made = OwlViTImageProcessorPil.from_pretrained(DETECTOR)(image, return_tensors="np")
    ours = to_pixels(model_pixels(image)[None]).numpy()
    assert np.abs(made["pixel_values"] - ours).max() < 1e-5


def test_the_copy_with_outliers_computes_the_same(outliers: Path) -> None:
    tokens = CLIPTokenizerFast.from_pretrained(DETECTOR)(
        ["a red star", "an orange heart"], padding=True, return_tensors="pt"
    )
    pixels = to_pixels(np.stack([model_pixels(render(scenes("test", 1)[0], 224))]))
    outputs = []
    for folder in (DETECTOR, outliers):
        model = OwlViTForObjectDetection.from_pretrained(folder).eval()
        with torch.no_grad():
            outputs.append(model(pixel_values=pixels, **tokens))
    assert torch.allclose(outputs[0].logits, outputs[1].logits, atol=1e-3)
    assert torch.allclose(outputs[0].pred_boxes, outputs[1].pred_boxes, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_bad_int8_is_caught_and_a_remedy_holds(report: ConversionReport) -> None:
    unseen = scenes("test", SCENES, seed=3)
    fp32, bad, remedy = (
        detection_figures(report.path, {"image_encoder": each}, unseen)
        for each in ("fp32", BAD, REMEDY)
    )
    assert fp32["map"] >= GOAL
    assert fp32["map_held_out_wording"] >= GOAL
    assert bad["map"] < fp32["map"] - 0.1
    assert caught(report, BAD)
    assert not caught(report, REMEDY)
    # Of so few scenes a figure moves more than the goal allows.
    assert remedy["map"] >= fp32["map"] - 2 * LARGEST_LOSS


@pytest.mark.filterwarnings("ignore")
def test_what_is_found_is_drawn(report: ConversionReport, tmp_path: Path) -> None:
    out = tmp_path / "found.png"
    arguments = [str(report.path), "--out", str(out), "--count", "2", "--precision", "fp32"]
    draw_detections.main([*arguments, "--threshold", "1"])
    plain = np.asarray(Image.open(out), np.int16)
    draw_detections.main(arguments)
    drawn = np.asarray(Image.open(out), np.int16)
    assert drawn.shape == plain.shape
    changed = np.abs(drawn - plain).max(axis=2) > 20
    assert 0.01 < changed.mean() < 0.2


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
def test_full_figures_are_the_stated_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--models", "detector", "--seed", "0", "--count", "500", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    stated = json.loads((DETECTOR / "metrics.json").read_text())["rows"]
    assert {row["passed"] for row in rows if row["goal"] is not None} == {True}
    for row, other in zip(rows, stated, strict=True):
        assert (row["model"], row["figure"]) == (other["model"], other["figure"])
        assert row["fp32"] == pytest.approx(other["fp32"], abs=0.005)
