"""What an index holds and takes, in numbers."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmedge.retrieval.scanning import has_kernels
from mmedge.retrieval.schema import FORMAT, RECORD, SNAPSHOTS
from mmedge.retrieval.view import View
from mmedge.retrieval.widths import Widths

__all__ = ["IndexStats", "SegmentStats", "read_stats"]


@dataclass(frozen=True, slots=True)
class SegmentStats:
    """Vectors that are searched together.

    Attributes:
        snapshot: Name of the snapshot; "" for the newest vectors, which have none yet.
        vectors: How many there are, those of deleted items included.
        alive: How many count.
        lists: How many inverted lists they lie in; 0 if they are searched exactly.
        recall: By kind of query, how many lists reach a recall of 0.95 for 10 matches; None where
            no number does, so that such a query is answered exactly. A kind that is not here was
            not measured, and is answered exactly too.
    """

    snapshot: str
    vectors: int
    alive: int
    lists: int
    recall: dict[str, int | None]


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
        snapshots_bytes: Size of the snapshots.
        segments: What a search goes through.
        damaged: Snapshots that cannot be used and are read from the record instead.
        migrating_to: Space of a migration that has not ended.
        kernels: What scans inverted lists: "numkong", or "numpy" without the extra `[index]`.
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
    kernels: str


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
            0 if each.lists is None else len(each.lists.centroids),
            {}
            if each.widths is None
            else {kind: _lists(each.widths, kind) for kind in each.widths.curves},
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
        kernels="numkong" if has_kernels() else "numpy",
    )


def _lists(widths: Widths, kind: str) -> int | None:
    width = widths.width(kind, 0.95, 10)
    return None if width is None else width.lists


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
