"""A damaged record, read as far as it can be into a new one."""

from __future__ import annotations

import os
import sqlite3
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmedge.errors import IndexCorruptedError, RetrievalError
from mmedge.files import atomic_directory
from mmedge.files.locks import key_lock_in_time
from mmedge.retrieval.measuring import is_query
from mmedge.retrieval.rows import checked_fields, item_crc, vector_crc
from mmedge.retrieval.schema import (
    LOCK,
    RECORD,
    SNAPSHOTS,
    About,
    connect_unchecked,
    create_record,
    read_about,
    record_errors,
)
from mmedge.retrieval.snapshots import Snapshot, open_snapshot, snapshot_header, vectors_crc

__all__ = ["salvage_record"]

_WAIT_S = 30.0
_IDS = "SELECT id, key FROM items INDEXED BY sqlite_autoindex_items_1 ORDER BY id"
_FAILURES = 200_000  # reads of one table that fail before the rest of it counts as lost
_AT_ONCE = 4096  # rows that are read together where nothing is damaged
_Vectors = dict[int, dict[int, tuple[int, bytes]]]
"""By item key and part: row number and vector."""


def salvage_record(folder: Path) -> list[str]:
    """Replace an index by a new one of all that can be read of it.

    Returns:
        What was lost.

    Raises:
        RetrievalError: If another process goes on writing.
        IndexCorruptedError: If nothing can be read.
        StorageError: If the disk is full or read-only.
    """
    with key_lock_in_time(folder / LOCK, _WAIT_S) as holder:
        if holder is not None:
            raise RetrievalError(f"{folder} is being written by {holder}. Wait for it to finish.")
        with (
            atomic_directory(folder) as beside,
            record_errors(folder),
            closing(connect_unchecked(folder)) as old,
        ):
            lost = _copy(old, folder, beside)
            (beside / "damaged").mkdir()
            for name in (RECORD, f"{RECORD}-wal"):
                if (folder / name).exists():
                    os.link(folder / name, beside / "damaged" / name)
    return lost


def _copy(old: sqlite3.Connection, folder: Path, beside: Path) -> list[str]:
    lost: list[str] = []
    snapshots = list(_snapshots(folder))
    about = _about(old, folder, snapshots, lost)
    items: dict[int, tuple[Any, ...]] = {}
    seen: set[str] = set()
    sql = "SELECT * FROM items WHERE key BETWEEN ? AND ?"
    for row in _rows(old, sql, _highest(old, "SELECT max(key) FROM items", about.keys)):
        if checked_fields(row[1:8], row[-1]) is not None and row[1] not in seen:
            items[row[0]] = row
            seen.add(row[1])
    # What the items' table has lost of its own may still be in the index over the ids.
    for name, key in _readable(old, _IDS):
        if isinstance(name, str) and isinstance(key, int) and name not in seen and key not in items:
            seen.add(name)
            items[key] = _bare_item(key, name, about)
            lost.append(f"item {name!r}: its time, source, text and metadata")
    vectors = _vectors(old, about, snapshots, set(items))
    bare = [key for key in items if key not in vectors]
    lost += [f"item {items.pop(key)[1]!r}: its vectors" for key in bare]
    lost += _missing_parts(items, vectors)
    if not items and about.items:
        raise IndexCorruptedError(
            f"{folder}: no item of the damaged record can be read, so nothing was changed. Take a "
            "copy of the index, or make it again from the sources."
        )
    deletions = [row for row in _readable(old, "SELECT * FROM deletions") if row[0] not in seen]
    cursors = _readable(old, "SELECT * FROM cursors")
    asked = _readable(old, "SELECT kind, vector FROM queries")
    queries = [(kind, vector) for kind, vector in asked if is_query(kind, vector, about.dim)]
    folders = _readable(old, "SELECT * FROM folders")
    held = [
        (row, key, part, blob)
        for key, parts in vectors.items()
        if key in items
        for part, (row, blob) in parts.items()
    ]
    highest = max([about.seq, *(row[10] or 0 for row in items.values())])
    highest = max([highest, *(row[3] for row in deletions)])
    unnumbered = [key for key, row in items.items() if row[10] is None]
    for number, key in enumerate(unnumbered, highest + 1):
        items[key] = (*items[key][:10], number, items[key][11])
    about = replace(
        about,
        items=len(items),
        keys=max([about.keys, *items]),
        rows=max([about.rows, *(row for row, *_ in held)]),
        seq=highest + len(unnumbered),
        version=about.version + 1000,
        generation=about.generation + 1000,
        next_dim=None,
        next_space=None,
        next_bundle=None,
        next_precision=None,
    )
    (beside / SNAPSHOTS).mkdir()
    create_record(beside, about)
    with closing(sqlite3.connect(beside / RECORD)) as new, new:
        marks = ", ".join("?" * 12)
        new.executemany(f"INSERT OR IGNORE INTO items VALUES ({marks})", items.values())  # noqa: S608
        new.executemany(
            "INSERT INTO vectors VALUES (?, ?, ?, ?, ?, ?)",
            [
                (row, key, part, about.epoch, blob, vector_crc(key, part, blob))
                for row, key, part, blob in sorted(held)
            ],
        )
        new.executemany("INSERT OR IGNORE INTO deletions VALUES (?, ?, ?, ?)", deletions)
        new.executemany("INSERT OR IGNORE INTO cursors VALUES (?, ?)", cursors)
        new.executemany("INSERT INTO queries VALUES (?, ?)", queries)
        new.executemany("INSERT OR IGNORE INTO folders VALUES (?)", folders)
        new.execute(
            "INSERT INTO words(rowid, text) SELECT key, text FROM items WHERE text IS NOT NULL"
        )
        new.execute(
            """INSERT INTO fields SELECT DISTINCT field.key
            FROM items, json_each(items.metadata) AS field"""
        )
    return lost


def _about(
    old: sqlite3.Connection, folder: Path, snapshots: list[Snapshot], lost: list[str]
) -> About:
    with suppress(sqlite3.Error, IndexCorruptedError):
        return read_about(old)
    blobs = _readable(old, "SELECT length(vector) FROM vectors LIMIT 1")
    if not snapshots and not blobs:
        raise IndexCorruptedError(
            "Neither the record nor a snapshot says how wide its vectors are, so nothing can be "
            "recovered. Take a copy of the index, or make it again from the sources."
        )
    lost.append("the bundle and the embedding space: open the index with bundle=")
    dim = snapshots[0].vectors.shape[1] if snapshots else blobs[0][0] // 2
    # Bounds of what is there: a row takes a few dozen bytes at least.
    most = (folder / RECORD).stat().st_size // 24
    keys = max([most, *(int(each.keys.max()) for each in snapshots)])
    last_row = max([most, *(int(each.rows.max()) for each in snapshots)])
    return About(uuid.uuid4().hex, dim, None, None, None, version=1 << 40, keys=keys, rows=last_row)


def _highest(old: sqlite3.Connection, sql: str, otherwise: int) -> int:
    with suppress(sqlite3.Error):
        return int(old.execute(sql).fetchone()[0] or 0)
    return otherwise


def _rows(old: sqlite3.Connection, sql: str, highest: int) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a table by ranges of its key, halving those that cannot be read."""
    failures = 0
    for start in range(1, highest + 1, _AT_ONCE):
        ranges = [(start, min(start + _AT_ONCE - 1, highest))]
        while ranges and failures < _FAILURES:
            low, high = ranges.pop()
            try:
                found = old.execute(sql, (low, high)).fetchall()
            except (sqlite3.Error, UnicodeDecodeError):
                failures += 1
                if low < high:
                    middle = (low + high) // 2
                    ranges += [(middle + 1, high), (low, middle)]
                continue
            yield from found


def _readable(old: sqlite3.Connection, sql: str) -> list[tuple[Any, ...]]:
    """Return the rows of a statement up to the first that cannot be read."""
    found = []
    with suppress(sqlite3.Error, UnicodeDecodeError):
        for row in old.execute(sql):
            found.append(row)  # noqa: PERF402, what came before an error counts
    return found


def _snapshots(folder: Path) -> Iterator[Snapshot]:
    """Yield the snapshots whose checksums hold, the newest first."""
    for path in sorted((folder / SNAPSHOTS).glob("*.f16"), reverse=True):
        with suppress(IndexCorruptedError, OSError):
            owner, dim, crc = snapshot_header(path)
            opened = open_snapshot(path, owner, dim, crc)
            if vectors_crc(opened.vectors) == opened.vectors_crc:
                yield opened


def _vectors(
    old: sqlite3.Connection, about: About, snapshots: list[Snapshot], keys: set[int]
) -> _Vectors:
    """Return the vectors of items: the record's, and for those it lost the snapshots'."""
    found: _Vectors = defaultdict(dict)
    sql = "SELECT row, key, part, epoch, vector, crc FROM vectors WHERE row BETWEEN ? AND ?"
    highest = _highest(old, "SELECT max(row) FROM vectors", about.rows)
    for row, key, part, epoch, blob, crc in _rows(old, sql, highest):
        usable = key in keys and epoch == about.epoch and _fits(blob, about.dim)
        if usable and vector_crc(key, part, blob) == crc:
            found[key][part] = (row, blob)
    gone = {row for (row,) in _readable(old, "SELECT row FROM gone")}
    from_record = {(key, part) for key, parts in found.items() for part in parts}
    for snapshot in snapshots:
        if snapshot.vectors.shape[1] != about.dim:
            continue
        wanted = np.isin(snapshot.keys, list(keys)) & ~np.isin(snapshot.rows, list(gone))
        for place in np.flatnonzero(wanted):
            key, part = int(snapshot.keys[place]), int(snapshot.parts[place])
            row = int(snapshot.rows[place])
            newest = found[key].get(part, (-1, b""))[0]
            if (key, part) not in from_record and newest < row:
                found[key][part] = (row, snapshot.vectors[place].tobytes())
    return {key: parts for key, parts in found.items() if parts}


def _fits(blob: object, dim: int) -> bool:
    return isinstance(blob, bytes) and len(blob) == 2 * dim


def _missing_parts(items: dict[int, tuple[Any, ...]], vectors: _Vectors) -> list[str]:
    return [
        f"item {row[1]!r}: {max(vectors[key]) + 1 - len(vectors[key])} of its vectors"
        for key, row in items.items()
        if max(vectors[key]) + 1 != len(vectors[key])
    ]


def _bare_item(key: int, name: str, about: About) -> tuple[Any, ...]:
    """Return a row of `items` of an id alone, older than what any other store has of it."""
    values = (name, None, None, None, "{}", None, None)
    return (key, *values, 1, about.uuid, None, item_crc(values))
