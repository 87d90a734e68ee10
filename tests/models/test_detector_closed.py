"""A detector of fixed classes against transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detections import same_boxes
from PIL import Image
from transformers import RTDetrForObjectDetection, RTDetrImageProcessorPil

from mmedge.bundle import open_bundle
from mmedge.converters.methods.configs import StaticInt8
from mmedge.converters.quantization.quantize import quantize
from mmedge.errors import InputError
from mmedge.models import Detector, verify_bundle
from mmedge.models.running import Given, Settings, chosen_run
from mmedge.postprocess.scores import sigmoid
from mmedge.preprocess.registry import open_processor
from mmedge.runtimes import backend
from mmedge.runtimes.backends import open_session
from mmedge.specs import Array

LABELS = ("red circle", "green square", "blue star", "crane", "crane")
BACKENDS = [
    name for name in ("onnxruntime", "openvino") if backend(name).engine_version() is not None
]


def image_of(height: int, width: int) -> Array:
    rng = np.random.default_rng([height, width])
    small = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


IMAGES = [image_of(60, 90), image_of(75, 31), image_of(64, 64)]


@pytest.fixture
def detector(rt_detr_bundle: Path) -> Iterator[Detector]:
    with Detector.load(rt_detr_bundle, precision="fp32") as model:
        yield model


@pytest.mark.parametrize("engine", BACKENDS)
def test_boxes_and_scores_are_those_of_transformers(
    engine: str, rt_detr_folder: Path, rt_detr_bundle: Path
) -> None:
    model = RTDetrForObjectDetection.from_pretrained(rt_detr_folder).eval()
    processor = RTDetrImageProcessorPil.from_pretrained(rt_detr_folder)
    with torch.inference_mode():
        outputs = model(**processor(IMAGES, return_tensors="pt"))
    expected = processor.post_process_object_detection(
        outputs, threshold=0.3, target_sizes=[image.shape[:2] for image in IMAGES]
    )
    with Detector.load(rt_detr_bundle, precision="fp32", backend=engine) as detector:
        found = detector.detect(IMAGES, threshold=0.3)
    for image, got, wanted in zip(IMAGES, found, expected, strict=True):
        height, width = image.shape[:2]
        boxes = wanted["boxes"].numpy().clip(0, [width, height, width, height])
        same_boxes(got, (boxes, wanted["scores"].numpy(), wanted["labels"].numpy()))
        assert got.labels.tolist() == [LABELS[each] for each in got.class_id]
        assert len(got) > 5


def test_some_of_the_classes_can_be_asked_for(detector: Detector) -> None:
    assert detector.labels == LABELS
    part = detector.detect(IMAGES[0], ["blue star", "red circle"], threshold=0.0)
    feed = detector.image_processor([IMAGES[0]])
    logits = detector.sessions["image_encoder"].run(feed)["logits"][0][:, [2, 0]]
    best = np.sort(sigmoid(logits).ravel())[::-1][: len(logits)]
    np.testing.assert_allclose(part.scores, best, atol=1e-6)
    assert [("blue star", "red circle")[each] for each in part.class_id] == part.labels.tolist()


def test_what_it_does_not_know_is_refused(detector: Detector) -> None:
    with pytest.raises(InputError, match=r"'red circl' is not one of the 5.*Did you mean red circ"):
        detector.detect(IMAGES[0], ["red circl"])
    with pytest.raises(InputError, match="like: this model detects fixed classes"):
        detector.detect(IMAGES[0], like=IMAGES[1])


def test_int8_runs_and_the_bundle_is_verified(rt_detr_bundle: Path) -> None:
    with Detector.load(rt_detr_bundle, precision="int8") as detector:
        assert len(detector.detect(IMAGES[0], threshold=0.0)) > 5
    bundle = open_bundle(rt_detr_bundle)
    assert all(result.passed for result in verify_bundle(bundle))
    quality = bundle.variant("image_encoder", "int8-dynamic").quality
    assert quality is not None
    assert quality.figures["box_agreement"].value > 0.5
    assert {"map", "map_50"} == set(quality.drops) < set(quality.figures)
    assert quality.data == "annotations.json: 12 samples"
    # Queries may stand in another order on another processor: their summary is verified.
    assert set(bundle.golden().outputs["image_encoder"]["fp32"]) == {"summary"}


def test_static_int8_reaches_the_convolutions(rt_detr_bundle: Path, tmp_path: Path) -> None:
    """Of the backbone, whose norms are frozen, and of the encoder, gated by SiLU."""
    bundle = open_bundle(rt_detr_bundle)
    models = bundle.variant("image_encoder", "fp32").models
    processor = open_processor(bundle.manifest.processors["image"], rt_detr_bundle)
    feeds = [processor([image_of(64, 40 + width)]) for width in range(0, 48, 6)]
    for form, layout in (("operators", "onnxruntime"), ("qdq", "portable")):
        source, made = bundle.file(models[layout]), tmp_path / f"{form}.onnx"  # type: ignore[index]
        config = StaticInt8(form=form)  # type: ignore[arg-type]
        entries = quantize(source, made, config, calibration=lambda: feeds)
        kinds = Counter((entry.op_type, entry.precision) for entry in entries)
        assert kinds["Conv", "int8"] == 53
        assert not kinds["Conv", "float32"]
        with open_session(source) as fp32, open_session(made) as int8:
            expected, got = (
                session.run(processor([IMAGES[0]]))["summary"].ravel() for session in (fp32, int8)
            )
        assert got @ expected > 0.97 * np.linalg.norm(got) * np.linalg.norm(expected)


def test_the_profile_and_a_run_need_an_image_alone(detector: Detector, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(IMAGES[0]).save(path)
    stages = detector.stages("image_encoder", path.read_bytes())
    assert stages is not None
    assert tuple(stages.parts) == ("decode", "preprocess", "inference", "boxes")
    for call in (stages.whole, *stages.parts.values()):
        assert call() is not None
    given = Given(images=[path])
    assert chosen_run(detector.runs, given) == "detect"
    assert detector.runs["detect"].call(given, Settings(threshold=0.3)).rows
