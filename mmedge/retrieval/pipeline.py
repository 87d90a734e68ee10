"""Embedding with decoding and preprocessing in threads while the encoder runs."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from mmedge.ahead import run_ahead
from mmedge.errors import InputError
from mmedge.media.frames import Media
from mmedge.models.embedding import EmbeddingModel
from mmedge.retrieval.throughput import BulkModel
from mmedge.runtimes.processor import allowed_processors
from mmedge.specs import Array, Float32Array, Modality

__all__ = ["Embedded", "Job", "embedded"]

KeyT = TypeVar("KeyT")

_MAX_BYTES = 1 << 28
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
    feed: dict[str, Array] = field(repr=False)
    content_hash: str | None


def embedded(
    bulk: BulkModel,
    jobs: Iterable[Job[KeyT]],
    *,
    batch_size: int | None = None,
    workers: int | None = None,
    shrink: bool = True,
) -> Iterator[Embedded[KeyT]]:
    """Embed images and sounds in bounded memory, in about the order of the jobs.

    A thread prepares a batch and then encodes it, while others prepare or encode theirs.

    Args:
        bulk: Embeds them, so many batches at once.
        jobs: Read as far ahead as the threads need.
        batch_size: Items that run through the graph at once; None takes the bundle's own.
        workers: Threads that read, decode and prepare; None for one per CPU. Each may have a batch
            of what the jobs hold in memory.
        shrink: Decode a large JPEG at a half, a quarter or an eighth of its size where that is
            still twice what the model sees; the embedding keeps a cosine of 1.000 to that of
            encode_image.

    Yields:
        One result a job; an item that cannot be read has an error and stops nothing.

    Raises:
        BackendError: If the engine fails.
    """
    threads = (workers or len(allowed_processors())) + 1  # one encodes while the others prepare
    turns = threading.Semaphore(bulk.encoders)
    batches = _batches(jobs, batch_size or _default_batch(bulk.model))
    calls = (partial(_embed, bulk.model, batch, turns, shrink=shrink) for batch in batches)
    with closing(run_ahead(calls, threads=threads, ahead=threads + 1)) as done:
        for results in done:
            yield from results


def _batches(jobs: Iterable[Job[KeyT]], size: int) -> Iterator[list[Job[KeyT]]]:
    """Yield jobs of one modality together."""
    waiting: dict[Modality, list[Job[KeyT]]] = {}
    for job in jobs:
        batch = waiting.setdefault(job.modality, [])
        batch.append(job)
        if len(batch) == size:
            yield waiting.pop(job.modality)
    yield from waiting.values()


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


def _embed(
    model: EmbeddingModel, batch: list[Job[KeyT]], turns: threading.Semaphore, *, shrink: bool
) -> list[Embedded[KeyT]]:
    """Prepare and encode jobs of one modality; runs in a thread."""
    done: list[Embedded[KeyT]] = []
    prepared: list[_Prepared[KeyT]] = []
    for job in batch:
        one = _prepare(model, job, shrink=shrink)
        if isinstance(one, Embedded):
            done.append(one)
        else:
            prepared.append(one)
    if prepared:
        with turns:
            done += _run(model, prepared)
    return done


def _prepare(
    model: EmbeddingModel, job: Job[KeyT], *, shrink: bool
) -> _Prepared[KeyT] | Embedded[KeyT]:
    """Read and preprocess one item, unless it has the known hash or cannot be read."""
    item, digest = job.item, None
    try:
        if isinstance(item, str | os.PathLike):
            data = _read(Path(item))
            digest = hashlib.sha256(data).hexdigest()
            if digest == job.known_hash:
                return Embedded(job.key, job.modality, None, digest)
            item = data
        feed = model.prepare(job.modality, item, shrink=shrink)
    except InputError as error:
        return Embedded(job.key, job.modality, None, digest, str(error))
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
        shapes = tuple(array.shape for array in one.feed.values())
        groups.setdefault(shapes, []).append(one)
    encode: Callable[..., Float32Array] = model.encode_prepared
    for group in groups.values():
        feeds = [one.feed for one in group]
        joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
        vectors = encode(group[0].job.modality, joined)
        for one, vector in zip(group, vectors, strict=True):
            yield Embedded(one.job.key, one.job.modality, vector, one.content_hash)
