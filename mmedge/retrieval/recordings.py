"""Recordings and videos in an index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmedge.errors import InputError
from mmedge.media.frames import Frame
from mmedge.media.recordings import Recording
from mmedge.media.video import Video
from mmedge.retrieval.embedding import check_space
from mmedge.retrieval.items import Item
from mmedge.retrieval.pipeline import Job, embedded
from mmedge.retrieval.throughput import BulkModel
from mmedge.runtimes.processor import allowed_processors
from mmedge.specs import Float32Array, Modality

if TYPE_CHECKING:
    from mmedge.retrieval.index import Index

__all__ = ["index_recording", "index_video"]

_WRITE_ITEMS = 256


def index_recording(
    index: Index,
    bulk: BulkModel,
    recording: Recording,
    *,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Add the frames of a recording's topic to an index, an item a frame.

    An item's id is the recording's name, the topic and when the frame was recorded, in
    nanoseconds; its time is that of the message's header. Metadata: `topic` and `position`, for
    `Recording.image_at`. Frames that are in the index are passed over, so that a call that was
    killed goes on from there.

    Args:
        index: Where they go.
        bulk: Embeds them; of the index's embedding space, such as `index.bulk_model`.
        recording: An opened topic.
        batch_size: As for mmedge.retrieval.pipeline.embedded.
        workers: As for mmedge.retrieval.pipeline.embedded, but None for 4 at most, since frames
            wait in memory.
        progress: Called with the number of frames added so far.

    Returns:
        Frames added.

    Raises:
        InputError: If the recording is damaged or has images that cannot be read; what came before
            is in the index.
        BackendError: If the engine fails.
        StorageError: If the index cannot be written.
    """
    path, _, _ = recording.name.rpartition(f":{recording.topic}")
    space = bulk.model.spaces[bulk.model.encoders[Modality.IMAGE]]
    stem = f"{Path(path).name}{recording.topic}@"
    added = 0
    ready: list[tuple[Frame, Float32Array]] = []

    def jobs() -> Iterator[Job[Frame]]:
        for frame in recording:
            if f"{stem}{frame.position}" not in index:
                yield Job(frame, frame.modality, frame.item)

    def write() -> int:
        if ready:
            index.add(
                vectors=np.stack([vector for _, vector in ready]),
                ids=[f"{stem}{frame.position}" for frame, _ in ready],
                times=[frame.time for frame, _ in ready],
                sources=[str(Path(frame.source).absolute()) for frame, _ in ready],
                metadata=[
                    {"topic": recording.topic, "position": frame.position} for frame, _ in ready
                ],
                space=space,
            )
        count = len(ready)
        ready.clear()
        return count

    for one in embedded(bulk, jobs(), batch_size=batch_size, workers=workers or _threads()):
        if one.vector is None:
            raise InputError(f"{recording.name} at {one.key.position} ns: {one.error}")
        ready.append((one.key, one.vector))
        if len(ready) >= _WRITE_ITEMS:
            added += write()
            if progress is not None:
                progress(added)
    return added + write()


def index_video(
    index: Index,
    bulk: BulkModel,
    path: Path | str,
    *,
    batch_size: int | None = None,
    workers: int | None = None,
) -> int:
    """Add a video to an index: one item with a vector for each chosen frame.

    A search finds the video once, by its nearest frame: `Match.part` counts in the metadata
    `frames`, their seconds from the beginning, and `positions`, for `Video.image_at`. A video of
    the same size and time of change as in the index is passed over; the id is the file's name.

    Args:
        index: Where it goes.
        bulk: Embeds the frames; of the index's embedding space, such as `index.bulk_model`.
        path: The file.
        batch_size: As for mmedge.retrieval.pipeline.embedded.
        workers: As for mmedge.retrieval.pipeline.embedded, but None for 4 at most, since frames
            wait in memory.

    Returns:
        Frames embedded; 0 if the video is there already.

    Raises:
        InputError: If it is no video that can be read, or damaged.
        BackendError: If the engine fails.
        StorageError: If the index cannot be written.
    """
    file = Path(path).absolute()
    with Video(file) as video:
        status = file.stat()
        stamp = (status.st_size, status.st_mtime_ns)
        (known,) = index.get([file.name], vectors=False)
        if known is not None:
            stored = known.metadata.get("size_bytes"), known.metadata.get("modified_ns")
            if known.source != str(file):
                raise InputError(
                    f"{file}: '{file.name}' is already the id of {known.source}. Rename one."
                )
            if stored == stamp:
                return 0
        frames: list[tuple[int, float]] = []
        vectors: dict[int, Float32Array] = {}
        jobs = _jobs(video, frames)
        for one in embedded(bulk, jobs, batch_size=batch_size, workers=workers or _threads()):
            if one.vector is None:
                raise InputError(f"{file} at {one.key}: {one.error}")
            vectors[one.key] = one.vector
        if not frames:
            raise InputError(f"{file}: has no frames. Copy it again.")
        seen = status.st_mtime if video.started is None else video.started
    item = Item(
        file.name,
        np.stack([vectors[position] for position, _ in frames]),
        time=seen,
        source=str(file),
        metadata={
            "frames": [f"{offset_s:.3f}" for _, offset_s in frames],
            "positions": [str(position) for position, _ in frames],
            "size_bytes": stamp[0],
            "modified_ns": stamp[1],
        },
    )
    check_space(
        index.space, bulk.model.spaces[bulk.model.encoders[Modality.IMAGE]], "this model makes"
    )
    index.upsert([item])
    return len(frames)


def _threads() -> int:
    return min(4, len(allowed_processors()))


def _jobs(video: Video, frames: list[tuple[int, float]]) -> Iterator[Job[int]]:
    for frame in video:
        frames.append((frame.position, frame.offset_s))
        yield Job(frame.position, frame.modality, frame.item)
