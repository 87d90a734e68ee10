"""Embedding with decoding and preprocessing in threads while the encoder runs."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from mmedge.errors import InputError
from mmedge.media.frames import Media
from mmedge.models.embedding import EmbeddingModel
from mmedge.specs import Array, Float32Array, Modality

__all__ = ["Embedded", "Job", "embedded"]

KeyT = TypeVar("KeyT")

_MAX_BYTES = 1 << 28
_BATCHES_AHEAD = 3  # prepared while one runs
_BATCH = 8  # of a model whose batch axis has no bound
_MAX_BATCH = 32


@dataclass(frozen=True, slots=True)
class Job(Generic[KeyT]):
    """Something to embed.

    Attributes:
        key: The caller's.
        modality: Image or audio.
        item: A file's path, or an image or sound in memory.
        known_hash: If the file has this sha256, it is not embedded.
    """

    key: KeyT
    modality: Modality
    item: Media = field(repr=False)
    known_hash: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Embedded(Generic[KeyT]):
    """What became of a job.

    Attributes:
        key: The job's.
        modality: The job's.
        vector: (D,) float32, L2-normalised; None if the file has the known hash, or failed.
        content_hash: sha256 of the file; None for an item in memory.
        error: Why it could not be embedded.
    """

    key: KeyT
    modality: Modality
    vector: Float32Array | None = field(repr=False)
    content_hash: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared(Generic[KeyT]):
    job: Job[KeyT]
    feed: dict[str, Array] | None = field(default=None, repr=False)
    content_hash: str | None = None
    error: str | None = None


def embedded(
    model: EmbeddingModel,
    jobs: Iterable[Job[KeyT]],
    *,
    batch_size: int | None = None,
    workers: int | None = None,
    shrink: bool = True,
) -> Iterator[Embedded[KeyT]]:
    """Embed images and sounds in bounded memory, in about the order of the jobs.

    Args:
        model: Its encoders run in the calling thread.
        jobs: Read as far ahead as the threads need.
        batch_size: Items that run through the graph at once; None takes the bundle's own.
        workers: Threads that read, decode and prepare; None for one per CPU.
        shrink: Decode a large JPEG at a half, a quarter or an eighth of its size where that is
            still twice what the model sees; the embedding keeps a cosine of 1.000 to that of
            encode_image.

    Yields:
        One result a job; an item that cannot be read has an error and stops nothing.

    Raises:
        BackendError: If the engine fails.
    """
    threads = workers or os.cpu_count() or 1
    size = batch_size or _default_batch(model)
    pending: deque[Future[_Prepared[KeyT]]] = deque()
    waiting: dict[Modality, list[_Prepared[KeyT]]] = {}
    source = iter(jobs)
    with ThreadPoolExecutor(threads, thread_name_prefix="mmedge-decode") as pool:
        try:
            while True:
                while len(pending) < size * _BATCHES_AHEAD + threads:
                    job = next(source, None)
                    if job is None:
                        break
                    pending.append(pool.submit(_prepare, model, job, shrink=shrink))
                if not pending:
                    break
                prepared = pending.popleft().result()
                if prepared.feed is None:
                    job = prepared.job
                    yield Embedded(
                        job.key, job.modality, None, prepared.content_hash, prepared.error
                    )
                    continue
                batch = waiting.setdefault(prepared.job.modality, [])
                batch.append(prepared)
                if len(batch) == size:
                    yield from _run(model, waiting.pop(prepared.job.modality))
            for batch in waiting.values():
                yield from _run(model, batch)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _default_batch(model: EmbeddingModel) -> int:
    sizes = []
    for role in model.encoders.values():
        if role in model.sessions:
            axis = model.sessions[role].inputs[0].shape[0]
            bounds = None if isinstance(axis, int) else model.manifest.roles[role].axes.get(axis)
            sizes.append(
                axis if isinstance(axis, int) else _BATCH if bounds is None else bounds.max
            )
    return min([*sizes, _MAX_BATCH])


def _prepare(model: EmbeddingModel, job: Job[KeyT], *, shrink: bool) -> _Prepared[KeyT]:
    """Read and preprocess one item; runs in a thread."""
    item, digest = job.item, None
    try:
        if isinstance(item, str | os.PathLike):
            data = _read(Path(item))
            digest = hashlib.sha256(data).hexdigest()
            if digest == job.known_hash:
                return _Prepared(job, content_hash=digest)
            item = data
        feed = model.prepare(job.modality, item, shrink=shrink)
    except InputError as error:
        return _Prepared(job, content_hash=digest, error=str(error))
    return _Prepared(job, feed, digest)


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise InputError(f"{size} bytes, more than the {_MAX_BYTES} that are read.")
        if size == 0:
            raise InputError("the file is empty. Fetch or write it again.")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error}).") from error


def _run(model: EmbeddingModel, batch: list[_Prepared[KeyT]]) -> Iterator[Embedded[KeyT]]:
    """Encode prepared items of one modality: together where their shapes agree."""
    groups: dict[tuple[tuple[int, ...], ...], list[_Prepared[KeyT]]] = {}
    for one in batch:
        shapes = tuple(array.shape for array in (one.feed or {}).values())
        groups.setdefault(shapes, []).append(one)
    encode: Callable[..., Float32Array] = model.encode_prepared
    for group in groups.values():
        feeds = [one.feed or {} for one in group]
        joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
        vectors = encode(group[0].job.modality, joined)
        for one, vector in zip(group, vectors, strict=True):
            yield Embedded(one.job.key, one.job.modality, vector, one.content_hash)
