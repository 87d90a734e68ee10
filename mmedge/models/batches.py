"""Batching of images and texts in bounded memory."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np

from mmedge.errors import DTypeError, ImageError, InputError, TextError
from mmedge.preprocess.decode import ImageSource, array_of, image_files, is_image_source
from mmedge.preprocess.image import ImageProcessor
from mmedge.preprocess.text import TextProcessor, check_tokens
from mmedge.specs import Array, Float32Array

__all__ = [
    "EncodedFiles",
    "Skipped",
    "checked_paths",
    "image_batches",
    "image_sources",
    "preprocessed_batches",
    "text_batches",
    "token_ids",
]

# Smaller buckets pad less, larger ones make fewer calls. 4 took the least CPU time of 1 to 16 on
# 100 texts of 6 to 40 tokens, in fp32 and in int8 (docs/architecture.md, exact savings).
_BUCKET_TOKENS = 4
_TEXTS_AT_ONCE = 4096  # that are tokenized and sorted by length together


@dataclass(frozen=True, slots=True)
class Skipped:
    """An image or a text that was skipped.

    Attributes:
        position: Its place among those given, from 0.
        path: An image's path, empty if it was not given by one.
        reason: What is wrong with it and what to do.
    """

    position: int
    path: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class EncodedFiles:
    """Embeddings of image files, and the skipped files.

    Attributes:
        embeddings: (K, D) float32, L2-normalised; row i belongs to paths[i].
        paths: The K files that were encoded, in the order they were given.
        skipped: The files that were not.
    """

    embeddings: Float32Array = field(repr=False)
    paths: tuple[str, ...]
    skipped: tuple[Skipped, ...]


def image_sources(images: ImageSource | Iterable[ImageSource]) -> Iterable[ImageSource] | None:
    """Return an iterator over several images; None for a single one.

    Raises:
        InputError: If it is neither.
    """
    array = array_of(images)
    if isinstance(array, np.ndarray):
        if array.dtype.kind in "OUS":  # paths, as pandas keeps them
            return list(array.flat)
        return array if array.ndim == 4 else None
    if is_image_source(images):
        return None
    if not isinstance(images, Iterable):
        raise InputError(
            f"Images: got {type(images).__name__}, expected a path, bytes, a file object, a PIL "
            "image, a uint8 array, or several of them."
        )
    return cast("Iterable[ImageSource]", images)


def checked_paths(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], names: list[str]
) -> Iterator[str | os.PathLike[str]]:
    """Yield the given paths, or those of a folder, and record their names.

    Raises:
        InputError: If one is not a path, or a folder holds no images.
    """
    if isinstance(paths, (str, os.PathLike)) and Path(paths).is_dir():
        folder, paths = paths, image_files(Path(paths))
        if not paths:
            raise InputError(f"Paths: the folder '{os.fspath(folder)}' holds no image files.")
    if isinstance(paths, (str, bytes, os.PathLike)):
        raise InputError("Paths: got a single path, expected a folder or several. Pass [path].")
    for position, path in enumerate(paths):
        if not isinstance(path, (str, os.PathLike)):
            raise InputError(
                f"Paths: got {type(path).__name__} at position {position}, expected str or Path. "
                "Pass other images to encode_image."
            )
        names.append(os.fspath(path))
        yield path


def image_batches(
    sources: Iterable[ImageSource],
    processor: ImageProcessor,
    batch_size: int,
    skipped: list[Skipped] | None = None,
) -> Iterator[Float32Array]:
    """Prepare images, batch by batch.

    Args:
        sources: Read as far as the batch at hand needs, no further.
        processor: Prepares each image.
        batch_size: Images in a batch, at most.
        skipped: Takes the images that cannot be read; None raises instead.

    Yields:
        (n, 3, h, w) float32 with n <= batch_size. One buffer serves every batch: each is
        overwritten by the next.

    Raises:
        InputError: If an image cannot be used; its position is named.
    """
    size = processor.output_size
    # Without a common size every image is its own batch.
    buffer = None if size is None else np.empty((batch_size, 3, *size), np.float32)
    filled = 0
    for position, source in enumerate(sources):
        target = None if buffer is None else buffer[filled : filled + 1]
        prepared = _prepare(source, processor, target, position, skipped)
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
    skipped: list[Skipped] | None,
) -> Float32Array | None:
    """Prepare one image, into `target` if given; return None if it was skipped."""
    try:
        if target is None:
            return processor([source])[processor.config.input]
        processor.into([source], target)
    except InputError as error:
        if skipped is None or not isinstance(error, ImageError):
            raise type(error)(f"images[{position}]: {error}") from error
        path = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
        skipped.append(Skipped(position, path, str(error)))
        return None
    return target


def preprocessed_batches(tensor: Array, batch_size: int) -> Iterator[Float32Array]:
    """Yield views of preprocessed images (N, 3, h, w), batch by batch.

    Raises:
        DTypeError: If it is not float32.
        ImageError: If a value is NaN or infinite.
    """
    if tensor.dtype != np.float32:
        raise DTypeError(
            f"Images {tensor.shape}: got dtype {tensor.dtype.name}, expected float32 "
            "(preprocessed) or uint8 (frames)."
        )
    if not np.isfinite(tensor).all():
        bad = [i for i, image in enumerate(tensor) if not np.isfinite(image).all()]
        raise ImageError(f"Images {bad}: NaN or infinite values. Check their preprocessing.")
    for start in range(0, max(len(tensor), 1), batch_size):
        yield tensor[start : start + batch_size]


def token_ids(
    texts: Iterable[str], processor: TextProcessor, skipped: list[Skipped] | None = None
) -> Iterator[list[list[int]]]:
    """Tokenize texts in chunks of a few thousand.

    Args:
        texts: Read as far as needed, no further.
        processor: Checks and tokenizes them.
        skipped: Takes the texts that cannot be used; None raises instead.

    Yields:
        Token ids of at least one text, in the order of the texts.

    Raises:
        TextError: If a text cannot be used; its position is named.
    """
    read = enumerate(texts)
    while part := list(itertools.islice(read, _TEXTS_AT_ONCE)):
        checked: dict[int, str] = {}
        for position, text in part:
            with _skipping(position, skipped):
                checked[position] = processor.check(text, position)
        usable: list[list[int]] = []
        ids = processor.encode(list(checked.values()))
        for position, tokens in zip(checked, ids, strict=True):
            with _skipping(position, skipped):
                check_tokens(tokens, position)
                usable.append(tokens)
        if usable:
            yield usable


@contextmanager
def _skipping(position: int, skipped: list[Skipped] | None) -> Iterator[None]:
    try:
        yield
    except TextError as error:
        if skipped is None:
            raise
        skipped.append(Skipped(position, "", str(error)))


def text_batches(
    ids: Sequence[Sequence[int]], batch_size: int, *, by_length: bool
) -> list[list[int]]:
    """Group texts into batches.

    Args:
        ids: Token ids of each text.
        batch_size: Texts in a batch, at most.
        by_length: Whether texts of like length go together, so that padding costs a text at most
            3 tokens.

    Returns:
        Positions in `ids`, batch by batch; every position is in exactly one.
    """
    buckets: dict[int, list[int]] = {}
    for position, tokens in enumerate(ids):
        bucket = -(-len(tokens) // _BUCKET_TOKENS) if by_length else 0
        buckets.setdefault(bucket, []).append(position)
    return [
        bucket[start : start + batch_size]
        for _, bucket in sorted(buckets.items())
        for start in range(0, len(bucket), batch_size)
    ]
