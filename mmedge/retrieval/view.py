"""One consistent state of an index in memory, and how it follows the record."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmedge.errors import IndexCorruptedError
from mmedge.retrieval.lists import Lists
from mmedge.retrieval.record import LOG
from mmedge.retrieval.rows import check_vector
from mmedge.retrieval.schema import SNAPSHOTS, About, read_about
from mmedge.retrieval.snapshots import Block, open_snapshot, snapshot_path
from mmedge.retrieval.widths import Widths
from mmedge.specs import Array

__all__ = ["Bitmap", "Segment", "StaleError", "View", "Views", "read_blocks"]

_ROWS_AT_ONCE = 4096


class StaleError(Exception):
    """The transaction is older than what is in memory; begin another."""


@dataclass(frozen=True, slots=True, eq=False)
class Bitmap:
    """A set of rows, a bit each.

    Attributes:
        first_row: Row of the first bit.
        bits: Packed, the lowest bit of a byte first, as faiss expects.
    """

    first_row: int
    bits: NDArray[np.uint8]

    def has(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return for each row whether it is in the set; none beyond the last bit is."""
        places = rows - self.first_row
        inside = (places >= 0) & (places < 8 * len(self.bits))
        places = np.where(inside, places, 0)
        if not len(self.bits):
            return inside
        held: NDArray[np.bool_] = inside & (self.bits[places >> 3] >> (places & 7) & 1).astype(bool)
        return held


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Vectors that are searched together.

    Attributes:
        vectors: (N, D) float16, L2-normalised; mapped, or in memory.
        rows: (N,) int64, ascending where there are no lists.
        keys: (N,) int64, item of each row.
        parts: (N,) int32, which of the item's vectors it is.
        number: Of its snapshot; None for the tail, which is behind the last snapshot.
        lists: In which the vectors lie, if an approximate search is possible.
        widths: Which width of a search reaches which recall.
        order: (N,) int64, places in the order of rows; None where they lie in it.
    """

    vectors: NDArray[np.float16]
    rows: NDArray[np.int64]
    keys: NDArray[np.int64]
    parts: NDArray[np.int32]
    number: int | None = None
    lists: Lists | None = None
    widths: Widths | None = None
    order: NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """One consistent state of an index; never changed.

    Attributes:
        about: What the index says of itself at that moment.
        segments: Snapshots, then the tail; some may be empty.
        alive: The rows that count; a segment also holds rows that were deleted since.
        damaged: Snapshots that could not be used, and were read from the record instead.
    """

    about: About
    segments: tuple[Segment, ...]
    alive: Bitmap
    damaged: tuple[str, ...] = ()
    last_gone: int = field(default=0, repr=False)

    @property
    def dim(self) -> int:
        """D, the length of a vector."""
        return self.about.dim

    def vectors_of(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """Return the (N, D) vectors of rows of this view."""
        found = np.zeros((len(rows), self.dim), np.float16)
        for segment in self.segments:
            places = np.searchsorted(segment.rows, rows, sorter=segment.order)
            here = places < len(segment.rows)
            held = places[here] if segment.order is None else segment.order[places[here]]
            same = segment.rows[held] == rows[here]
            here[here] = same
            found[here] = segment.vectors[held[same]]
        return found


def read_blocks(
    connection: sqlite3.Connection, about: About, after: int, until: int | None = None
) -> Iterator[Block]:
    """Yield the vectors of rows > after, and <= until if given, from the record.

    Raises:
        IndexCorruptedError: If a row is damaged.
    """
    cursor = connection.execute(
        """SELECT row, key, part, vector, crc FROM vectors
        WHERE row > ? AND row <= ? AND epoch = ? ORDER BY row""",
        (after, about.rows if until is None else until, about.epoch),
    )
    while rows := cursor.fetchmany(_ROWS_AT_ONCE):
        for row in rows:
            check_vector(about, *row)
        numbers, keys, parts, vectors, _ = zip(*rows, strict=True)
        yield (
            np.array(numbers, np.int64),
            np.array(keys, np.int64),
            np.array(parts, np.int32),
            np.frombuffer(b"".join(vectors), np.float16).reshape(-1, about.dim),
        )


class Views:
    """Keeps the newest view; safe in several threads.

    Args:
        folder: Of the index.
    """

    def __init__(self, folder: Path) -> None:
        self._snapshots = folder / SNAPSHOTS
        self._lock = threading.Lock()
        self._view: View | None = None
        self._tail = _Tail(1)
        self._missing = -1  # version of the index at which a file was not there

    def at(self, connection: sqlite3.Connection) -> View:
        """Return the view of a connection's read transaction.

        Raises:
            StaleError: If a newer one is in memory, or a snapshot is gone that the transaction
                names: a compaction replaced it meanwhile.
            IndexCorruptedError: If the record is damaged.
        """
        about = read_about(connection)
        view = self._view
        if view is not None and (view.about is about or view.about == about):
            return view
        with self._lock:
            view = self._view
            if view is None or view.about.uuid != about.uuid:
                view = self._load(connection, about)
            elif view.about.version > about.version:
                raise StaleError
            elif view.about.generation != about.generation:
                view = self._load(connection, about)
            else:
                view = self._advance(connection, about, view)
            self._view = view
            return view

    def _load(self, connection: sqlite3.Connection, about: About) -> View:
        segments, damaged = self._segments(connection, about, {})
        self._tail = _Tail(about.dim)
        last = _last_row(connection)
        self._tail.extend(read_blocks(connection, about, last))
        segments.append(self._tail.segment(last))
        first = min(
            (int(each.rows.min()) for each in segments if len(each.rows)), default=about.rows
        )
        bits = np.zeros(max(0, about.rows - first) + 1, np.bool_)
        for segment in segments:
            bits[segment.rows - first] = True
        gone, last_gone = _gone(connection, 0)
        bits[gone[(gone >= first) & (gone <= about.rows)] - first] = False
        alive = Bitmap(first, np.packbits(bits, bitorder="little"))
        return View(about, tuple(segments), alive, damaged, last_gone)

    def _advance(self, connection: sqlite3.Connection, about: About, view: View) -> View:
        known = {each.number: each for each in view.segments if each.number is not None}
        segments, damaged = self._segments(connection, about, known)
        blocks = list(read_blocks(connection, about, view.about.rows))
        self._tail.extend(blocks)
        segments.append(self._tail.segment(_last_row(connection)))
        gone, last_gone = _gone(connection, view.last_gone)
        alive = _amended(view.alive, about.rows, [block[0] for block in blocks], gone)
        return View(about, tuple(segments), alive, damaged, last_gone)

    def _segments(
        self, connection: sqlite3.Connection, about: About, known: dict[int, Segment]
    ) -> tuple[list[Segment], tuple[str, ...]]:
        segments, damaged = [], []
        for number, first, last, crc, widths in connection.execute(
            "SELECT number, first_row, last_row, crc, widths FROM snapshots ORDER BY first_row"
        ).fetchall():
            path = snapshot_path(self._snapshots, number)
            held = known.get(number)
            if held is not None:
                segments.append(held)
                continue
            try:
                opened = open_snapshot(path, about.uuid, about.dim, crc)
                read = None if widths is None else Widths.from_json(str(widths))
            except (FileNotFoundError, IndexCorruptedError) as error:
                if isinstance(error, FileNotFoundError) and self._missing != about.version:
                    self._missing = about.version  # seen again, it was not just replaced
                    raise StaleError from error
                LOG.warning("%s; its rows are read from the record meanwhile", error)
                damaged.append(str(error))
                rest = _Tail(about.dim)
                rest.extend(read_blocks(connection, about, first - 1, last))
                segment = rest.segment(0)
                segments.append(
                    Segment(segment.vectors, segment.rows, segment.keys, segment.parts, number)
                )
                continue
            segments.append(
                Segment(
                    opened.vectors,
                    opened.rows,
                    opened.keys,
                    opened.parts,
                    number,
                    opened.lists,
                    read,
                    None if opened.lists is None else np.argsort(opened.rows),
                )
            )
        return segments, tuple(damaged)


class _Tail:
    """Rows behind the last snapshot, in arrays that grow; segments see a part of them."""

    def __init__(self, dim: int) -> None:
        self._count = 0
        self._arrays = _empty(0, dim)

    def extend(self, given: Iterable[Block]) -> None:
        """Add rows after the last one."""
        blocks = list(given)
        added = sum(len(block[0]) for block in blocks)
        room = len(self._arrays[0])
        if self._count + added > room:
            arrays = _empty(max(2 * room, self._count + added), self._arrays[3].shape[1])
            _copy(_part(self._arrays, 0, self._count), _part(arrays, 0, self._count))
            self._arrays = arrays
        for block in blocks:
            end = self._count + len(block[0])
            _copy(block, _part(self._arrays, self._count, end))
            self._count = end

    def segment(self, after: int) -> Segment:
        """Return the rows > after; if these are few, the others are let go."""
        start = int(np.searchsorted(self._arrays[0][: self._count], after, side="right"))
        if start > self._count - start:
            self._arrays = _part(self._arrays, start, self._count)
            self._count, start = self._count - start, 0
        rows, keys, parts, vectors = _part(self._arrays, start, self._count)
        return Segment(vectors, rows, keys, parts)


def _empty(count: int, dim: int) -> Block:
    return (
        np.empty(count, np.int64),
        np.empty(count, np.int64),
        np.empty(count, np.int32),
        np.empty((count, dim), np.float16),
    )


def _part(block: Block, start: int, end: int) -> Block:
    rows, keys, parts, vectors = block
    return rows[start:end], keys[start:end], parts[start:end], vectors[start:end]


def _copy(source: Block, target: Block) -> None:
    pairs: Iterable[tuple[Array, Array]] = zip(source, target, strict=True)
    for old, new in pairs:
        new[:] = old


def _last_row(connection: sqlite3.Connection) -> int:
    last = connection.execute("SELECT max(last_row) FROM snapshots").fetchone()[0]
    return int(last or 0)


def _gone(connection: sqlite3.Connection, after: int) -> tuple[NDArray[np.int64], int]:
    """Return the rows that went after a number of `gone`, and the last number."""
    found = connection.execute(
        "SELECT number, row FROM gone WHERE number > ? ORDER BY number", (after,)
    ).fetchall()
    return np.array([row for _, row in found], np.int64), found[-1][0] if found else after


def _amended(
    alive: Bitmap, last_row: int, added: list[NDArray[np.int64]], gone: NDArray[np.int64]
) -> Bitmap:
    bits = np.zeros(max((last_row - alive.first_row) // 8 + 1, len(alive.bits)), np.uint8)
    bits[: len(alive.bits)] = alive.bits
    for rows in added:
        places = rows - alive.first_row
        np.bitwise_or.at(bits, places >> 3, (1 << (places & 7)).astype(np.uint8))
    places = gone - alive.first_row
    places = places[(places >= 0) & (places < 8 * len(bits))]
    np.bitwise_and.at(bits, places >> 3, ~(1 << (places & 7)).astype(np.uint8))
    return Bitmap(alive.first_row, bits)
