"""Detections of a bundle against transformers, from an image to boxes in its pixels."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detections import same_boxes
from PIL import Image
from transformers import AutoTokenizer, Owlv2ForObjectDetection, OwlViTForObjectDetection
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil

import mmedge
from mmedge.bundle import open_bundle
from mmedge.errors import ImageError, InputError, TextError
from mmedge.models import Detector, verify_bundle
from mmedge.models.running import Given, Settings, chosen_run
from mmedge.postprocess.boxes import iou
from mmedge.runtimes import backend
from mmedge.specs import Array

LABELS = ["a red mug", "cat", "ß 東京 and a much longer text than others"]
OWLS: Mapping[str, tuple[Any, Any]] = {
    "owlvit": (OwlViTForObjectDetection, OwlViTImageProcessorPil),
    "owlv2": (Owlv2ForObjectDetection, Owlv2ImageProcessorPil),
}
BACKENDS = [
    name for name in ("onnxruntime", "openvino") if backend(name).engine_version() is not None
]


def image_of(height: int, width: int) -> Array:
    rng = np.random.default_rng([height, width])
    small = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


IMAGES = [image_of(60, 90), image_of(75, 31)]


@pytest.fixture(params=OWLS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(name: str, request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(f"{name}_folder")
    return found


@pytest.fixture
def bundle(name: str, request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(f"{name}_bundle")
    return found


@pytest.fixture
def detector(bundle: Path) -> Iterator[Detector]:
    with Detector.load(bundle, precision="fp32") as model:
        yield model


def expected_of(
    name: str, folder: Path, outputs: Any, image: Array, threshold: float
) -> tuple[Array, Array, Array]:
    """Boxes, scores and classes of one image as transformers gives them; clipped, best first."""
    height, width = image.shape[:2]
    processor = OWLS[name][1].from_pretrained(folder)
    (found,) = processor.post_process_object_detection(
        outputs, threshold=threshold, target_sizes=[(height, width)]
    )
    boxes = found["boxes"].numpy().clip(0, [width, height, width, height])
    inside = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    boxes, scores, classes = (
        array[inside] for array in (boxes, found["scores"].numpy(), found["labels"].numpy())
    )
    order = np.argsort(-scores, kind="stable")
    return boxes[order], scores[order], classes[order]


@pytest.mark.parametrize("engine", BACKENDS)
def test_boxes_and_scores_are_those_of_transformers(
    engine: str, name: str, folder: Path, bundle: Path
) -> None:
    model = OWLS[name][0].from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer(LABELS, padding="max_length", truncation=True, return_tensors="pt")
    with Detector.load(bundle, precision="fp32", backend=engine) as detector:
        together = detector.detect(IMAGES, LABELS, threshold=0.2)
        for image, found in zip(IMAGES, together, strict=True):
            pixels = OWLS[name][1].from_pretrained(folder)(image, return_tensors="pt")
            with torch.inference_mode():
                outputs = model(**given, **pixels)
            expected = expected_of(name, folder, outputs, image, 0.2)
            same_boxes(found, expected)
            same_boxes(detector.detect(image, LABELS, threshold=0.2), expected)
            assert len(found) > 5
            assert found.labels.tolist() == [LABELS[i] for i in found.class_id]
    assert len({label for found in together for label in found.labels}) > 1


def test_an_image_is_the_query_that_transformers_makes_of_it(
    name: str, folder: Path, detector: Detector
) -> None:
    model = OWLS[name][0].from_pretrained(folder).eval()
    processor = OWLS[name][1].from_pretrained(folder)
    image, example = IMAGES
    with torch.inference_mode():
        outputs = model.image_guided_detection(
            pixel_values=processor(image, return_tensors="pt")["pixel_values"],
            query_pixel_values=processor(example, return_tensors="pt")["pixel_values"],
        )
    outputs.pred_boxes = outputs.target_pred_boxes
    same_boxes(
        detector.detect(image, like=example, threshold=0.1),
        expected_of(name, folder, outputs, image, 0.1),
    )
    several = detector.detect(image, like=[image, example], threshold=0.1)
    assert set(several.labels) <= {"image 0", "image 1"}
    assert len(set(several.labels)) == 2


def test_suppression_leaves_no_overlap_within_a_class(detector: Detector) -> None:
    whole = detector.detect(IMAGES[0], LABELS, threshold=0.0)
    kept = detector.detect(IMAGES[0], LABELS, threshold=0.0, nms=0.1)
    assert 0 < len(kept) < len(whole)
    overlaps = iou(kept.boxes, kept.boxes) - np.eye(len(kept))
    assert overlaps[kept.class_id[:, None] == kept.class_id].max() <= 0.1
    assert (np.diff(kept.scores) <= 0).all()


def test_a_run_gives_a_row_for_each_box(detector: Detector, tmp_path: Path) -> None:
    Image.fromarray(IMAGES[0]).save(tmp_path / "image.png")
    given = Given(images=[tmp_path / "image.png"] * 2, texts=LABELS)
    assert chosen_run(detector.runs, given) == "detect"
    made = detector.runs["detect"].call(given, Settings(threshold=0.2))
    found = detector.detect(IMAGES[0], LABELS, threshold=0.2)
    assert [row["label"] for row in made.rows] == found.labels.tolist() * 2
    np.testing.assert_allclose(made.arrays["boxes"][: len(found)], found.boxes, atol=1e-2)
    assert made.rows[0]["left"] == pytest.approx(float(found.boxes[0, 0]), abs=1e-2)
    assert made.arrays["image"].tolist() == [0] * len(found) + [1] * len(found)


def test_labels_are_encoded_once(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    session = detector.sessions["text_encoder"]
    run = session.run
    monkeypatch.setattr(session, "run", lambda feed: calls.append("text") or run(feed))
    first = detector.detect(IMAGES[0], LABELS)
    assert calls
    made = len(calls)
    again = detector.detect(IMAGES[0], LABELS)
    np.testing.assert_array_equal(first.boxes, again.boxes)
    assert len(calls) == made
    detector.detect(IMAGES[0], ["another"])
    assert len(calls) == made + 1


def test_images_come_from_anywhere_and_in_any_batch(detector: Detector, tmp_path: Path) -> None:
    paths = []
    for number, image in enumerate(IMAGES):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(image).save(paths[-1])
    expected = detector.detect(IMAGES * 2, LABELS)
    assert isinstance(expected, list)
    for batch_size in (1, 3):
        got = detector.detect((path for path in paths * 2), LABELS, batch_size=batch_size)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-2)
    turned = Image.fromarray(np.rot90(IMAGES[0]).copy())  # counter-clockwise
    exif = turned.getexif()
    exif[0x0112] = 6  # upright after a quarter turn clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    same_boxes(
        detector.detect(tmp_path / "turned.png", LABELS),
        (expected[0].boxes, expected[0].scores, expected[0].class_id),
    )


def test_boxes_are_in_pixels_of_a_frame_that_is_decoded_smaller(
    bundle: Path, tmp_path: Path
) -> None:
    """A JPEG of too many pixels is decoded at a fraction of its size."""
    image = Image.fromarray(image_of(403, 801))
    exif = image.getexif()
    exif[0x0112] = 6
    for path, options in ((tmp_path / "flat.jpg", {}), (tmp_path / "tall.jpg", {"exif": exif})):
        image.save(path, quality=95, **options)
        with Detector.load(bundle, precision="fp32") as detector:
            whole = detector.detect(path, LABELS, threshold=0.0)
        with Detector.load(bundle, precision="fp32", max_pixels=100_000) as detector:
            part = detector.detect(path, LABELS, threshold=0.0)
        assert len(whole) == len(part)
        assert abs(np.median(part.boxes[:, 2] / np.maximum(whole.boxes[:, 2], 1)) - 1) < 0.05


def test_int8_runs_and_is_judged_by_its_boxes(bundle: Path) -> None:
    with Detector.load(bundle, precision="int8") as detector:
        found = detector.detect(IMAGES[0], LABELS, threshold=0.0)
        assert len(found) > 5
        assert np.isfinite(found.boxes).all()
    opened = open_bundle(bundle)
    for role in ("text_encoder", "image_encoder"):
        quality = opened.variant(role, "int8-dynamic").quality
        assert quality is not None
        agreement, precision = {"box_agreement", "box_overlap"}, {"map", "map_50"}
        judged = "owlvit" in str(bundle)  # on scenes with true boxes
        assert set(quality.figures) == agreement | (precision if judged else set())
        assert set(quality.drops) == (precision if judged else set())
        assert quality.samples == (12 if judged else 64)
        assert 0.3 < quality.figures["box_agreement"].value <= 1
    assert all(result.passed for result in verify_bundle(opened))


def test_the_profile_has_calls_and_stages(detector: Detector) -> None:
    buffer = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(buffer, "PNG")
    for role, sample in (("image_encoder", buffer.getvalue()), ("text_encoder", "a mug")):
        stages = detector.stages(role, sample)
        assert stages is not None
        assert tuple(stages.parts) == Detector.stage_names(detector.manifest, role)
        for call in (stages.whole, *stages.parts.values()):
            assert call() is not None


@pytest.mark.parametrize("labels", [None, [], [""], ["a", "a"], "cat", ["a"] * 10_001])
def test_labels_that_cannot_be_looked_for(labels: Any, detector: Detector) -> None:
    with pytest.raises(InputError, match=r"labels: got|Labels|Label 0"):
        detector.detect(IMAGES[0], labels)


def test_undetectable_parts_are_named(detector: Detector, tmp_path: Path) -> None:
    many = [str(number) for number in range(10_001)]
    with pytest.raises(InputError, match="got 10001, expected at most 10000"):
        detector.detect(IMAGES[0], many)
    with pytest.raises(InputError, match="got labels and like"):
        detector.detect(IMAGES[0], LABELS, like=IMAGES[1])
    with pytest.raises(InputError, match="like: got no image"):
        detector.detect(IMAGES[0], like=[])
    with pytest.raises(InputError, match="Images: got none"):
        detector.detect([], LABELS)
    with pytest.raises(InputError, match="threshold: got 2"):
        detector.detect(IMAGES[0], LABELS, threshold=2)
    with pytest.raises(InputError, match="nms: got -1"):
        detector.detect(IMAGES[0], LABELS, nms=-1)
    with pytest.raises(ImageError, match=r"images\[1\].*no such file"):
        detector.detect([IMAGES[0], tmp_path / "missing.png"], LABELS)
    with pytest.raises(TextError, match="Unicode"):
        detector.detect(IMAGES[0], ["\ud800"])


def test_a_detector_loads_without_its_text_encoder(bundle: Path) -> None:
    with mmedge.load(bundle, precision="fp32", roles=["image_encoder"]) as detector:
        assert isinstance(detector, Detector)
        assert len(detector.detect(IMAGES[0], like=IMAGES[1], threshold=0.0)) > 5
        with pytest.raises(InputError, match="text_encoder was not loaded"):
            detector.detect(IMAGES[0], LABELS)
