"""Calibration and evaluation data: samples with typed columns, or arrays by a graph's inputs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from mmedge.converters.data.coco import COCO_NAMES, Objects, read_coco
from mmedge.errors import CalibrationError
from mmedge.files import sha256_file
from mmedge.files.json_file import parse_json
from mmedge.files.npz_file import read_npz
from mmedge.preprocess.decode import IMAGE_SUFFIXES
from mmedge.preprocess.video_file import VIDEO_SUFFIXES
from mmedge.specs import Array, Modality

__all__ = ["CAPTIONS_NAME", "LABELS", "Dataset", "Sample", "read_dataset"]

CAPTIONS_NAME = "captions.jsonl"
LABELS = "labels"
"""The array of an .npz file that holds the true class of each sample: (N,) integers."""

_SOUNDS = frozenset({".wav", ".flac", ".ogg"})
_MOST_NAMED = 3
_MEDIA = ("image", "audio", "video")
_FIELDS = (*_MEDIA, "caption", "label")


# What zipfile, zlib and numpy raise where an archive or a header in it is damaged.


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample: files, caption, class and true boxes; None where there is none."""

    image: Path | None = None
    audio: Path | None = None
    caption: str | None = None
    label: str | None = None
    objects: Objects | None = None
    video: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """Samples in a fixed order.

    Attributes:
        name: The folder's or file's name, no path of this machine.
        samples: At least one, unless `arrays` holds them.
        arrays: Arrays by input of a graph, with one row for each sample: (N, ...).
        categories: Labels of the true boxes, if the samples have any.
    """

    name: str
    samples: tuple[Sample, ...] = ()
    arrays: Mapping[str, Array] = field(default_factory=dict)
    categories: tuple[str, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        """Distinct captions, in order."""
        return tuple(dict.fromkeys(s.caption for s in self.samples if s.caption is not None))

    def items(self, modality: Modality) -> tuple[Path | str, ...]:
        """Return the values of a modality, in the order of the samples.

        Texts are the captions; where there are none, the labels of the true boxes.
        """
        if modality is Modality.TEXT:
            return self.captions or self.categories
        if modality.value not in _MEDIA:
            return ()
        return tuple(item for s in self.samples if (item := getattr(s, modality.value)) is not None)

    def __len__(self) -> int:
        return len(self.samples) or len(next(iter(self.arrays.values()), ()))

    def rows(self, chosen: Array) -> Dataset:
        """Return the dataset of some samples.

        Args:
            chosen: (K,) positions.
        """
        if self.arrays:
            return replace(
                self, arrays={name: array[chosen] for name, array in self.arrays.items()}
            )
        return replace(self, samples=tuple(self.samples[int(position)] for position in chosen))

    def sha256(self) -> str:
        """Return one hash over the content of every sample, in their order."""
        digest = hashlib.sha256()
        for sample in self.samples:
            paths = [sample.image, sample.audio, *([sample.video] if sample.video else [])]
            files = [None if path is None else sha256_file(path) for path in paths]
            boxes = () if sample.objects is None else (asdict(sample.objects),)
            digest.update(json.dumps([*files, sample.caption, sample.label, *boxes]).encode())
        for name, array in sorted(self.arrays.items()):
            digest.update(f"{name}{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def read_dataset(path: Path) -> Dataset:
    """Read a folder of images, sounds or videos, or a .jsonl, COCO or .npz file.

    A folder may hold `captions.jsonl`, or a COCO file named `annotations.json` or
    `_annotations.coco.json`, see read_coco.

    A line of a .jsonl file is an object with `image`, `audio` or `video` (paths relative to the
    file), `caption` and `label`, each optional, but one of the first four. Without one, every image
    below the folder is taken, or else every audio file, or every video, sorted by path; they are
    not opened here. An .npz file
    holds arrays by input of the graph, (N, ...), and optionally `labels` (N,).

    Raises:
        CalibrationError: If there is nothing at `path`, no sample, or a line cannot be used.
    """
    if not path.exists():
        raise CalibrationError(
            f"No such folder or file: {path}. Pass a folder of images, sounds or videos, a .jsonl "
            "file, a COCO file or an .npz file."
        )
    if path.suffix == ".npz":
        return Dataset(path.resolve().name, arrays=_read_arrays(path))
    held = [path / name for name in COCO_NAMES if path.is_dir() and (path / name).is_file()]
    if path.suffix == ".json" or (held and not (path / CAPTIONS_NAME).is_file()):
        return _read_coco(held[0] if held else path, path.resolve().name)
    if path.is_file():
        if path.suffix != ".jsonl":
            raise CalibrationError(
                f"{path}: expected a folder, a .jsonl file, a COCO file (.json) or an .npz file."
            )
        samples = tuple(_read_lines(path))
    elif (path / CAPTIONS_NAME).is_file():
        samples = tuple(_read_lines(path / CAPTIONS_NAME))
    else:
        files = sorted(file for file in path.rglob("*") if file.is_file())
        samples = tuple(Sample(image=f) for f in files if f.suffix.lower() in IMAGE_SUFFIXES)
        samples = samples or tuple(Sample(audio=f) for f in files if f.suffix.lower() in _SOUNDS)
        samples = samples or tuple(
            Sample(video=f) for f in files if f.suffix.lower() in VIDEO_SUFFIXES
        )
    if not samples:
        raise CalibrationError(
            f"{path} holds no images, sounds or videos{_describe_other_files(path)}; expected "
            f"{', '.join(sorted(IMAGE_SUFFIXES | _SOUNDS | VIDEO_SUFFIXES))}. Pass a folder that "
            "does."
        )
    return Dataset(path.resolve().name, samples)


def _read_coco(path: Path, name: str) -> Dataset:
    objects, categories = read_coco(path)
    if not objects:
        raise CalibrationError(f"{path} lists no images. Pass a COCO file that does.")
    samples = (Sample(image=image, objects=one) for image, one in objects.items())
    return Dataset(name, tuple(samples), categories=categories)


def _describe_other_files(path: Path) -> str:
    """Return the kind of file found instead of samples, "" for none."""
    files = path.rglob("*") if path.is_dir() else ()
    suffixes = Counter(file.suffix.lower() or "no suffix" for file in files if file.is_file())
    listed = [f"{count} of {suffix}" for suffix, count in suffixes.most_common(_MOST_NAMED)]
    return f" but {sum(suffixes.values())} other files ({', '.join(listed)})" if listed else ""


def _read_arrays(path: Path) -> dict[str, Array]:
    def error(reason: str) -> CalibrationError:
        return CalibrationError(
            f"{path}: not a readable .npz file ({reason}). Write it with numpy.savez."
        )

    arrays = read_npz(path, error=error)
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(counts.values())) != 1 or not all(counts.values()):
        raise CalibrationError(
            f"{path}: got arrays of {counts} rows, expected one row for each sample in all of them."
        )
    return arrays


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
    if not isinstance(entry, dict) or not entry.keys() & {*_MEDIA, "caption"}:
        got = f"fields {', '.join(sorted(entry)) or 'none'}" if isinstance(entry, dict) else line
        raise CalibrationError(
            f"{place}: got {got[:80]}, expected an object with 'image', 'audio' or 'video' (a "
            "path) or 'caption'."
        )
    if unknown := sorted(entry.keys() - set(_FIELDS)):
        raise CalibrationError(
            f"{place}: unknown field '{unknown[0]}'; expected {', '.join(sorted(_FIELDS))}."
        )
    values: dict[str, str | None] = {}
    for name in _FIELDS:
        value = entry.get(name)
        if value is not None and not isinstance(value, str):
            got = type(value).__name__
            raise CalibrationError(f"{place}: '{name}' is {got}, expected a string.")
        values[name] = value
    image, audio, video = (
        None if values[name] is None else path.parent / str(values[name]) for name in _MEDIA
    )
    return Sample(image, audio, values["caption"], values["label"], video=video)
