"""The SQLite schema of an index, and opening a record that fits it.

Nothing in the file is trusted: a schema other than this one is refused before it is used, since a
planted trigger or view could run on an insert.
"""

from __future__ import annotations

import functools
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mmedge.errors import IndexCorruptedError, MmedgeError, RetrievalError, StorageError

__all__ = [
    "ABOUT",
    "BUSY_MS",
    "FORMAT",
    "LOCK",
    "MAX_DIM",
    "RECORD",
    "SNAPSHOTS",
    "About",
    "check_folder",
    "connect",
    "connect_unchecked",
    "create_record",
    "is_immutable",
    "read_about",
    "record_errors",
]

FORMAT = 2
RECORD = "record.sqlite"
SNAPSHOTS = "snapshots"
LOCK = "lock"
MAX_DIM = 65_536

_APPLICATION = 0x6D6D6564  # "mmed"
_PAGE_BYTES = 8192  # seven vectors of 512 dimensions; 4096 would leave a quarter of a page empty
_MAX_VALUE_BYTES = 256 << 20  # of one value in the record
_CHECKED_BYTES = 16 << 20  # a record up to this size is checked page by page when it is opened
BUSY_MS = 30_000

# One row. `version` counts transactions; `generation` changes when rows that readers hold no longer
# count as they did (compact, migrate); `epoch` is that of the vectors in use, and a migration
# collects its own under the next one. `forgotten` is the last change of the deletions that are no
# longer remembered, and `forgotten_us` their greatest revision; see deletions.py.
ABOUT = """CREATE TABLE about(
one INTEGER PRIMARY KEY CHECK(one = 1), uuid TEXT NOT NULL, dim INTEGER NOT NULL, space TEXT,
bundle TEXT, precision TEXT, version INTEGER NOT NULL, generation INTEGER NOT NULL,
epoch INTEGER NOT NULL, items INTEGER NOT NULL, keys INTEGER NOT NULL, rows INTEGER NOT NULL,
seq INTEGER NOT NULL, forgotten INTEGER NOT NULL, forgotten_us INTEGER NOT NULL,
next_dim INTEGER, next_space TEXT, next_bundle TEXT, next_precision TEXT)"""
_TABLES = {
    "about": ABOUT,
    "items": """CREATE TABLE items(
key INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, time REAL, source TEXT, text TEXT,
metadata TEXT NOT NULL, content_hash TEXT, modality TEXT, revision INTEGER NOT NULL,
origin TEXT NOT NULL, seq INTEGER NOT NULL, crc INTEGER NOT NULL)""",
    "deletions": """CREATE TABLE deletions(
id TEXT PRIMARY KEY, revision INTEGER NOT NULL, origin TEXT NOT NULL, seq INTEGER NOT NULL
) WITHOUT ROWID""",
    "vectors": """CREATE TABLE vectors(
row INTEGER PRIMARY KEY, key INTEGER NOT NULL, part INTEGER NOT NULL, epoch INTEGER NOT NULL,
vector BLOB NOT NULL, crc INTEGER NOT NULL)""",
    "gone": "CREATE TABLE gone(number INTEGER PRIMARY KEY, row INTEGER NOT NULL)",
    "snapshots": """CREATE TABLE snapshots(
number INTEGER PRIMARY KEY, first_row INTEGER NOT NULL, last_row INTEGER NOT NULL,
count INTEGER NOT NULL, crc INTEGER NOT NULL, widths TEXT)""",
    "queries": "CREATE TABLE queries(kind TEXT NOT NULL, vector BLOB NOT NULL)",
    "cursors": "CREATE TABLE cursors(name TEXT PRIMARY KEY, cursor TEXT NOT NULL) WITHOUT ROWID",
    "folders": "CREATE TABLE folders(path TEXT PRIMARY KEY) WITHOUT ROWID",
    "fields": "CREATE TABLE fields(name TEXT PRIMARY KEY) WITHOUT ROWID",
    "words": """CREATE VIRTUAL TABLE words USING fts5(
text, content='items', content_rowid='key', tokenize='unicode61 remove_diacritics 2')""",
}
_INDEXES = {
    "items_seq": "CREATE UNIQUE INDEX items_seq ON items(seq)",
    "items_time": "CREATE INDEX items_time ON items(time)",
    "deletions_seq": "CREATE UNIQUE INDEX deletions_seq ON deletions(seq)",
    "vectors_key": "CREATE INDEX vectors_key ON vectors(key)",
}
# The full-text table's own tables; their text depends on SQLite's version.
_WORD_TABLES = {f"words_{part}" for part in ("data", "idx", "docsize", "config")}


@dataclass(frozen=True, slots=True)
class About:
    """What an index says of itself; see ABOUT."""

    uuid: str
    dim: int
    space: str | None
    bundle: str | None
    precision: str | None
    version: int = 0
    generation: int = 0
    epoch: int = 0
    items: int = 0
    keys: int = 0
    rows: int = 0
    seq: int = 0
    forgotten: int = 0
    forgotten_us: int = 0
    next_dim: int | None = None
    next_space: str | None = None
    next_bundle: str | None = None
    next_precision: str | None = None


_ABOUT_COLUMNS = tuple(field.name for field in fields(About))
_READ_ABOUT = f"SELECT {', '.join(_ABOUT_COLUMNS)} FROM about"  # noqa: S608, names of this file
_COUNTERS = (
    *("dim", "version", "generation", "epoch", "items", "keys", "rows"),
    *("seq", "forgotten", "forgotten_us"),
)


def read_about(connection: sqlite3.Connection) -> About:
    """Read what an index says of itself.

    Raises:
        IndexCorruptedError: If it says nothing, or nonsense.
    """
    values = connection.execute(_READ_ABOUT).fetchone()
    if values is None:
        raise IndexCorruptedError("The record has no row in 'about'. " + _REPAIR)
    return _about(values)


@functools.lru_cache(maxsize=8)  # every search reads it, and it seldom changes
def _about(values: tuple[Any, ...]) -> About:
    named = dict(zip(_ABOUT_COLUMNS, values, strict=True))
    dims = (named["dim"], named["next_dim"] or 1)
    if (
        not all(isinstance(named[name], int) and named[name] >= 0 for name in _COUNTERS)
        or not all(isinstance(dim, int) and 1 <= dim <= MAX_DIM for dim in dims)
        or not isinstance(named["uuid"], str)
    ):
        raise IndexCorruptedError(f"The record's row in 'about' is damaged: {named}. {_REPAIR}")
    return About(*values)


_REPAIR = "Run 'mmedge index verify --repair', which recovers what can be read."


def create_record(folder: Path, about: About) -> None:
    """Write an empty record into a folder.

    Raises:
        StorageError: If the disk is full, or the folder cannot be written.
    """
    with record_errors(folder):
        connection = sqlite3.connect(folder / RECORD, isolation_level=None)
        try:
            connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # see Record.shrink
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
            for statement in (*_TABLES.values(), *_INDEXES.values()):
                connection.execute(statement)
            marks = ", ".join("?" * len(_ABOUT_COLUMNS))
            connection.execute(
                f"INSERT INTO about VALUES (1, {marks})",  # noqa: S608, question marks
                tuple(getattr(about, name) for name in _ABOUT_COLUMNS),
            )
            connection.execute("COMMIT")
        finally:
            connection.close()


def check_folder(folder: Path) -> None:
    """Check that a folder looks like an index and holds no links.

    Raises:
        RetrievalError: If it is no folder, or holds no record.
        IndexCorruptedError: If an entry is a link or no regular file.
        StorageError: If it cannot be read.
    """
    try:
        record = _mode(folder / RECORD) if folder.is_dir() else None
        if record is None:
            what = "is a folder without" if folder.is_dir() else "is no folder with"
            there = what if os.path.lexists(folder) else "does not exist, so there is no"
            raise RetrievalError(
                f"{folder}: no index; it {there} {RECORD}. Name the folder that Index.create made."
            )
        for name in (RECORD, f"{RECORD}-wal", f"{RECORD}-shm", f"{RECORD}-journal", LOCK):
            _check_mode(folder / name, _mode(folder / name), stat.S_IFREG)
        snapshots = folder / SNAPSHOTS
        mode = _mode(snapshots)
        _check_mode(snapshots, mode, stat.S_IFDIR)
        for entry in snapshots.iterdir() if mode is not None else ():
            _check_mode(entry, _mode(entry), stat.S_IFREG)
    except OSError as error:
        raise StorageError(
            f"Cannot read the index {folder}: {error.strerror}. Check its permissions."
        ) from error


def _mode(path: Path) -> int | None:
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return None


def _check_mode(path: Path, mode: int | None, wanted: int) -> None:
    if mode is not None and stat.S_IFMT(mode) != wanted:
        what = "a link" if stat.S_ISLNK(mode) else "not what belongs there"
        raise IndexCorruptedError(
            f"{path} is {what}; mmedge never writes one there, and does not follow it. Remove it "
            "if you did not put it there, or copy the index again."
        )


def connect(folder: Path, *, writable: bool) -> sqlite3.Connection:
    """Open an index's record and check its format and schema.

    Args:
        folder: Of the index, checked by check_folder.
        writable: Whether the connection may write.

    Returns:
        A connection in autocommit mode that any one thread at a time may use.

    Raises:
        RetrievalError: If the file is not an index, or one of a newer format.
        IndexCorruptedError: If it is damaged, or its schema was changed.
        StorageError: If it cannot be read or written.
    """
    path = folder / RECORD
    query = "mode=rw" if writable else "mode=ro"
    if not writable and is_immutable(folder):
        query += "&immutable=1"
    with record_errors(folder):
        connection = sqlite3.connect(
            f"file:{quote(str(path.absolute()))}?{query}",
            uri=True,
            timeout=BUSY_MS / 1000,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            _settle(connection, writable=writable)
            _check(connection, folder)
        except BaseException:
            connection.close()
            raise
    return connection


def connect_unchecked(folder: Path) -> sqlite3.Connection:
    """Open a damaged record for reading; its schema may be anything."""
    path = quote(str((folder / RECORD).absolute()))
    with record_errors(folder):
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
        _settle(connection, writable=False)
    return connection


def is_immutable(folder: Path) -> bool:
    """Return whether nobody writes an index and this user cannot.

    Its record is then read as it is, since SQLite could not make its shared memory beside it.
    """
    return not os.access(folder, os.W_OK) and not os.path.lexists(folder / f"{RECORD}-wal")


def _settle(connection: sqlite3.Connection, *, writable: bool) -> None:
    # Python's sqlite3 loads no extensions unless asked to.
    if hasattr(connection, "setlimit"):
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute("PRAGMA temp_store = MEMORY")
    if writable:
        connection.execute("PRAGMA secure_delete = FAST")
        connection.execute("PRAGMA journal_size_limit = 67108864")
    else:
        connection.execute("PRAGMA query_only = ON")


def _check(connection: sqlite3.Connection, folder: Path) -> None:
    application, version = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("application_id", "user_version")
    )
    if application != _APPLICATION:
        raise RetrievalError(
            f"{folder / RECORD} is a SQLite file of another program (application id "
            f"{application}). Name the folder that Index.create made."
        )
    if version != FORMAT:
        advice = "Update mmedge." if version > FORMAT else "Make the index again."
        raise RetrievalError(
            f"{folder} has index format {version}, and this mmedge reads {FORMAT}. {advice}"
        )
    found = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    schema = {name: sql for name, sql in found if name not in _WORD_TABLES}
    expected = _TABLES | _INDEXES
    if schema != expected:
        wrong = sorted(
            str(name)
            for name in schema.keys() | expected.keys()
            if schema.get(name) != expected.get(name)
        )
        raise IndexCorruptedError(
            f"{folder}: the schema of {RECORD} differs from format {FORMAT} in {wrong[:5]}: it "
            "was changed after Index.create, so it is not used. Copy or make the index again."
        )
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    size = connection.execute("PRAGMA page_size").fetchone()[0]
    if pages * size <= _CHECKED_BYTES:
        reports = connection.execute("PRAGMA quick_check(3)").fetchall()
        if reports != [("ok",)]:
            raise IndexCorruptedError(
                f"{folder / RECORD} is damaged: {'; '.join(str(report[0]) for report in reports)}. "
                + _REPAIR
            )


@contextmanager
def record_errors(folder: Path) -> Iterator[None]:
    """Turn SQLite's errors into those of mmedge.

    Raises:
        IndexCorruptedError: If the record is damaged.
        StorageError: If the disk is full, read-only or fails.
        RetrievalError: If another program keeps the record locked, or it was closed.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise _translated(error, folder / RECORD) from error


def _translated(error: sqlite3.Error, path: Path) -> MmedgeError:
    # By its text: Python 3.10 has no error codes.
    text = str(error)
    if "malformed" in text or "is not a database" in text or "corrupt" in text:
        return IndexCorruptedError(f"{path} is damaged: {text}. {_REPAIR}")
    if "is full" in text:
        return StorageError(
            f"Cannot write {path}: the disk is full. Free some space; nothing of "
            "this call was written."
        )
    if "readonly" in text:
        return StorageError(
            f"Cannot write {path}: it or its file system is read-only. Change the permissions, or "
            "open the index with read_only=True."
        )
    if "locked" in text:
        return RetrievalError(
            f"{path} is locked by another program for more than {BUSY_MS // 1000} s. Close it "
            "there."
        )
    if "unable to open" in text or "I/O error" in text:
        return StorageError(
            f"Cannot use {path}: {text}. Check the permissions and the disk it lies on."
        )
    return RetrievalError(f"{path}: {text}.")
