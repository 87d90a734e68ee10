"""Splitting what is to be encoded into batches, in memory that does not grow with the number."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmedge.errors import ImageError, InputError
from mmedge.preprocess.decode import ImageSource
from mmedge.preprocess.image import ImageProcessor
from mmedge.specs import Float32Array

__all__ = ["BadImage", "image_batches", "length_buckets"]

# Narrower buckets pad less, wider ones make fewer calls. 4 took the least CPU time of 1 to 16 on
# 100 texts of 6 to 40 tokens, in fp32 and in int8 (docs/architecture.md, exact savings).
_BUCKET_TOKENS = 4


@dataclass(frozen=True, slots=True)
class BadImage:
    """An image that was skipped.

    Attributes:
        position: Its place among those given, from 0.
        path: Its path, empty if it was not given by one.
        reason: What is wrong with it and what to do.
    """

    position: int
    path: str
    reason: str


def image_batches(
    sources: Iterable[ImageSource],
    processor: ImageProcessor,
    batch_size: int,
    bad: list[BadImage] | None = None,
) -> Iterator[Float32Array]:
    """Prepare pictures, batch by batch.

    Args:
        sources: Read as far as the batch at hand needs, no further.
        processor: Prepares each picture.
        batch_size: Pictures in a batch, at most.
        bad: Takes the pictures that cannot be read; None raises instead.

    Yields:
        (n, 3, h, w) float32 with n <= batch_size. One buffer serves every batch: each is
        overwritten by the next.

    Raises:
        InputError: If a picture cannot be used; its position is named.
    """
    size = processor.output_size
    # Without a common size no picture can share a batch with another.
    buffer = None if size is None else np.empty((batch_size, 3, *size), np.float32)
    filled = 0
    for position, source in enumerate(sources):
        target = None if buffer is None else buffer[filled : filled + 1]
        prepared = _prepare(source, processor, target, position, bad)
        if prepared is None:
            continue
        if buffer is None:
            yield prepared
            continue
        filled += 1
        if filled == batch_size:
            yield buffer
            filled = 0
    if buffer is not None and filled:
        yield buffer[:filled]


def _prepare(
    source: ImageSource,
    processor: ImageProcessor,
    target: Float32Array | None,
    position: int,
    bad: list[BadImage] | None,
) -> Float32Array | None:
    """Prepare one picture, into `target` if there is one; return None if it was put aside."""
    try:
        if target is None:
            return processor([source])[processor.config.input]
        processor.into([source], target)
    except InputError as error:
        if bad is None or not isinstance(error, ImageError):
            raise type(error)(f"images[{position}]: {error}") from error
        path = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
        bad.append(BadImage(position, path, str(error)))
        return None
    return target


def length_buckets(ids: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Group texts of like length, so that padding costs a text at most 3 tokens.

    Args:
        ids: Token ids of each text.
        batch_size: Texts in a group, at most.

    Returns:
        Positions in `ids`, group by group; every position is in exactly one.
    """
    buckets: dict[int, list[int]] = {}
    for position, tokens in enumerate(ids):
        buckets.setdefault(-(-len(tokens) // _BUCKET_TOKENS), []).append(position)
    return [
        bucket[start : start + batch_size]
        for _, bucket in sorted(buckets.items())
        for start in range(0, len(bucket), batch_size)
    ]
