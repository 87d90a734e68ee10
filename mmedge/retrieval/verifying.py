"""Checks of an index on disk, and the repair of what can be derived again."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmedge.errors import IndexCorruptedError
from mmedge.retrieval import rows, upkeep
from mmedge.retrieval.record import Record
from mmedge.retrieval.salvage import salvage_record
from mmedge.retrieval.schema import SNAPSHOTS, About, check_folder, read_about
from mmedge.retrieval.snapshots import Block, Snapshot, open_snapshot, snapshot_path, vectors_crc
from mmedge.retrieval.view import read_blocks
from mmedge.retrieval.widths import Widths

__all__ = ["Verification", "verify_index"]

_SHOWN = 20  # problems of a kind


@dataclass(frozen=True, slots=True)
class Verification:
    """What a check of an index found and what a repair did.

    Attributes:
        problems: What is damaged; empty if nothing is.
        repaired: What was done about it; empty without `repair`.
        lost: What could not be recovered: ids where these are known.
    """

    problems: tuple[str, ...] = ()
    repaired: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the index is whole, now that repairs are done."""
        return not self.problems or bool(self.repaired)


def verify_index(path: Path | str, *, repair: bool = False) -> Verification:
    """Read every page, item and vector of an index and check them by their checksums.

    A repair makes derived files again from the record: snapshots, the full-text index. A damaged
    record is read as far as it can be, vectors from the snapshots where the record's are lost, into
    a new folder that takes the index's place in one step. The damaged record stays in it as
    `damaged/`; remove that when it is not needed any more. Vectors that lay in lists do so again,
    measured with the queries of the last time.

    Args:
        path: The index's folder; it may be open elsewhere, and handles follow a repair.
        repair: Whether to repair what is damaged.

    Raises:
        RetrievalError: If it is no index, is of a newer format, or another process goes on writing.
        StorageError: If it cannot be read, or for a repair, written.
        IndexCorruptedError: If nothing of a damaged record can be read.
    """
    folder = Path(path)
    check_folder(folder)
    bad_record, bad_words, bad_snapshots = _problems(folder)
    problems = (*bad_record, *bad_words, *(text for _, text in bad_snapshots))
    if not problems or not repair:
        return Verification(problems)
    repaired, lost = [], []
    if bad_record:
        lost += salvage_record(folder)
        repaired.append("recovered the record into a new one; the old one is in damaged/")
    with Record(folder) as record:
        if bad_words and not bad_record:
            _rebuild_words(record)
            repaired.append("made the full-text index again")
        if bad_record:
            upkeep.compact(record)
        elif bad_snapshots:
            upkeep.write_from(record, min(row for row, _ in bad_snapshots))
        if bad_record or bad_snapshots:
            repaired.append("wrote the snapshots again")
    return Verification(problems, tuple(repaired), tuple(lost))


def _problems(folder: Path) -> tuple[list[str], list[str], list[tuple[int, str]]]:
    """Return problems of the record, of its full-text index, and of snapshots by first row."""
    try:
        with Record(folder, read_only=True) as record, record.reading() as connection:
            bad = [
                f"record.sqlite: {text}"
                for (text,) in connection.execute(f"PRAGMA integrity_check({_SHOWN})")
                if text != "ok"
            ]
            if bad:
                return bad, [], []
            about = read_about(connection)
            bad = [*_bad_items(connection, about), *_bad_vectors(connection, about)][:_SHOWN]
            if bad:
                return bad, [], []
            return [], _bad_words(connection), list(_bad_snapshots(connection, about, folder))
    except IndexCorruptedError as error:
        return [str(error)], [], []


def _bad_items(connection: sqlite3.Connection, about: About) -> Iterator[str]:
    counted = connection.execute("SELECT count(*) FROM items").fetchone()[0]
    if counted != about.items:
        yield f"record.sqlite: has {counted} items, and says that it has {about.items}"
    numbers = connection.execute(
        """SELECT (SELECT max(key) FROM items), (SELECT max(row) FROM vectors),
        (SELECT max(seq) FROM items), (SELECT max(seq) FROM deletions)"""
    ).fetchone()
    for name, highest in zip(("keys", "rows", "seq", "seq"), numbers, strict=True):
        if highest is not None and highest > getattr(about, name):
            yield f"record.sqlite: counts {name} to {getattr(about, name)}, and has {highest}"
    after = 0
    while True:
        found = connection.execute(
            "SELECT key FROM items WHERE key > ? ORDER BY key LIMIT 1000", (after,)
        ).fetchall()
        if not found:
            return
        after = found[-1][0]
        try:
            rows.read_items(connection, [key for (key,) in found], vectors=False)
        except IndexCorruptedError as error:
            yield str(error)


def _bad_vectors(connection: sqlite3.Connection, about: About) -> Iterator[str]:
    for _ in read_blocks(connection, about, 0):
        pass  # raises where a checksum differs
    strays = connection.execute(
        "SELECT count(*) FROM vectors WHERE key NOT IN (SELECT key FROM items)"
    ).fetchone()[0]
    if strays:
        yield f"record.sqlite: {strays} vectors belong to no item"
    for (name,) in connection.execute(
        """SELECT id FROM items WHERE NOT EXISTS
        (SELECT 1 FROM vectors WHERE vectors.key = items.key AND epoch = ?) LIMIT ?""",
        (about.epoch, _SHOWN),
    ):
        yield f"record.sqlite: item {name!r} has no vector"


def _bad_words(connection: sqlite3.Connection) -> list[str]:
    indexed = connection.execute("SELECT count(*) FROM words_docsize").fetchone()[0]
    texts = connection.execute("SELECT count(*) FROM items WHERE text IS NOT NULL").fetchone()[0]
    if indexed != texts:
        return [f"record.sqlite: {texts} items have a text, and {indexed} are in the text index"]
    return []


def _rebuild_words(record: Record) -> None:
    with record.writing() as connection:
        connection.execute("INSERT INTO words(words) VALUES ('delete-all')")
        connection.execute(
            "INSERT INTO words(rowid, text) SELECT key, text FROM items WHERE text IS NOT NULL"
        )


def _bad_snapshots(
    connection: sqlite3.Connection, about: About, folder: Path
) -> Iterator[tuple[int, str]]:
    gone = [row for (row,) in connection.execute("SELECT row FROM gone")]
    for number, first, last, crc, widths in connection.execute(
        "SELECT number, first_row, last_row, crc, widths FROM snapshots ORDER BY first_row"
    ).fetchall():
        path = snapshot_path(folder / SNAPSHOTS, number)
        try:
            opened = open_snapshot(path, about.uuid, about.dim, crc)
            if widths is not None:
                Widths.from_json(str(widths))
        except FileNotFoundError:
            yield first, f"{path} is missing"
            continue
        except IndexCorruptedError as error:
            yield first, str(error)
            continue
        if vectors_crc(opened.vectors) != opened.vectors_crc:
            yield first, f"{path}: the checksum of its vectors differs"
        elif not _same(opened, read_blocks(connection, about, first - 1, last), gone):
            yield first, f"{path}: its vectors are not those of the record"


def _same(snapshot: Snapshot, blocks: Iterator[Block], gone: list[int]) -> bool:
    """Return whether a snapshot's rows that count are those of the record."""
    places: NDArray[np.int64] = np.flatnonzero(~np.isin(snapshot.rows, gone))
    places = places[np.argsort(snapshot.rows[places])]  # in lists they lie in another order
    start = 0
    for numbers, keys, parts, vectors in blocks:
        here = places[start : start + len(numbers)]
        start += len(numbers)
        if not (
            np.array_equal(snapshot.rows[here], numbers)
            and np.array_equal(snapshot.keys[here], keys)
            and np.array_equal(snapshot.parts[here], parts)
            and np.array_equal(snapshot.vectors[here], vectors)
        ):
            return False
    return start == len(places)
