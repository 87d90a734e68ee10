"""Milvus as a VectorStore: a standalone or distributed server, or Milvus Lite in a local file."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mmedge.closing import Closing
from mmedge.errors import InputError, RetrievalError, ShapeError, SpaceMismatchError
from mmedge.retrieval.filters import Filter
from mmedge.retrieval.items import Item, Match
from mmedge.retrieval.store import Change
from mmedge.retrieval.stores.collection import Collection
from mmedge.retrieval.stores.rows import (
    FORMAT,
    HEADER,
    MARK,
    Row,
    Version,
    about_row,
    deletion_row,
    hash_id,
    item_of,
    item_rows,
    mark_row,
    versions_of,
    winner,
)
from mmedge.retrieval.stores.terms import filter_expression, hash_text
from mmedge.specs import Float32Array

__all__ = ["MilvusStore"]

_BATCH_ROWS = 2_000
_BATCH_BYTES = 16 << 20  # of vectors; a server takes messages of 64 MiB
_AT_ONCE = 500  # ids of one query
_MOST_HITS = 16_384  # Milvus's limit for one search
_WIDTHS = ((0.9, 128), (0.95, 400), (0.99, 800), (1.0, 4096))
_TRIES = 5


class MilvusStore(Closing):
    """A collection of a Milvus server; mmedge.retrieval.stores.rows says what it holds.

    Every request ends within `timeout_s`; pymilvus tries again until then. What failed may be
    called again, since all changes are idempotent. For one thread at a time.

    Args:
        address: "http://HOST:19530", or a path that ends in ".db" for Milvus Lite.
        collection: Its name: letters, digits and underscores.
        dim: D, the length of a vector; needed to create the collection, otherwise checked.
        space: Embedding-space fingerprint; kept when the collection is created, otherwise checked.
        writer: Names this device, by its index's identity say, so that other devices' cursors stay
            short; None for a new name each time.
        token: "USER:PASSWORD" or an API key, where the server asks for one.
        timeout_s: Limit of each request.

    Raises:
        BackendUnavailableError: If pymilvus is not installed or no server answers.
        RetrievalError: If the collection does not exist and no `dim` is given, or is another
            program's.
        SpaceMismatchError: If it holds vectors of another space or length.
    """

    def __init__(
        self,
        address: str,
        collection: str,
        *,
        dim: int | None = None,
        space: str | None = None,
        writer: str | None = None,
        token: str | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        self._named = writer is not None
        self._writer = hash_text("writer", writer or secrets.token_hex(16))
        self._session = secrets.token_hex(8)
        self._epoch = 0  # 0: to be begun at the next write
        self._sequence = 0
        self._rows = Collection(
            address, collection, dim=dim, space=space, token=token, timeout_s=timeout_s
        )
        try:
            about = self._read_about(dim, space)
        except BaseException:
            self._rows.close()
            raise
        self._identity: str = about["identity"]
        self._dim: int = about["dim"]
        self._space: str | None = about["space"]

    @property
    def dim(self) -> int:
        """D, the length of a vector."""
        return self._dim

    @property
    def space(self) -> str | None:
        """Embedding-space fingerprint of the vectors; None for vectors of unknown origin."""
        return self._space

    @property
    def identity(self) -> str:
        """Names the collection's contents for good."""
        return self._identity

    def upsert(self, items: Sequence[Item]) -> int:
        """Add or replace items and return when the server has acknowledged them.

        An item older (by revision, then origin) than what is stored, a deletion included, changes
        nothing; one of revision 0 is a change made now and always counts. Returns how many were
        written.

        Raises:
            InputError: If vectors have another width, or an item is too large for Milvus.
        """
        latest: dict[str, Item] = {}
        for item in self._stamped(items):
            held = latest.get(item.id)
            if held is None or (item.revision, item.origin) > (held.revision, held.origin):
                latest[item.id] = item
        groups = [item_rows(item, self._dim) for item in latest.values()]
        return sum(len(self._write(batch)) for batch in _batches(groups))

    def delete(self, ids: Sequence[str], *, revision: int | None = None, origin: str = "") -> int:
        """Delete items, remembering the deletion for `changes`; return how many there were.

        Without a revision it is later than the item's. With one, an item later than it stays, and
        the deletion of an id that is not there is remembered too.
        """
        deleted = 0
        wanted = list(dict.fromkeys(ids))
        for start in range(0, len(wanted), _AT_ONCE):
            part = wanted[start : start + _AT_ONCE]
            now = self._current([hash_id(one) for one in part])
            there = {one for one in part if (it := now.get(hash_id(one))) and not it.deleted}
            groups = []
            for one in part if revision is not None else sorted(there):
                when = _next_revision(now.get(hash_id(one))) if revision is None else revision
                groups.append([deletion_row(one, when, origin, self._dim)])
            written = self._write(groups, now)
            deleted += len(written & {hash_id(one) for one in there})
        return deleted

    def get(self, ids: Sequence[str]) -> list[Item | None]:
        """Return items by id, None for an id that is not there."""
        now = self._current_content([hash_id(one) for one in ids])
        return [item_of(it) if (it := now.get(hash_id(one))) else None for one in ids]

    def search(
        self, vectors: Float32Array, k: int, *, where: Filter | None = None, recall: float = 0.95
    ) -> list[list[Match]]:
        """Return the k nearest items to each of the (Q, D) L2-normalised vectors, best first.

        Args:
            vectors: (Q, D) float32.
            k: Items for each query, at most 16,384.
            where: A filter.
            recall: Sets the width of the search in the server's graph: 128 up to 0.9, 400 up to
                0.95, 800 up to 0.99, 4,096 above. It is not measured on the collection.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self._dim:
            raise ShapeError(f"Queries: got shape {vectors.shape}, expected (Q, {self._dim}).")
        if not 1 <= k <= _MOST_HITS:
            raise InputError(f"k: got {k}, expected 1 to {_MOST_HITS:,}.")
        if not 0 < recall <= 1:
            raise InputError(f"recall: got {recall}, expected more than 0 and at most 1.")
        if len(vectors) == 0:
            return []
        expression = "deleted == false"
        if where is not None:
            expression = f"{expression} and {filter_expression(where)}"
        width = next(width for limit, width in _WIDTHS if recall <= limit)
        rows = min(_MOST_HITS, k + 10)
        while True:
            hits = self._rows.search(vectors, expression, rows, max(width, rows))
            matches = self._matches(hits, k)
            # Several vectors of an item, and rows of versions before, leave fewer than k items.
            short = any(
                len(found) < k and len(got) == rows
                for found, got in zip(matches, hits, strict=True)
            )
            if not short or rows == _MOST_HITS:
                return matches
            rows = min(_MOST_HITS, rows * 4)

    def changes(self, after: str | None, limit: int) -> list[Change]:
        """Return up to `limit` changes after a cursor; None starts at the first.

        A cursor holds one position for each writer, so what a device writes late, or under a clock
        that is wrong, is never passed over. An id may come more than once, and of one that two
        devices wrote, the lesser version may come last.

        Raises:
            RetrievalError: If the cursor is not one of this method's.
        """
        positions = _parse_cursor(after)
        changes = []
        for row in self._rows.query(f"part == 0 and {_beyond(positions)}", HEADER, first=limit):
            positions[row["writer"]] = row["key"]
            cursor = json.dumps(positions, sort_keys=True)
            changes.append(
                Change(cursor, row["id"]["id"], row["deleted"], row["revision"], row["origin"])
            )
        return changes

    def __len__(self) -> int:
        """How many items there are; one that two devices are writing may count twice."""
        (row,) = self._rows.query("part == 0 and deleted == false", ["count(*)"])
        return int(row["count(*)"])

    def close(self) -> None:
        """Close the connection."""
        self._rows.close()

    def _read_about(self, dim: int | None, space: str | None) -> Row:
        """Read what the collection holds, or write it if the collection is new."""
        wanted = f'part == {MARK} and writer == "about"'
        found = self._rows.query(wanted, ["key", "body"])
        if not found:
            row = about_row(secrets.token_hex(16), self._rows.dim, space)
            self._rows.write([{**row, "writer": "about"}])
            # Two devices may do so at once; all of them take the least identity.
            found = self._rows.query(wanted, ["key", "body"])
        about: Row = min(found, key=lambda row: str(row["key"]))["body"]
        for row in found:
            got = (row["body"].get("format"), row["body"].get("dim"), row["body"].get("space"))
            expected = (FORMAT, dim or about.get("dim"), space or about.get("space"))
            if got[0] != expected[0]:
                raise RetrievalError(
                    f"The {self._rows.place} is of another version of mmedge: got format {got[0]}, "
                    f"expected {FORMAT}. Use another collection."
                )
            if got != expected:
                raise SpaceMismatchError(
                    f"The {self._rows.place} holds vectors of length {got[1]} of space {got[2]}, "
                    f"expected length {expected[1]} of space {expected[2]}. Use another collection."
                )
        return about

    def _stamped(self, items: Sequence[Item]) -> list[Item]:
        """Give items of revision 0 that of a change made now."""
        now = self._current([hash_id(item.id) for item in items if item.revision == 0])
        return [
            replace(item, revision=_next_revision(now.get(hash_id(item.id))), origin=self._identity)
            if item.revision == 0
            else item
            for item in items
        ]

    def _write(
        self, groups: Sequence[list[Row]], now: dict[str, Version] | None = None
    ) -> set[str]:
        """Write versions of items, each in its rows, unless they are older than what there is.

        Returns:
            The hashes of the ids of what was written.
        """
        if now is None:
            now = self._current([rows[0]["item"] for rows in groups])
        later: set[str] = set()
        rows_to_send: list[Row] = []
        for rows in groups:
            item, order = rows[0]["item"], (rows[0]["revision"], rows[0]["origin"])
            held = now.get(item)
            if held is None or order > (held.revision, held.origin):
                later.add(item)
            elif order < (held.revision, held.origin) or not self._may_be_passed(held):
                continue
            rows_to_send += rows
        if rows_to_send:
            self._insert_batch(rows_to_send)
            items = {row["item"] for row in rows_to_send} & now.keys()
            before = [row["key"] for item in sorted(items) for row in now[item].rows]
            if before:
                self._rows.delete(before)
        return later

    def _may_be_passed(self, held: Version) -> bool:
        """Whether a version may have arrived late, after readers passed its key.

        So it is if this writer sent it in an earlier epoch: its call failed, and is made again.
        """
        return (
            self._named
            and held.key.startswith(f"{self._writer}/")
            and not held.key.startswith(f"{self._writer}/{self._epoch:08d}")
        )

    def _insert_batch(self, rows: Sequence[Row]) -> None:
        passed: list[str] = []
        for _ in range(_TRIES):
            if self._epoch == 0:
                self._begin_epoch()
            self._sequence += 1
            batch = f"{self._writer}/{self._epoch:08d}{self._sequence:010d}"
            keys = [f"{batch}/{number:06d}" for number in range(len(rows))]
            epoch, self._epoch = self._epoch, 0  # a batch of unknown outcome ends its epoch
            self._rows.write(
                [
                    {**row, "key": key, "writer": self._writer}
                    for key, row in zip(keys, rows, strict=True)
                ]
            )
            if not self._named or self._read_mark() == {"epoch": epoch, "session": self._session}:
                self._epoch = epoch
                if passed:
                    self._rows.delete(passed)
                return
            # Another process has begun an epoch under this name: readers may have passed this one.
            passed += keys
        raise RetrievalError(
            f"Other processes keep writing to the {self._rows.place} under this writer's name. Let "
            "one write at a time, or name the writers differently."
        )

    def _begin_epoch(self) -> None:
        self._sequence = 0
        if not self._named:
            self._writer = hash_text("writer", secrets.token_hex(16))
            self._epoch = 1
            return
        epoch = int((self._read_mark() or {"epoch": 0})["epoch"]) + 1
        body = {"epoch": epoch, "session": self._session}
        self._rows.write([mark_row(f"!writer/{self._writer}", body, self._dim)])
        self._epoch = epoch

    def _read_mark(self) -> Row | None:
        rows = self._rows.query(f'key == "!writer/{self._writer}"', ["body"])
        return rows[0]["body"] if rows else None

    def _current(self, items: Sequence[str], *, level: str = "Strong") -> dict[str, Version]:
        """Return the version that each item has now, and delete the rows of those before it."""
        found: dict[str, Version] = {}
        before: list[str] = []
        listed = list(dict.fromkeys(items))
        for start in range(0, len(listed), _AT_ONCE):
            names = _listed(listed[start : start + _AT_ONCE])
            rows = self._rows.query(f"item in {names}", HEADER, level=level)
            for item, versions in versions_of(rows).items():
                now = winner(versions)
                if now is not None:
                    found[item] = now
                    lesser = [version for version in versions if version.order < now.order]
                    before += [row["key"] for version in lesser for row in version.rows]
        if before:
            self._rows.delete(before)
        return found

    def _current_content(self, items: Sequence[str]) -> dict[str, Version]:
        """Return the version that each item has now, its rows with body and vector."""
        step = max(1, min(_AT_ONCE, _BATCH_BYTES // (4 * self._dim)))
        for _ in range(_TRIES):
            found = self._current(items)
            rows = {str(row["key"]): row for version in found.values() for row in version.rows}
            keys = list(rows)
            for start in range(0, len(keys), step):
                names = _listed(keys[start : start + step])
                for row in self._rows.query(f"key in {names}", ["key", "body", "vector"]):
                    rows[str(row["key"])].update(row)
            if all("body" in row for row in rows.values()):
                return found
            # Some were replaced between the two queries.
        raise RetrievalError(
            f"The {self._rows.place} changes faster than it can be read. Try again, or read fewer "
            "items at a time."
        )

    def _matches(self, hits: Sequence[Sequence[Row]], k: int) -> list[list[Match]]:
        now = self._current([row["item"] for rows in hits for row in rows], level="Session")
        current = {row["key"] for version in now.values() for row in version.rows}
        results = []
        for rows in hits:
            best: dict[str, Match] = {}
            for row in rows:
                name, body = row["id"]["id"], row["body"]
                if row["key"] in current and name not in best and len(best) < k:
                    best[name] = Match(
                        id=name,
                        score=min(1.0, max(-1.0, row["score"])),
                        metadata=body["metadata"],
                        time=body["time"],
                        source=body["source"],
                        text=body["text"],
                        part=int(row["part"]),
                    )
            results.append(list(best.values()))
        return results


def _next_revision(held: Version | None) -> int:
    return max(time.time_ns() // 1000, held.revision + 1 if held else 0)


def _batches(groups: Sequence[list[Row]]) -> Iterator[list[list[Row]]]:
    """Yield the rows of some items at a time; an item's rows stay together."""
    batch: list[list[Row]] = []
    rows = size = 0
    for group in groups:
        own = sum(row["vector"].nbytes for row in group)
        full = rows + len(group) > _BATCH_ROWS or size + own > _BATCH_BYTES
        if batch and (full or len(batch) == _AT_ONCE):
            yield batch
            batch, rows, size = [], 0, 0
        batch.append(group)
        rows += len(group)
        size += own
    if batch:
        yield batch


def _parse_cursor(cursor: str | None) -> dict[str, str]:
    name = r"[A-Za-z0-9_-]{16}"
    try:
        positions = json.loads(cursor or "{}")
    except ValueError:
        positions = None
    if not isinstance(positions, dict) or not all(
        re.fullmatch(name, writer) and re.fullmatch(name + r"/\d{18}/\d{6}", str(key), re.ASCII)
        for writer, key in positions.items()
    ):
        raise RetrievalError(f"Cursor: got {str(cursor)[:80]!r}, expected one of `changes`.")
    return positions


def _beyond(positions: dict[str, str]) -> str:
    """Return the expression of keys beyond each writer's position; others' keys are all beyond."""
    if not positions:
        return 'key > ""'
    known = [f'(writer == "{writer}" and key > "{key}")' for writer, key in positions.items()]
    return f"(writer not in {_listed(list(positions))} or {' or '.join(known)})"


def _listed(names: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"
