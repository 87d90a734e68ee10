"""A folder's images and sounds in an index: only what is new or changed is embedded."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmedge.errors import InputError, RetrievalError
from mmedge.media.folders import MediaFile, folder_files, taken_at
from mmedge.retrieval.items import Item, MetadataValue
from mmedge.retrieval.pipeline import Embedded, Job, embedded
from mmedge.retrieval.throughput import BulkModel
from mmedge.specs import Modality

if TYPE_CHECKING:
    from mmedge.retrieval.index import Index

__all__ = ["FolderReport", "Progress", "index_folder"]

_AT_ONCE = 512  # files looked up in the index together
_WRITE_ITEMS = 256
_WRITE_S = 2.0
_MOST_NAMED = 1000


@dataclass(slots=True)
class FolderReport:
    """What indexing did.

    Attributes:
        added: New items.
        updated: Items embedded again, since their file has other content.
        unchanged: Items whose file is as it was.
        removed: Items that left because their file is gone.
        failed: Files that could not be used.
        reasons: Path and reason of the first thousand of these.
        seconds: Wall-clock time.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    removed: int = 0
    failed: int = 0
    reasons: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def files(self) -> int:
        """Files that were dealt with."""
        return self.added + self.updated + self.unchanged + self.failed

    def fail(self, path: str, reason: str) -> None:
        """Count a file that could not be used."""
        self.failed += 1
        if len(self.reasons) < _MOST_NAMED:
            self.reasons.append((path, reason))


Progress = Callable[[FolderReport, int], None]
"""Called with the report so far and the number of files, after every few files."""


@dataclass(frozen=True, slots=True)
class _File:
    file: MediaFile
    id: str
    known: bool
    time: float


def index_folder(
    index: Index,
    bulk: BulkModel,
    folder: Path | str,
    *,
    prefix: str | None = None,
    prune: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> FolderReport:
    """Add a folder's images and sounds to an index, and bring what is there up to date.

    An item's id is the folder's name and the file's path in it. A file of the same size and time
    of change as in the index is passed over; one of the same content only gets its new time. Items
    are durable every 2 seconds, so that a call that is killed goes on from there. Metadata: `tag`
    (names of the folders in between), `size_bytes` and `modified_ns`.

    Args:
        index: Where they go.
        bulk: Embeds them; of the index's embedding space, such as `index.bulk_model`.
        folder: Where they are; see mmedge.media.folders.folder_files.
        prefix: Begins the ids in place of the folder's name.
        prune: Whether items of this folder whose file is gone leave the index.
        batch_size: As for mmedge.retrieval.pipeline.embedded.
        workers: As for mmedge.retrieval.pipeline.embedded.
        progress: Called as work goes on.

    Returns:
        What was done; unreadable files are counted and named.

    Raises:
        InputError: If the folder cannot be read, or holds no images or sounds that the model
            has an encoder for.
        RetrievalError: If the ids are those of another folder's files.
        BackendError: If the engine fails.
        StorageError: If the index cannot be written.
    """
    started, model = time.monotonic(), bulk.model
    root = Path(os.path.realpath(folder))
    report = FolderReport()
    files = [
        file for file in folder_files(root, skipped=report.fail) if file.modality in model.encoders
    ]
    if not files and not report.failed:
        kinds = " or ".join(kind.value for kind in model.encoders if kind is not Modality.TEXT)
        raise InputError(
            f"{folder}: holds no {kinds} files that the model can encode. Pass another folder."
        )
    start = f"{root.name if prefix is None else prefix}/".lstrip("/")
    space = next(
        (s for r, s in model.spaces.items() if r != model.encoders.get(Modality.TEXT)), None
    )
    total = len(files) + report.failed
    index.remember_folder(root)
    writer = _Writer(index, space)
    for one in embedded(
        bulk,
        _jobs(index, files, start, report),
        batch_size=batch_size,
        workers=workers,
    ):
        if one.error is not None:
            report.fail(str(one.key.file.path), one.error)
        else:
            writer.take(one, report)
        if progress is not None:
            report.seconds = time.monotonic() - started
            progress(report, total)
    writer.flush()
    if prune:
        report.removed = _prune(index, root, start, {start + file.name for file in files})
    report.seconds = time.monotonic() - started
    if progress is not None:
        progress(report, total)
    return report


def _jobs(
    index: Index, files: list[MediaFile], start: str, report: FolderReport
) -> Iterator[Job[_File]]:
    """Yield what is new or may have changed."""
    for first in range(0, len(files), _AT_ONCE):
        part = files[first : first + _AT_ONCE]
        held = index.get([start + file.name for file in part], vectors=False)
        for file, known in zip(part, held, strict=True):
            if known is not None:
                _check_same_folder(index, file, known)
                if _stamp(known) == (file.size_bytes, file.modified_ns):
                    report.unchanged += 1
                    continue
            taken = taken_at(file.path) if file.modality is Modality.IMAGE else None
            seen = file.modified if taken is None else taken
            key = _File(file, start + file.name, known is not None, seen)
            digest = None if known is None else known.content_hash
            yield Job(key, file.modality, file.path, digest)


def _stamp(item: Item) -> tuple[MetadataValue, MetadataValue]:
    return item.metadata.get("size_bytes"), item.metadata.get("modified_ns")


def _check_same_folder(index: Index, file: MediaFile, known: Item) -> None:
    source = known.source
    if source is not None and source != str(file.path) and Path(source).exists():
        raise RetrievalError(
            f"{index.path}: '{known.id}' is already the id of {source}, so {file.path} cannot have "
            "it. Give this folder's ids another beginning: prefix= or --prefix NAME."
        )


class _Writer:
    """Results gathered into transactions."""

    def __init__(self, index: Index, space: str | None) -> None:
        self._index = index
        self._space = space
        self._ready: list[Embedded[_File]] = []
        self._written = time.monotonic()

    def take(self, one: Embedded[_File], report: FolderReport) -> None:
        """Count a result and write when there are many, or it has been long."""
        if one.vector is None:
            report.unchanged += 1
        elif one.key.known:
            report.updated += 1
        else:
            report.added += 1
        self._ready.append(one)
        if len(self._ready) >= _WRITE_ITEMS or time.monotonic() - self._written > _WRITE_S:
            self.flush()

    def flush(self) -> None:
        """Write what is gathered; it is durable afterwards."""

        def kind(one: Embedded[_File]) -> tuple[bool, bool, str]:
            return one.key.known, one.vector is None, one.modality.value

        for (known, same, modality), group in itertools.groupby(
            sorted(self._ready, key=kind), kind
        ):
            batch = list(group)
            keys = [one.key for one in batch]
            ids = [key.id for key in keys]
            times = [key.time for key in keys]
            sources = [str(key.file.path) for key in keys]
            metadata = [_metadata(key.file) for key in keys]
            hashes = [one.content_hash for one in batch]
            vectors = None if same else np.stack([o.vector for o in batch if o.vector is not None])
            if known:
                self._index.update(
                    ids,
                    vectors=vectors,
                    times=times,
                    sources=sources,
                    metadata=metadata,
                    content_hashes=hashes,
                    space=self._space,
                )
            else:
                self._index.add(
                    vectors=vectors,
                    ids=ids,
                    times=times,
                    sources=sources,
                    metadata=metadata,
                    content_hashes=hashes,
                    modality=Modality(modality),
                    space=self._space,
                )
        self._ready.clear()
        self._written = time.monotonic()


def _metadata(file: MediaFile) -> dict[str, MetadataValue]:
    return {
        "tag": file.name.split("/")[:-1],
        "size_bytes": file.size_bytes,
        "modified_ns": file.modified_ns,
    }


def _prune(index: Index, root: Path, start: str, present: set[str]) -> int:
    """Delete items of the folder whose file is gone; a file that cannot be read is still there."""
    gone = [
        item.id
        for item in index.items(vectors=False)
        if item.id.startswith(start)
        and item.id not in present
        and item.source is not None
        and item.source.startswith(f"{root}{os.sep}")
        and not os.path.lexists(item.source)
    ]
    for first in range(0, len(gone), _AT_ONCE):
        index.delete(gone[first : first + _AT_ONCE])
    return len(gone)
