"""What an index holds and takes, in numbers."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmedge.retrieval.schema import FORMAT, RECORD, SNAPSHOTS
from mmedge.retrieval.view import View

__all__ = ["IndexStats", "SegmentStats", "read_stats"]


@dataclass(frozen=True, slots=True)
class SegmentStats:
    """Vectors that are searched together.

    Attributes:
        snapshot: Name of the snapshot; "" for the newest vectors, which have none yet.
        vectors: How many there are, those of deleted items included.
        alive: How many count.
        approximate: Name of its approximate index; "" if it is searched exactly.
    """

    snapshot: str
    vectors: int
    alive: int
    approximate: str


@dataclass(frozen=True, slots=True)
class IndexStats:
    """An index in numbers.

    Attributes:
        items: How many items there are.
        vectors: How many vectors they have.
        dim: D, the length of a vector.
        space: Embedding-space fingerprint; None for ready vectors of unknown origin.
        bundle: Path of the bundle that it was made with.
        precision: Variant of that bundle; None for its default.
        format: Version of the index's format.
        record_bytes: Size of the record, its write-ahead log included.
        snapshots_bytes: Size of the snapshots and approximate indexes.
        segments: What a search goes through.
        damaged: Snapshots that cannot be used and are read from the record instead.
        migrating_to: Space of a migration that has not ended.
    """

    items: int
    vectors: int
    dim: int
    space: str | None
    bundle: str | None
    precision: str | None
    format: int
    record_bytes: int
    snapshots_bytes: int
    segments: tuple[SegmentStats, ...]
    damaged: tuple[str, ...]
    migrating_to: str | None


def read_stats(connection: sqlite3.Connection, view: View, folder: Path) -> IndexStats:
    """Return the numbers of an index at the moment of a view."""
    about = view.about
    (vectors,) = connection.execute(
        "SELECT count(*) FROM vectors WHERE epoch = ?", (about.epoch,)
    ).fetchone()
    segments = tuple(
        SegmentStats(
            "" if each.number is None else f"{each.number:06d}",
            len(each.rows),
            int(np.count_nonzero(view.alive.has(each.rows))),
            "" if each.ann is None else each.ann.name,
        )
        for each in view.segments
    )
    return IndexStats(
        items=about.items,
        vectors=vectors,
        dim=about.dim,
        space=about.space,
        bundle=about.bundle,
        precision=about.precision,
        format=FORMAT,
        record_bytes=_size(folder / RECORD) + _size(folder / f"{RECORD}-wal"),
        snapshots_bytes=sum(_size(path) for path in (folder / SNAPSHOTS).glob("*")),
        segments=segments,
        damaged=view.damaged,
        migrating_to=about.next_space,
    )


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
