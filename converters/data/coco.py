"""Reading of COCO files: images, and the boxes of objects in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedge.errors import CalibrationError
from mmedge.files.json_file import read_json

__all__ = ["COCO_NAMES", "Objects", "read_coco"]

COCO_NAMES = ("annotations.json", "_annotations.coco.json")
"""Names of a COCO file that a folder of images may hold."""

_MAX_BYTES = 512 << 20
_SECTIONS = ("images", "annotations", "categories")


@dataclass(frozen=True, slots=True)
class Objects:
    """The true boxes of one image.

    Attributes:
        size: Width and height of the image.
        boxes: Left, top, right and bottom of each in pixels, inside of the image.
        labels: Of each box.
        crowd: Whether each is a group, in which any number of detections is right.
    """

    size: tuple[int, int]
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    labels: tuple[str, ...] = ()
    crowd: tuple[bool, ...] = ()


def read_coco(path: Path) -> tuple[dict[Path, Objects], tuple[str, ...]]:
    """Read a COCO file; boxes are clipped to their image, and those without area left out.

    Images lie in the folder of the file, in its folder `images`, or beside that folder under the
    last word of the file's name: annotations/instances_val2017.json and val2017/.

    Returns:
        The objects of each image, in the order of the file, and the names of the categories.

    Raises:
        CalibrationError: If the file is no COCO file, or an entry contradicts another.
    """
    document = read_json(path, max_bytes=_MAX_BYTES, error=CalibrationError)
    if not isinstance(document, dict) or not all(
        isinstance(document.get(name), list) for name in _SECTIONS
    ):
        raise CalibrationError(
            f"{path}: not a COCO file, which is an object of the lists {', '.join(_SECTIONS)}."
        )
    categories: dict[int, str] = {}
    for entry in _entries(path, document, "categories"):
        categories[_integer(path, "a category", entry, "id")] = _text(
            path, "a category", entry, "name"
        )
    names: dict[int, str] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for entry in _entries(path, document, "images"):
        number = _integer(path, "an image", entry, "id")
        if number in names:
            raise CalibrationError(f"{path}: two images have the id {number}. Correct the file.")
        names[number] = _text(path, "an image", entry, "file_name")
        sizes[number] = (
            _integer(path, "an image", entry, "width", 1),
            _integer(path, "an image", entry, "height", 1),
        )
    found: dict[int, list[tuple[tuple[float, float, float, float], str, bool]]] = {}
    for entry in _entries(path, document, "annotations"):
        number = _integer(path, "an annotation", entry, "image_id")
        category = _integer(path, "an annotation", entry, "category_id")
        if number not in names or category not in categories:
            raise CalibrationError(
                f"{path}: an annotation is of image {number} and category {category}, which the "
                "file does not list. Correct it."
            )
        box = _clipped(_box(path, entry), sizes[number])
        if box[2] > box[0] and box[3] > box[1]:
            crowd = bool(entry.get("iscrowd", 0))
            found.setdefault(number, []).append((box, categories[category], crowd))
    folder = _image_folder(path, next(iter(names.values()), ""))
    objects = {}
    for number, name in names.items():
        columns = tuple(zip(*found.get(number, ()), strict=True)) or ((), (), ())
        objects[folder / name] = Objects(sizes[number], *columns)
    return objects, tuple(dict.fromkeys(categories.values()))


def _entries(path: Path, document: Mapping[str, Any], section: str) -> list[Mapping[str, Any]]:
    for position, entry in enumerate(document[section]):
        if not isinstance(entry, dict):
            raise CalibrationError(
                f"{path}: {section}[{position}] is {type(entry).__name__}, expected an object."
            )
    entries: list[Mapping[str, Any]] = document[section]
    return entries


def _integer(path: Path, what: str, entry: Mapping[str, Any], key: str, least: int = 0) -> int:
    value = entry.get(key)
    if type(value) is not int or value < least:
        raise CalibrationError(
            f"{path}: '{key}' of {what} is {value!r}, expected a whole number from {least} on."
        )
    return value


def _text(path: Path, what: str, entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise CalibrationError(f"{path}: '{key}' of {what} is {value!r}, expected a text.")
    return value


def _box(path: Path, entry: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Return the corners of an annotation's bbox."""
    box = entry.get("bbox")
    numbers = isinstance(box, list) and len(box) == 4
    if not numbers or not all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
        for v in box  # type: ignore[union-attr]
    ):
        raise CalibrationError(
            f"{path}: bbox of an annotation is {box!r}, expected [left, top, width, height]."
        )
    left, top, width, height = map(float, box)  # type: ignore[arg-type]
    if width < 0 or height < 0:
        raise CalibrationError(f"{path}: bbox {box} of an annotation has a negative side.")
    return left, top, left + width, top + height


def _clipped(
    box: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[float, float, float, float]:
    left, top, right, bottom = box
    width, height = size
    return (
        min(max(left, 0.0), width),
        min(max(top, 0.0), height),
        min(max(right, 0.0), width),
        min(max(bottom, 0.0), height),
    )


def _image_folder(path: Path, name: str) -> Path:
    places = (path.parent, path.parent / "images", path.parent.parent / path.stem.split("_")[-1])
    return next((place for place in places if (place / name).is_file()), path.parent)
