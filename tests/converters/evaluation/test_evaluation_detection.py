"""What is measured of a detector: boxes like fp32's, and true ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from converted import SCENE_LABELS, write_scenes

from mmedge.bundle.kinds import DetectorKind
from mmedge.converters.data.datasets import Dataset, Sample, read_dataset
from mmedge.converters.evaluation.average_precision import Boxes
from mmedge.converters.evaluation.base import Subject
from mmedge.converters.evaluation.detection import Detection, found_share
from mmedge.converters.families.base import RoleSpec
from mmedge.errors import CalibrationError
from mmedge.preprocess import ImageConfig, ImageProcessor
from mmedge.preprocess.config import VectorConfig
from mmedge.preprocess.steps import Decode, Pad, Resize
from mmedge.specs import Array, Modality

BOXES = np.array([[0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.0, 0.6, 0.2, 0.9]])
SCORES = np.array([0.6, 0.3, 0.1])
CLASSES = np.array([0, 1, 0])


def share(boxes: Array, classes: Array) -> tuple[float, float]:
    return found_share(Boxes(BOXES, CLASSES, SCORES), Boxes(boxes, classes, np.ones(len(boxes))))


def test_the_same_boxes_agree_in_any_order() -> None:
    order = [2, 0, 1]
    assert share(BOXES[order], CLASSES[order]) == (pytest.approx(1), pytest.approx(1))


def test_missing_items_count_by_their_score() -> None:
    assert share(BOXES[1:], CLASSES[1:]) == (pytest.approx(0.4), pytest.approx(0.4))
    assert share(BOXES, np.array([1, 1, 0])) == (pytest.approx(0.4), pytest.approx(0.4))
    moved = BOXES.copy()
    moved[1, 2:] += 0.1  # an IoU of 0.16 / 0.25
    assert share(moved, CLASSES) == (pytest.approx(1), pytest.approx(0.7 + 0.3 * 0.64))
    moved[1] += 0.3
    assert share(moved, CLASSES) == (pytest.approx(0.7), pytest.approx(0.7))


def test_a_box_is_taken_once_and_among_the_best_alone() -> None:
    twice = np.array([BOXES[0], BOXES[0]])
    found = found_share(
        Boxes(twice, np.zeros(2), SCORES[:2]), Boxes(BOXES[:1], np.zeros(1), np.ones(1))
    )
    assert found == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    many = np.concatenate([np.tile([[0.8, 0.0, 0.9, 0.1]], (20, 1)), BOXES])
    assert share(many, np.zeros(23)) == (0, 0)
    assert share(np.zeros((0, 4)), np.zeros(0)) == (0, 0)


CLOSED = ("green square", "a class of the model alone", "blue star", "red circle")


def processor(*, square: bool) -> ImageProcessor:
    resize = Resize(mode="exact", height=8, width=8, resample="gaussian")
    return ImageProcessor(ImageConfig(steps=(Decode(), *(Pad(),) * square, resize)))


def evaluation(data: Dataset | None, *, labels: tuple[str, ...], square: bool) -> Detection:
    texts = None if labels else "text_encoder"
    kind = DetectorKind(labels=labels, text_encoder=texts, threshold=0.1)
    processors = {"image": processor(square=square)}
    if not labels:
        vector = VectorConfig(input="unused", size=1, mean=(0.0,), std=(1.0,))
        processors["text"] = cast(Any, SimpleNamespace(modality=Modality.TEXT, config=vector))
    model = cast(Any, SimpleNamespace(kind=kind))
    return Detection(Subject(model, processors, Path(), data, "a photo of a {}", 0))


def right(data: Dataset, labels: tuple[str, ...], *, square: bool) -> Iterator[dict[str, Array]]:
    """Outputs of a closed detector that finds every box, with one wrong box beside them."""
    for sample in data.samples:
        objects = sample.objects
        assert objects is not None
        sides = np.array(objects.size)
        seen = np.array([sides.max()] * 2) if square else sides
        corners = np.array([*objects.boxes, (0, 0, 5, 5)], float).reshape(-1, 2, 2) / seen
        boxes = np.concatenate([corners.mean(axis=1), corners[:, 1] - corners[:, 0]], axis=1)
        logits = np.full((5, len(labels)), -9.0)
        for row, label in enumerate(objects.labels):
            logits[row, labels.index(label)] = 3.0
        logits[len(objects.labels), 0] = -1.0
        padded = np.concatenate([boxes, np.full((5 - len(boxes), 4), 0.5)])
        yield {"logits": logits[None], "boxes": padded[None]}


SPEC = cast(RoleSpec, SimpleNamespace(outputs=[SimpleNamespace(name="boxes")]))


@pytest.mark.parametrize("square", [False, True])
def test_right_boxes_have_a_precision_of_1(square: bool, tmp_path: Path) -> None:
    data = read_dataset(write_scenes(tmp_path, 10, 3))
    judge = evaluation(data, labels=CLOSED, square=square)
    assert judge.default_metric() == "map"
    outputs = list(right(data, CLOSED, square=square))
    feeds = [{"at": np.array(at)} for at in range(len(outputs))]

    def run(feed: Mapping[str, Array]) -> Mapping[str, Array]:
        return outputs[int(feed["at"])]

    def shifted(feed: Mapping[str, Array]) -> Mapping[str, Array]:
        return {**run(feed), "boxes": run(feed)["boxes"] + [0.02, 0, 0, 0]}

    advanced: list[None] = []
    fp32, other = (
        judge.collect(SPEC, each, feeds, lambda: advanced.append(None), {})
        for each in (run, shifted)
    )
    assert len(advanced) == 20
    quality = judge.quality("image_encoder", SPEC, {"image_encoder": fp32}, fp32)
    assert quality.figures["map"].value == pytest.approx(1)
    assert quality.drops["map"].value == 0
    assert quality.figures["box_agreement"].value == pytest.approx(1)
    assert (quality.samples, quality.data) == (10, "annotations.json: 10 samples")
    quality = judge.quality("image_encoder", SPEC, {"image_encoder": fp32}, other)
    assert 0 < quality.drops["map"].value < 0.6
    assert quality.figures["map_50"].value == pytest.approx(1)
    assert quality.figures["box_overlap"].value < 1
    together = judge.together({"image_encoder": fp32}, {"image_encoder": other})
    assert together["map"].value == quality.drops["map"].value


def test_an_open_detector_looks_for_the_categories(tmp_path: Path) -> None:
    data = read_dataset(write_scenes(tmp_path, 4, 3))
    judge = evaluation(data, labels=(), square=False)
    assert judge.samples.items["text"] == [f"a photo of a {label}" for label in SCENE_LABELS]
    assert judge.available() == ("map", "map-50", "box-agreement", "box-overlap")


def test_precision_needs_true_boxes_of_known_classes(tmp_path: Path) -> None:
    data = read_dataset(write_scenes(tmp_path, 4, 3))
    unknown = evaluation(data, labels=("red circle", "dog"), square=False)
    assert unknown.default_metric() == "box-agreement"
    with pytest.raises(
        CalibrationError, match=r"it needs true boxes .a COCO file., of the model's"
    ):
        unknown.check_metric("map")
    bare = Dataset("bare", tuple(Sample(image=each.image) for each in data.samples))
    assert evaluation(bare, labels=CLOSED, square=False).available() == (
        "box-agreement",
        "box-overlap",
    )
