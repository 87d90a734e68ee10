"""Calibration data, streamed: checked once, then read again for every pass over it.

Never more than one batch is in memory, so ten thousand pictures need no more than ten.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from mmedge.converters.data.datasets import Dataset, Sample
from mmedge.errors import CalibrationError, ImageError, InputError
from mmedge.preprocess import ImageProcessor, TextProcessor, decode_image
from mmedge.specs import Array

__all__ = [
    "FEW_SAMPLES",
    "CheckedDataset",
    "batched",
    "check_dataset",
    "image_feeds",
    "text_feeds",
]

FEW_SAMPLES = 32
"""Below this many pictures the ranges of activations are guesses."""
_BATCH = 8

T = TypeVar("T")


@dataclass(frozen=True)
class CheckedDataset:
    """A dataset of which every picture can be read.

    Attributes:
        data: The usable samples.
        skipped: One message for each picture that was left out.
        contents: Hashes of the decoded pictures; fewer than samples where pictures repeat.
    """

    data: Dataset
    skipped: tuple[str, ...]
    contents: frozenset[bytes]


def check_dataset(
    data: Dataset,
    *,
    skip_bad: bool = False,
    advance: Callable[[int, int], None] | None = None,
) -> CheckedDataset:
    """Decode every picture once.

    Args:
        data: What to check.
        skip_bad: Leave unreadable pictures out instead of raising.
        advance: Called with (done, total) after each picture.

    Raises:
        CalibrationError: If a picture cannot be read (it is named) and skip_bad is False, or none
            can.
    """
    usable: list[Sample] = []
    skipped: list[str] = []
    hashes: set[bytes] = set()
    for done, sample in enumerate(data.samples, start=1):
        try:
            picture = decode_image(sample.image)
        except ImageError as error:
            if not skip_bad:
                raise CalibrationError(
                    f"{data.name}: {error} Remove the file, or leave such files out with "
                    "--skip-bad."
                ) from error
            skipped.append(str(error))
        else:
            hashes.add(hashlib.sha256(picture.tobytes()).digest())
            usable.append(sample)
        if advance is not None:
            advance(done, len(data.samples))
    if not usable:
        raise CalibrationError(
            f"{data.name}: none of its {len(data.samples)} pictures can be read. The first: "
            f"{skipped[0]}"
        )
    return CheckedDataset(replace(data, samples=tuple(usable)), tuple(skipped), frozenset(hashes))


def image_feeds(
    samples: Iterable[Sample], processor: ImageProcessor, batch: int = _BATCH
) -> Iterator[Mapping[str, Array]]:
    """Yield feeds of an image encoder: (B, 3, H, W) float32 under the configured input name.

    Raises:
        CalibrationError: If a picture cannot be read.
    """
    with _calibration_errors():
        for group in batched(samples, batch):
            yield processor([sample.image for sample in group])


def text_feeds(
    texts: Iterable[str], processor: TextProcessor, batch: int = _BATCH
) -> Iterator[Mapping[str, Array]]:
    """Yield feeds of a text encoder: (B, T) int64 ids, and the mask where the graph takes one.

    Raises:
        CalibrationError: If a text cannot be encoded.
    """
    with _calibration_errors():
        for group in batched(texts, batch):
            yield processor(group)


@contextmanager
def _calibration_errors() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise CalibrationError(f"Calibration: {error}") from error


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of `size`, the last one shorter."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
