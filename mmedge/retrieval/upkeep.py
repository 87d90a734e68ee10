"""Snapshots written from the record, merged and compacted, and files that nothing names removed."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from mmedge.errors import StorageError
from mmedge.files import storage_errors
from mmedge.retrieval.deletions import forget_deletions
from mmedge.retrieval.lists import build_lists
from mmedge.retrieval.measuring import keep_queries, kept_queries, measure_widths
from mmedge.retrieval.record import LOG, Record
from mmedge.retrieval.schema import SNAPSHOTS, About, read_about
from mmedge.retrieval.snapshots import Block, open_snapshot, snapshot_path, write_snapshot
from mmedge.retrieval.view import Segment, read_blocks
from mmedge.retrieval.widths import Widths
from mmedge.specs import Float32Array

__all__ = [
    "LISTED_ROWS",
    "Written",
    "after_write",
    "compact",
    "drop_other_epochs",
    "has_lists",
    "name_snapshot",
    "remove_orphans",
    "write_from",
    "write_rows",
]

LISTED_ROWS = 20_000  # from which compact puts the vectors in lists
_TAIL_ROWS = 4096  # behind the last snapshot, before another is written
_MERGED_ROWS = 32_768  # largest snapshot that merging makes; compact makes larger ones
_BLOCK_ROWS = 4096  # that are written to a file at a time
_EPOCH_ROWS = 4096  # rows of an ended migration that are deleted in one transaction


@dataclass(frozen=True, slots=True)
class Written:
    """A snapshot that was written: its row of `snapshots`."""

    number: int
    first_row: int
    last_row: int
    count: int
    crc: int
    widths: str | None


def after_write(record: Record) -> None:
    """Write a snapshot where many rows have come since the last, and compact where most are gone.

    What the record holds is durable already, so a full disk is logged and not raised.
    """
    with record.reading() as connection:
        about = read_about(connection)
        snapshots = _snapshots(connection)
        low, high = connection.execute("SELECT min(number), max(number) FROM gone").fetchone()
    gone = 0 if low is None else high - low + 1
    tail = about.rows - (snapshots[-1][2] if snapshots else 0)
    lists = any(listed for *_, listed in snapshots)
    try:
        if gone >= _TAIL_ROWS and gone > about.items and not lists:
            drop_other_epochs(record)
            write_from(record, 0)
        elif tail >= _TAIL_ROWS and about.next_dim is None:
            first = about.rows - tail + 1
            for _, first_row, _, count, listed in reversed(snapshots):
                if listed or count > tail or count + tail > _MERGED_ROWS:
                    break
                first, tail = first_row, tail + count
            write_from(record, first)
    except StorageError as error:
        LOG.warning("%s Searches read the newest rows from the record meanwhile.", error)


def compact(record: Record, queries: Mapping[str, Float32Array] | None = None) -> None:
    """Write one snapshot of all rows, with lists if it is large, and forget what is gone.

    Args:
        record: The index's.
        queries: (Q, D) float32 by kind, with which the lists are measured; see measure_widths.
            None for those with which they were measured last.

    Raises:
        RetrievalError: If another process goes on writing.
        StorageError: If the disk is full or read-only.
    """
    with record.exclusive():
        drop_other_epochs(record)
        if queries is None:
            with record.reading() as connection:
                queries = kept_queries(connection, read_about(connection).dim)
        write_from(record, 0, queries)
        with record.writing() as connection:
            forget_deletions(connection)
            connection.execute("INSERT INTO words(words) VALUES ('optimize')")
            connection.execute("DELETE FROM fields")
            connection.execute(
                """INSERT INTO fields SELECT DISTINCT field.key
                FROM items, json_each(items.metadata) AS field"""
            )
        record.shrink()


def write_from(
    record: Record, first_row: int, queries: Mapping[str, Float32Array] | None = None
) -> None:
    """Write one snapshot of all rows from one on; it replaces those that hold any of them.

    Args:
        record: The index's.
        first_row: Where another snapshot begins, or none is; 0 for all rows, after which nothing
            is gone any more.
        queries: With which lists are measured; None for lists if there were some, measured with
            the queries of the last time.

    Raises:
        RetrievalError: If another process goes on writing.
        StorageError: If the disk is full or read-only.
    """
    with record.exclusive():
        with record.reading() as connection:
            about = read_about(connection)
            if queries is None and has_lists(connection, first_row):
                queries = kept_queries(connection, about.dim)
            written = write_rows(record, connection, about, first_row, queries)
        with record.writing() as connection:
            connection.execute("DELETE FROM snapshots WHERE last_row >= ?", (first_row,))
            name_snapshot(connection, written, queries)
            if first_row == 0:
                connection.execute("DELETE FROM gone")
                connection.execute("UPDATE about SET generation = generation + 1")
        remove_orphans(record)


def has_lists(connection: sqlite3.Connection, first_row: int = 0) -> bool:
    """Return whether rows from one on lie in lists."""
    found = connection.execute(
        "SELECT 1 FROM snapshots WHERE last_row >= ? AND widths NOT NULL", (first_row,)
    )
    return found.fetchone() is not None


def write_rows(
    record: Record,
    connection: sqlite3.Connection,
    about: About,
    first_row: int,
    queries: Mapping[str, Float32Array] | None,
) -> Written | None:
    """Write a snapshot that the record does not name yet; None if there are no rows.

    Args:
        record: The index's, exclusive.
        connection: In a read transaction.
        about: The index at that moment; its epoch and width say which vectors.
        first_row: Of the snapshot.
        queries: (Q, D) float32 by kind, with which lists are measured; None for no lists.
    """
    (held,) = connection.execute(
        "SELECT count(*) FROM vectors WHERE row >= ? AND epoch = ?", (first_row, about.epoch)
    ).fetchone()
    if not held:
        return None
    number = about.version + 1
    path = snapshot_path(record.folder / SNAPSHOTS, number)
    with storage_errors(path):
        path.unlink(missing_ok=True)  # left by a writer that was killed
    blocks = read_blocks(connection, about, first_row - 1)
    if queries is None or held < LISTED_ROWS:
        count, crc = write_snapshot(path, about.uuid, about.dim, blocks)
        return Written(number, first_row, about.rows, count, crc, None)
    count, crc = _write_listed(path, about, blocks)
    widths = _widths(path, about, crc, connection, queries).to_json()
    return Written(number, first_row, about.rows, count, crc, widths)


def name_snapshot(
    connection: sqlite3.Connection,
    written: Written | None,
    queries: Mapping[str, Float32Array] | None,
) -> None:
    """Name a snapshot in the record, and keep the queries if its lists were measured with them."""
    if written is not None:
        connection.execute("INSERT INTO snapshots VALUES (?, ?, ?, ?, ?, ?)", astuple(written))
        if written.widths is not None and queries is not None:
            keep_queries(connection, queries)


def remove_orphans(record: Record) -> list[str]:
    """Remove files of the snapshots' folder that the record does not name; return their names."""
    removed = []
    with record.exclusive():
        with record.reading() as connection:
            snapshots = _snapshots(connection)
        named = {snapshot_path(record.folder, number).name for number, *_ in snapshots}
        folder = record.folder / SNAPSHOTS
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name not in named:
                with suppress(OSError):
                    path.unlink()
                    removed.append(path.name)
    return sorted(removed)


def _write_listed(path: Path, about: About, blocks: Iterable[Block]) -> tuple[int, int]:
    """Write a snapshot whose vectors lie in lists."""
    rows, keys, parts, vectors = (np.concatenate(column) for column in zip(*blocks, strict=True))
    lists, order = build_lists(vectors)
    starts = range(0, len(order), _BLOCK_ROWS)
    chosen = (order[start : start + _BLOCK_ROWS] for start in starts)
    ordered = ((rows[some], keys[some], parts[some], vectors[some]) for some in chosen)
    return write_snapshot(path, about.uuid, about.dim, ordered, lists)


def _widths(
    path: Path,
    about: About,
    crc: int,
    connection: sqlite3.Connection,
    queries: Mapping[str, Float32Array],
) -> Widths:
    opened = open_snapshot(path, about.uuid, about.dim, crc)
    segment = Segment(opened.vectors, opened.rows, opened.keys, opened.parts, lists=opened.lists)
    return measure_widths(segment, connection, queries)


def drop_other_epochs(record: Record) -> None:
    """Delete the vectors that an ended migration has replaced, some at a time."""
    deleted = 1
    while deleted:
        with record.writing("batch") as connection:
            about = read_about(connection)
            last = about.epoch + (0 if about.next_dim is None else 1)
            deleted = connection.execute(
                """DELETE FROM vectors WHERE row IN
                (SELECT row FROM vectors WHERE epoch NOT BETWEEN ? AND ? LIMIT ?)""",
                (about.epoch, last, _EPOCH_ROWS),
            ).rowcount


def _snapshots(connection: sqlite3.Connection) -> list[tuple[int, int, int, int, bool]]:
    """Return number, first and last row, count and whether it has lists, in the order of rows."""
    return connection.execute(
        """SELECT number, first_row, last_row, count, widths NOT NULL
        FROM snapshots ORDER BY first_row"""
    ).fetchall()
