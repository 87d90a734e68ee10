"""Items and vectors in the record: SQL inside a transaction of the caller's."""

from __future__ import annotations

import json
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np

from mmedge.errors import IndexCorruptedError
from mmedge.retrieval.items import Item, Metadata
from mmedge.retrieval.schema import About, read_about
from mmedge.specs import Float32Array

__all__ = [
    "Fields",
    "ItemRow",
    "Stored",
    "check_vector",
    "checked_fields",
    "delete_items",
    "insert_items",
    "item_crc",
    "now_us",
    "read_deletions",
    "read_fields",
    "read_items",
    "read_stored",
    "read_vectors",
    "remember_deletions",
    "replace_vectors",
    "update_fields",
    "vector_crc",
]

_AT_ONCE = 500  # parameters of one statement
_T = TypeVar("_T", str, int)
_TEXT, _NUMBER = (str, type(None)), (float, int, type(None))

_COVERED_COLUMNS = "id, time, source, text, metadata, content_hash, modality"
_ITEM_COLUMNS = f"key, {_COVERED_COLUMNS}, revision, origin, seq, crc"


@dataclass(frozen=True, slots=True)
class ItemRow:
    """A row of `items`, its metadata parsed."""

    key: int
    item: Item
    modality: str | None
    seq: int


Fields: TypeAlias = tuple[str, float | None, str | None, str | None, Metadata]
"""Id, time, source, text and metadata of an item."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What a write must know of an item that is there."""

    key: int
    revision: int
    origin: str


def now_us() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


def vector_crc(key: int, part: int, vector: bytes) -> int:
    """Checksum of a row of `vectors`."""
    return zlib.crc32(vector, (key * 2_654_435_761 + part) & 0xFFFFFFFF)


def item_crc(values: tuple[object, ...]) -> int:
    """Checksum of a row of `items`: of id, time, source, text, metadata, hash and modality."""
    return zlib.crc32(repr(values).encode("utf-8", "surrogatepass"))


def read_stored(connection: sqlite3.Connection, ids: Iterable[str]) -> dict[str, Stored]:
    """Return the stored ones of some items by id."""
    found: dict[str, Stored] = {}
    for part, marks in _parts(ids):
        sql = f"SELECT id, key, revision, origin FROM items WHERE id IN ({marks})"  # noqa: S608
        for name, key, revision, origin in connection.execute(sql, part):
            found[name] = Stored(key, revision, origin)
    return found


def read_deletions(
    connection: sqlite3.Connection, ids: Iterable[str]
) -> dict[str, tuple[int, str]]:
    """Return revision and origin of the deletions of some ids."""
    found: dict[str, tuple[int, str]] = {}
    for part, marks in _parts(ids):
        sql = f"SELECT id, revision, origin FROM deletions WHERE id IN ({marks})"  # noqa: S608
        for name, revision, origin in connection.execute(sql, part):
            found[name] = (revision, origin)
    return found


def read_items(
    connection: sqlite3.Connection, keys: Iterable[int], *, vectors: bool
) -> dict[int, ItemRow]:
    """Return items by key.

    Args:
        connection: In a transaction.
        keys: Of the items; those that are not there are left out.
        vectors: Whether their vectors are read; (0, D) otherwise.

    Raises:
        IndexCorruptedError: If a row is damaged.
    """
    keys = list(keys)
    about = read_about(connection)
    held = read_vectors(connection, about, keys) if vectors else {}
    none = np.empty((0, about.dim), np.float32)
    rows: dict[int, ItemRow] = {}
    for part, marks in _parts(keys):
        sql = f"SELECT {_ITEM_COLUMNS} FROM items WHERE key IN ({marks})"  # noqa: S608
        for values in connection.execute(sql, part):
            key, *covered, revision, origin, seq, crc = values
            name, seconds, source, text, metadata = _fields(key, covered, crc)
            digest, modality = covered[5:]
            vector = held.get(key, none)
            item = Item(
                name, vector, seconds, source, text, metadata, digest, int(revision), str(origin)
            )
            rows[key] = ItemRow(int(key), item, modality, int(seq))
    return rows


def read_fields(connection: sqlite3.Connection, keys: Iterable[int]) -> dict[int, Fields]:
    """Return what a match shows of items, by key.

    Args:
        connection: In a transaction.
        keys: Of the items; those that are not there are left out.

    Raises:
        IndexCorruptedError: If a row is damaged.
    """
    found: dict[int, Fields] = {}
    for part, marks in _parts(keys):
        sql = f"SELECT key, {_COVERED_COLUMNS}, crc FROM items WHERE key IN ({marks})"  # noqa: S608
        for key, *covered, crc in connection.execute(sql, part):
            found[key] = _fields(key, covered, crc)
    return found


def _fields(key: int, covered: Sequence[Any], crc: int) -> Fields:
    fields = checked_fields(covered, crc)
    if fields is None:
        raise _damaged(f"item {covered[0]!r} (key {key})")
    return fields


def checked_fields(covered: Sequence[Any], crc: object) -> Fields | None:
    """Return the fields of an item from the columns that its checksum covers; None if damaged.

    The types are checked as well: a stranger's record may have checksums that were made to fit.
    """
    name, seconds, source, text, metadata, digest, modality = covered
    if (
        item_crc(tuple(covered)) != crc
        or not isinstance(name, str)
        or not all(isinstance(each, _TEXT) for each in (source, text, digest, modality))
        or not isinstance(seconds, _NUMBER)
    ):
        return None
    try:
        read = json.loads(metadata)
    except (ValueError, TypeError, RecursionError):
        return None
    return (name, seconds, source, text, read) if isinstance(read, dict) else None


def read_vectors(
    connection: sqlite3.Connection, about: About, keys: Iterable[int]
) -> dict[int, Float32Array]:
    """Return the (V, D) float32 vectors of items by key.

    Raises:
        IndexCorruptedError: If a row is damaged.
    """
    found: dict[int, list[bytes]] = {}
    for part, marks in _parts(keys):
        sql = f"""SELECT row, key, part, vector, crc FROM vectors
            WHERE key IN ({marks}) AND epoch = ? ORDER BY key, part"""  # noqa: S608
        for row, key, number, vector, crc in connection.execute(sql, (*part, about.epoch)):
            check_vector(about, row, key, number, vector, crc)
            found.setdefault(key, []).append(vector)
    return {
        key: np.frombuffer(b"".join(blobs), np.float16).reshape(-1, about.dim).astype(np.float32)
        for key, blobs in found.items()
    }


def check_vector(about: About, row: int, key: int, part: int, vector: bytes, crc: int) -> None:
    """Check a row of `vectors`.

    Raises:
        IndexCorruptedError: If its length or checksum is wrong.
    """
    if (
        not isinstance(vector, bytes)
        or len(vector) != 2 * about.dim
        or vector_crc(key, part, vector) != crc
    ):
        raise _damaged(f"vector row {row} (item key {key}, part {part})")


def _damaged(what: str) -> IndexCorruptedError:
    return IndexCorruptedError(
        f"The record's {what} is damaged: its checksum differs. Run 'mmedge index verify "
        "--repair', which recovers what can be read."
    )


def insert_items(
    connection: sqlite3.Connection, items: Sequence[Item], modality: str | None
) -> None:
    """Insert new items; an earlier deletion of one is forgotten.

    Args:
        connection: In a write transaction.
        items: None of them stored; vectors (V, D) float32, L2-normalised, V at least 1.
        modality: What they are encoded from, None for ready vectors.
    """
    about = read_about(connection)
    rows, texts = [], []
    names: set[str] = set()
    for number, item in enumerate(items, 1):
        key = about.keys + number
        values = _values(item, modality)
        rows.append(
            (key, *values, item.revision, item.origin, about.seq + number, item_crc(values))
        )
        names.update(item.metadata)
        if item.text is not None:
            texts.append((key, item.text))
    connection.executemany(f"INSERT INTO items VALUES ({_marks(12)})", rows)  # noqa: S608
    connection.executemany("INSERT INTO words(rowid, text) VALUES (?, ?)", texts)
    connection.executemany("INSERT OR IGNORE INTO fields VALUES (?)", [(name,) for name in names])
    connection.executemany("DELETE FROM deletions WHERE id = ?", [(item.id,) for item in items])
    connection.execute(
        "UPDATE about SET items = items + ?, keys = keys + ?, seq = seq + ?", (len(items),) * 3
    )
    keyed = [(about.keys + number, item.vectors) for number, item in enumerate(items, 1)]
    _insert_vectors(connection, about.epoch, keyed)


def _values(item: Item, modality: str | None) -> tuple[object, ...]:
    """Return the columns that the checksum covers."""
    metadata = json.dumps(dict(item.metadata), ensure_ascii=False, separators=(",", ":"))
    seconds = None if item.time is None else item.time + 0.0  # SQLite keeps no negative zero
    return item.id, seconds, item.source, item.text, metadata, item.content_hash, modality


def _insert_vectors(
    connection: sqlite3.Connection, epoch: int, keyed: Iterable[tuple[int, Float32Array]]
) -> None:
    row = read_about(connection).rows
    rows = []
    for key, vectors in keyed:
        for part, vector in enumerate(vectors.astype(np.float16)):
            row += 1
            blob = vector.tobytes()
            rows.append((row, key, part, epoch, blob, vector_crc(key, part, blob)))
    connection.executemany("INSERT INTO vectors VALUES (?, ?, ?, ?, ?, ?)", rows)
    connection.execute("UPDATE about SET rows = ?", (row,))


def replace_vectors(
    connection: sqlite3.Connection, keyed: Sequence[tuple[int, Float32Array]], *, epoch: int
) -> None:
    """Give items other vectors; those that a migration has collected are dropped as well.

    Args:
        connection: In a write transaction.
        keyed: Item key and (V, D) float32 vectors.
        epoch: That of the vectors in use, or of a migration, which leaves those in use alone.
    """
    about = read_about(connection)
    keys = [key for key, _ in keyed]
    if epoch == about.epoch:
        _drop_vectors(connection, about, keys)
    else:
        connection.executemany(
            "DELETE FROM vectors WHERE key = ? AND epoch = ?", [(key, epoch) for key in keys]
        )
    _insert_vectors(connection, epoch, keyed)


def _drop_vectors(connection: sqlite3.Connection, about: About, keys: Iterable[int]) -> None:
    for part, marks in _parts(keys):
        connection.execute(
            f"""INSERT INTO gone(row) SELECT row FROM vectors
            WHERE key IN ({marks}) AND epoch = ?""",  # noqa: S608
            (*part, about.epoch),
        )
        connection.execute(f"DELETE FROM vectors WHERE key IN ({marks})", part)  # noqa: S608


def delete_items(
    connection: sqlite3.Connection, stored: dict[str, tuple[Stored, int, str]]
) -> None:
    """Delete items and remember the deletions.

    Args:
        connection: In a write transaction.
        stored: By id: the item, and revision and origin of its deletion.
    """
    about = read_about(connection)
    keys = [held.key for held, _, _ in stored.values()]
    _drop_vectors(connection, about, keys)
    _drop_words(connection, keys)
    connection.executemany("DELETE FROM items WHERE key = ?", [(key,) for key in keys])
    remember_deletions(
        connection, {name: (revision, origin) for name, (_, revision, origin) in stored.items()}
    )
    connection.execute("UPDATE about SET items = items - ?", (len(keys),))


def remember_deletions(
    connection: sqlite3.Connection, deletions: Mapping[str, tuple[int, str]]
) -> None:
    """Record deletions of ids, each with its revision and origin, for `changes`."""
    seq = read_about(connection).seq
    connection.executemany(
        "INSERT OR REPLACE INTO deletions(id, revision, origin, seq) VALUES (?, ?, ?, ?)",
        [(name, *after, seq + number) for number, (name, after) in enumerate(deletions.items(), 1)],
    )
    connection.execute("UPDATE about SET seq = seq + ?", (len(deletions),))


def update_fields(
    connection: sqlite3.Connection, changed: Sequence[tuple[int, Item, str | None]]
) -> None:
    """Rewrite all of some items but their vectors.

    Args:
        connection: In a write transaction.
        changed: Key, the item as it is to be, and the modality it is encoded from.
    """
    seq = read_about(connection).seq
    _drop_words(connection, [key for key, _, _ in changed])
    rows, texts = [], []
    names: set[str] = set()
    for number, (key, item, modality) in enumerate(changed, 1):
        values = _values(item, modality)
        crc = item_crc(values)
        rows.append((*values[1:], item.revision, item.origin, seq + number, crc, key))
        names.update(item.metadata)
        if item.text is not None:
            texts.append((key, item.text))
    connection.executemany(
        """UPDATE items SET time = ?, source = ?, text = ?, metadata = ?, content_hash = ?,
        modality = ?, revision = ?, origin = ?, seq = ?, crc = ? WHERE key = ?""",
        rows,
    )
    connection.executemany("INSERT INTO words(rowid, text) VALUES (?, ?)", texts)
    connection.executemany("INSERT OR IGNORE INTO fields VALUES (?)", [(name,) for name in names])
    connection.execute("UPDATE about SET seq = seq + ?", (len(changed),))


def _drop_words(connection: sqlite3.Connection, keys: Iterable[int]) -> None:
    for part, marks in _parts(keys):
        connection.execute(
            f"""INSERT INTO words(words, rowid, text) SELECT 'delete', key, text FROM items
            WHERE key IN ({marks}) AND text IS NOT NULL""",  # noqa: S608
            part,
        )


def _parts(values: Iterable[_T]) -> Iterator[tuple[list[_T], str]]:
    """Yield values some hundred at a time, and their question marks."""
    held = list(values)
    for start in range(0, len(held), _AT_ONCE):
        part = held[start : start + _AT_ONCE]
        yield part, _marks(len(part))


def _marks(count: int) -> str:
    return ", ".join("?" * count)
