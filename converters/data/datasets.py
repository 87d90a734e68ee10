"""Pictures with captions and labels, as calibration and evaluation take them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedge.errors import CalibrationError
from mmedge.files import sha256_file
from mmedge.files.json_file import parse_json

__all__ = ["CAPTIONS_NAME", "Dataset", "Sample", "read_dataset"]

CAPTIONS_NAME = "captions.jsonl"
_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".jfif", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_MOST_NAMED = 3
_FIELDS = frozenset({"image", "caption", "label"})


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture, what it shows in words, and its class; None where that is not known."""

    image: Path
    caption: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Dataset:
    """Samples in a fixed order.

    Attributes:
        name: The folder's or file's name, no path of this machine.
        samples: At least one.
    """

    name: str
    samples: tuple[Sample, ...]

    @property
    def captions(self) -> tuple[str, ...]:
        """The captions that there are, each once, in their order."""
        return tuple(dict.fromkeys(s.caption for s in self.samples if s.caption is not None))

    def sha256(self) -> str:
        """Return one hash over every picture's content, caption and label, in their order."""
        digest = hashlib.sha256()
        for sample in self.samples:
            entry = [sha256_file(sample.image), sample.caption, sample.label]
            digest.update(json.dumps(entry).encode())
        return digest.hexdigest()


def read_dataset(path: Path) -> Dataset:
    """Read a folder of pictures, a folder with a `captions.jsonl`, or a .jsonl file.

    A line of the file is an object with `image` (path relative to the file) and, optionally,
    `caption` and `label`. Without one, every image file below the folder is taken, sorted by path.
    Pictures are not opened here.

    Raises:
        CalibrationError: If there is nothing at `path`, no picture, or a line cannot be used.
    """
    if not path.exists():
        raise CalibrationError(
            f"No such folder or file: {path}. Pass a folder of pictures, or a .jsonl file."
        )
    if path.is_file():
        if path.suffix != ".jsonl":
            raise CalibrationError(f"{path}: expected a folder of pictures, or a .jsonl file.")
        samples = tuple(_read_lines(path))
    elif (path / CAPTIONS_NAME).is_file():
        samples = tuple(_read_lines(path / CAPTIONS_NAME))
    else:
        samples = tuple(
            Sample(file)
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in _SUFFIXES and file.is_file()
        )
    if not samples:
        raise CalibrationError(
            f"{path} holds no pictures{_what_else(path)}; expected "
            f"{', '.join(sorted(_SUFFIXES))}. Pass a folder that does."
        )
    return Dataset(path.resolve().name, samples)


def _what_else(path: Path) -> str:
    """Say what lies where pictures were expected: texts, sound, or nothing."""
    files = path.rglob("*") if path.is_dir() else ()
    suffixes = Counter(file.suffix.lower() or "no suffix" for file in files if file.is_file())
    told = [f"{count} of {suffix}" for suffix, count in suffixes.most_common(_MOST_NAMED)]
    return f" but {sum(suffixes.values())} other files ({', '.join(told)})" if told else ""


def _read_lines(path: Path) -> Iterator[Sample]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8: {error}. Save it as UTF-8.") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _sample(path, f"{path}, line {number}", line)


def _sample(path: Path, place: str, line: str) -> Sample:
    entry = parse_json(line.encode(), place, error=CalibrationError)
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        got = f"fields {', '.join(sorted(entry)) or 'none'}" if isinstance(entry, dict) else line
        raise CalibrationError(
            f"{place}: expected an object whose 'image' is the path of a picture, got {got[:80]}. "
            "A caption stands beside its picture."
        )
    if unknown := sorted(entry.keys() - _FIELDS):
        raise CalibrationError(
            f"{place}: unknown field '{unknown[0]}'; expected {', '.join(sorted(_FIELDS))}."
        )
    return Sample(
        path.parent / entry["image"],
        _text(place, entry, "caption"),
        _text(place, entry, "label"),
    )


def _text(place: str, entry: dict[str, Any], field: str) -> str | None:
    value = entry.get(field)
    if value is not None and not isinstance(value, str):
        raise CalibrationError(f"{place}: '{field}' is {type(value).__name__}, expected a string.")
    return value
