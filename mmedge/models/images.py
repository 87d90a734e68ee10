"""Batching of images in bounded memory, prepared in threads ahead of the encoder."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar, cast

import numpy as np
from PIL import Image

from mmedge.ahead import run_ahead, worker_threads
from mmedge.errors import DTypeError, ImageError, InputError
from mmedge.models.batches import Skipped
from mmedge.preprocess.camera import RawFrame
from mmedge.preprocess.decode import (
    ImageSource,
    array_of,
    frame_size,
    image_files,
    is_image_source,
)
from mmedge.preprocess.image import ImageProcessor
from mmedge.specs import Array, Float32Array

__all__ = ["checked_paths", "image_batches", "image_sources", "preprocessed_batches"]

ResultT = TypeVar("ResultT")

# An image prepared, or why it cannot be used; its path; width and height of its frame.
_Prepared: TypeAlias = tuple[dict[str, Array] | InputError, str, tuple[int, int] | None]

_MAX_HELD_BYTES = 1 << 26  # of a file that is read before its turn


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
) -> Iterable[str | os.PathLike[str]]:
    """Return the given paths, or those of a folder, recording their names; an iterator is lazy.

    Raises:
        InputError: If one is not a path, or a folder holds no images.
    """
    if isinstance(paths, (str, os.PathLike)) and Path(paths).is_dir():
        folder, paths = paths, image_files(Path(paths))
        if not paths:
            raise InputError(f"Paths: the folder '{os.fspath(folder)}' holds no image files.")
    if isinstance(paths, (str, bytes, os.PathLike)):
        raise InputError("Paths: got a single path, expected a folder or several. Pass [path].")
    checked = _checked(paths, names)
    return list(checked) if isinstance(paths, Sequence) else checked


def _checked(
    paths: Iterable[str | os.PathLike[str]], names: list[str]
) -> Iterator[str | os.PathLike[str]]:
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
    *,
    batches_ahead: int = 1,
    frames: list[tuple[int, int]] | None = None,
) -> Generator[dict[str, Array], None, None]:
    """Prepare images, batch by batch, in threads while the caller encodes.

    Args:
        sources: Read in the calling thread: no further than `batches_ahead` batches beyond the one
            at hand, and not beyond that one where the process may use a single CPU.
        processor: Prepares each image.
        batch_size: Images in a batch, at most.
        skipped: Takes the images that cannot be read; None raises instead.
        batches_ahead: Batches that are prepared while one is encoded.
        frames: Takes width and height of each image that is not skipped, before its batch.

    Yields:
        The graph's inputs by name, of n <= batch_size images. One buffer serves every batch: each
        is overwritten by the next. Closing the generator ends the threads.

    Raises:
        InputError: If an image cannot be used; its position is named.
    """
    # Without a common size every image is its own batch.
    buffers = processor.buffers(batch_size)
    filled = 0
    threads = worker_threads(sources)
    plain = (partial(_prepare, processor, source, _path(source)) for source in sources)
    calls = _held(sources, processor) if threads else plain
    with closing(run_ahead(calls, threads=threads, ahead=batches_ahead * batch_size)) as results:
        for position, (prepared, path, frame) in enumerate(results):
            if frames is not None and frame is not None:
                frames.append(frame)
            if isinstance(prepared, InputError):
                if skipped is None or not isinstance(prepared, ImageError):
                    raise type(prepared)(f"images[{position}]: {prepared}") from prepared
                skipped.append(Skipped(position, path, str(prepared)))
            elif buffers is None:
                yield prepared
            else:
                for name, buffer in buffers.items():
                    buffer[filled] = prepared[name][0]
                filled += 1
                if filled == batch_size:
                    yield buffers
                    filled = 0
    if buffers is not None and filled:
        yield {name: buffer[:filled] for name, buffer in buffers.items()}


def _path(source: ImageSource) -> str:
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""


def _prepare(processor: ImageProcessor, source: ImageSource, path: str) -> _Prepared:
    """Prepare an image."""
    try:
        image = processor.decode(source)
        return processor([image]), path, frame_size(image)
    except InputError as error:
        return error, path, None


def _held(
    sources: Iterable[ImageSource], processor: ImageProcessor
) -> Iterator[Callable[[], _Prepared]]:
    """Yield calls that prepare images in other threads, whatever becomes of the sources then.

    An iterator may overwrite the array or the file that it gave, or close it, when it is asked for
    the next: arrays are copied, files are read. What cannot be shared between threads is prepared
    here, before the next is read.
    """
    stable = isinstance(sources, (Sequence, np.ndarray))
    for source in sources:
        held: ImageSource | None = None
        if isinstance(source, bytes):
            held = source
        elif isinstance(source, (np.ndarray, RawFrame)):
            held = source if stable else source.copy()
        elif isinstance(source, (str, os.PathLike)):
            held = source if stable else _file_bytes(os.fspath(source))
        elif stable and not hasattr(source, "read"):
            opened = isinstance(source, Image.Image) and getattr(source, "tile", None)
            held = None if opened else source
        path = _path(source)
        if held is None:
            yield partial(_same, _prepare(processor, source, path))
        else:
            yield partial(_prepare, processor, held, path)


def _same(result: ResultT) -> ResultT:
    return result


class _FileBytes(io.BytesIO):
    """The bytes of a file, with its name for messages."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


def _file_bytes(path: str) -> _FileBytes | None:
    """Read a file; None for what is none, is large or cannot be read, which preparing handles."""
    try:
        file = Path(path)
        if file.is_file() and 0 < file.stat().st_size <= _MAX_HELD_BYTES:
            return _FileBytes(file.read_bytes(), path)
    except (OSError, ValueError):  # ValueError: NUL in the name
        pass
    return None


def preprocessed_batches(tensor: Array, batch_size: int) -> Generator[Float32Array, None, None]:
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
