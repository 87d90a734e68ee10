"""COCO files: what is read of them, where images lie, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from converted import SCENE_LABELS, write_scenes

from mmedge.converters.data.coco import Objects, read_coco
from mmedge.converters.data.datasets import read_dataset
from mmedge.errors import CalibrationError
from mmedge.specs import Modality


def document() -> dict[str, Any]:
    return {
        "info": {"about": "what is not needed is not read"},
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "b.png", "width": 20, "height": 20},
        ],
        "annotations": [
            {"image_id": 7, "category_id": 2, "bbox": [1, 2, 10.5, 4]},
            {"image_id": 7, "category_id": 1, "bbox": [30, 20, 50, 50], "iscrowd": 1},
            {"image_id": 7, "category_id": 1, "bbox": [41, 2, 10, 4]},
        ],
        "categories": [{"id": 2, "name": "cup"}, {"id": 1, "name": "dog"}],
    }


def written(folder: Path, content: object) -> Path:
    path = folder / "coco.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_boxes_are_corners_inside_of_their_image(tmp_path: Path) -> None:
    objects, categories = read_coco(written(tmp_path, document()))
    assert categories == ("cup", "dog")
    assert objects == {
        tmp_path / "a.png": Objects(
            (40, 30),
            ((1.0, 2.0, 11.5, 6.0), (30.0, 20.0, 40.0, 30.0)),  # clipped; one lies outside
            ("cup", "dog"),
            (False, True),
        ),
        tmp_path / "b.png": Objects((20, 20)),
    }


@pytest.mark.parametrize("place", [".", "images", "../val2017"])
def test_images_are_found_where_coco_has_them(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "annotations"
    images = folder / place
    images.mkdir(parents=True)
    (images / "a.png").write_bytes(b"")
    path = folder / "instances_val2017.json"
    path.write_text(json.dumps(document()), encoding="utf-8")
    objects, _ = read_coco(path)
    assert {each.resolve() for each in objects} == {
        (images / name).resolve() for name in ("a.png", "b.png")
    }


def test_a_folder_may_hold_one(tmp_path: Path) -> None:
    path = write_scenes(tmp_path / "scenes", 5, 1)
    data, whole = read_dataset(path), read_dataset(path.parent)
    assert data.samples == whole.samples
    assert (data.name, whole.name) == ("annotations.json", "scenes")
    assert data.categories == data.items(Modality.TEXT) == SCENE_LABELS
    assert all(sample.objects is not None and sample.objects.boxes for sample in data.samples)
    moved = json.loads(path.read_text(encoding="utf-8"))
    moved["annotations"][0]["bbox"][0] += 1
    path.write_text(json.dumps(moved), encoding="utf-8")
    assert read_dataset(path).sha256() != data.sha256()


def change(section: str, key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[section][0].update({key: value})


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (lambda c: c.pop("categories"), "not a COCO file"),
        (lambda c: c.update(images=[3]), r"images\[0\] is int, expected an object"),
        (lambda c: c.update(images=[], annotations=[]), "lists no images"),
        (change("images", "id", 3), "two images have the id 3"),
        (change("images", "width", 0), "'width' of an image is 0"),
        (change("images", "file_name", None), "'file_name' of an image is None"),
        (change("categories", "name", " "), "'name' of a category is ' '"),
        (change("annotations", "image_id", 4), "of image 4 and category 2"),
        (change("annotations", "category_id", True), "'category_id' of an annotation is True"),
        (change("annotations", "bbox", [1, 2, 3]), "expected .left, top, width, height."),
        (change("annotations", "bbox", [1, 2, "3", 4]), "expected .left, top, width, height."),
        (change("annotations", "bbox", [1, 2, -3, 4]), "has a negative side"),
        (change("annotations", "bbox", [1, 2, 1e400, 4]), "Infinity|expected .left|finite"),
    ],
)
def test_other_json_is_no_coco_file(
    changed: Callable[[dict[str, Any]], None], reason: str, tmp_path: Path
) -> None:
    content = document()
    changed(content)
    with pytest.raises(CalibrationError, match=reason):
        read_dataset(written(tmp_path, content))
