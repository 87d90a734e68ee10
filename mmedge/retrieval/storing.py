"""Adding, changing and deleting items: what the transaction of each call does."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from mmedge.errors import InputError, SpaceMismatchError
from mmedge.retrieval import rows
from mmedge.retrieval.adding import Content, new_id
from mmedge.retrieval.deletions import change_cursor, position_after
from mmedge.retrieval.inputs import (
    Time,
    checked_ids,
    checked_metadata,
    checked_texts,
    checked_times,
    checked_vectors,
)
from mmedge.retrieval.items import Item, Metadata
from mmedge.retrieval.rows import ItemRow
from mmedge.retrieval.schema import About, read_about
from mmedge.retrieval.store import Change
from mmedge.specs import Float32Array, Modality

__all__ = [
    "Changes",
    "add",
    "changes",
    "changes_of",
    "check_unchanged",
    "checked_items",
    "delete",
    "embedded_from_text",
    "items_after",
    "new_items",
    "update",
    "upsert",
]

_T = TypeVar("_T")
_ITEMS_AT_ONCE = 256


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """What `update` changes, by id; what is not in a mapping stays."""

    ids: list[str]
    vectors: dict[str, Float32Array] = field(default_factory=dict)
    modality: Modality | None = None
    texts: Mapping[str, str | None] = field(default_factory=dict)
    times: Mapping[str, float | None] = field(default_factory=dict)
    sources: Mapping[str, str | None] = field(default_factory=dict)
    metadata: Mapping[str, Metadata] = field(default_factory=dict)
    content_hashes: Mapping[str, str | None] = field(default_factory=dict)


def new_items(
    content: Content,
    ids: str | Sequence[str] | None,
    texts: str | Sequence[str | None] | None,
    times: Time | Sequence[Time | None] | None,
    sources: str | Sequence[str | None] | None,
    metadata: Metadata | Sequence[Metadata | None] | None,
    content_hashes: Sequence[str | None] | None,
) -> list[Item]:
    """Return the items that a call of `add` describes, without revision and origin.

    Raises:
        InputError: If there are more or fewer of something than items, or it cannot be used.
    """
    count = len(content.vectors)
    places = content.sources if sources is None else checked_texts(sources, count, "sources")
    hashes = content.hashes
    if content_hashes is not None:
        hashes = checked_texts(content_hashes, count, "content_hashes")
    if ids is None:
        names = checked_ids([new_id(source) for source in content.sources])
    else:
        names = checked_ids(ids)
        if len(names) != count:
            raise InputError(f"ids: got {len(names)} for {count} items, expected one each.")
    columns = (
        names,
        content.vectors,
        checked_times(times, count),
        checked_texts(places, count, "sources"),
        checked_texts(texts, count, "texts"),
        checked_metadata(metadata, count),
        hashes,
    )
    return [Item(*values) for values in zip(*columns, strict=True)]


def checked_items(items: Sequence[Item], dim: int) -> list[Item]:
    """Check items of another store.

    Raises:
        InputError: If one cannot be used, or an id comes twice.
    """
    listed = list(items)
    content = Content(
        checked_vectors([item.vectors for item in listed], dim),
        [item.source for item in listed],
        [item.content_hash for item in listed],
        None,
        None,
    )
    checked = new_items(
        content,
        [item.id for item in listed],
        [item.text for item in listed],
        [item.time for item in listed],
        None,
        [item.metadata for item in listed],
        None,
    )
    for item in listed:
        if not 0 <= item.revision < 1 << 62 or not isinstance(item.origin, str):
            raise InputError(
                f"Item '{item.id}': got revision {item.revision!r} and origin {item.origin!r}, "
                "expected microseconds since 1970 and a store's name."
            )
    return [
        dataclasses.replace(new, revision=old.revision, origin=old.origin)
        for new, old in zip(checked, listed, strict=True)
    ]


def check_unchanged(about: About, now: About) -> None:
    """Check that the index still has the space that vectors were checked against.

    Args:
        about: The index as it was when they were checked.
        now: The index as it is.

    Raises:
        SpaceMismatchError: If a migration has ended since.
    """
    if (now.dim, now.space) != (about.dim, about.space):
        raise SpaceMismatchError(
            f"The index was migrated from the embedding space {about.space} ({about.dim} "
            f"dimensions) to {now.space} ({now.dim}) meanwhile. Open it again, which takes the "
            "bundle it has now."
        )


def _now(about: About) -> int:
    """Return the revision of a change made now: microseconds since 1970.

    It is later than all deletions that were forgotten, even if the clock was put back.
    """
    return max(rows.now_us(), about.forgotten_us + 1)


def add(connection: sqlite3.Connection, items: Sequence[Item], modality: str | None) -> None:
    """Insert new items.

    Raises:
        InputError: If an id is in the index.
    """
    taken = sorted(rows.read_stored(connection, [item.id for item in items]))
    if taken:
        more = f" and {len(taken) - 3} more" if len(taken) > 3 else ""
        raise InputError(
            f"ids: {taken[:3]}{more} are in the index already; nothing was added. Change them with "
            "update, or replace them with upsert."
        )
    about = read_about(connection)
    deleted = rows.read_deletions(connection, [item.id for item in items])
    now = _now(about)
    made = [
        dataclasses.replace(
            item, revision=max(now, deleted.get(item.id, (0, ""))[0] + 1), origin=about.uuid
        )
        for item in items
    ]
    rows.insert_items(connection, made, modality)


def upsert(connection: sqlite3.Connection, items: Sequence[Item]) -> int:
    """Insert or replace items that are newer than what is stored; return how many were."""
    about = read_about(connection)
    names = [item.id for item in items]
    stored, deleted = rows.read_stored(connection, names), rows.read_deletions(connection, names)
    now = _now(about)
    fresh: list[Item] = []
    replaced: list[tuple[int, Item]] = []
    for item in items:
        held = stored.get(item.id)
        before = deleted.get(item.id, (-1, "")) if held is None else (held.revision, held.origin)
        newer = item
        if item.revision == 0:
            newer = dataclasses.replace(item, revision=max(now, before[0] + 1), origin=about.uuid)
        if (newer.revision, newer.origin) <= before:
            continue
        if held is None:
            fresh.append(newer)
        else:
            replaced.append((held.key, newer))
    rows.insert_items(connection, fresh, None)
    rows.update_fields(connection, [(key, item, None) for key, item in replaced])
    vectors = [(key, item.vectors) for key, item in replaced]
    rows.replace_vectors(connection, vectors, epoch=about.epoch)
    return len(fresh) + len(replaced)


def delete(
    connection: sqlite3.Connection, names: Sequence[str], revision: int | None, origin: str
) -> int:
    """Delete items unless they are newer than the deletion; return how many there were."""
    stored = rows.read_stored(connection, names)
    if revision is None:
        about = read_about(connection)
        now, own = _now(about), about.uuid
        doomed = {name: (held, max(now, held.revision + 1), own) for name, held in stored.items()}
        rows.delete_items(connection, doomed)
        return len(doomed)
    doomed = {
        name: (held, revision, origin)
        for name, held in stored.items()
        if (revision, origin) > (held.revision, held.origin)
    }
    rows.delete_items(connection, doomed)
    # Deletions of what never came here are remembered too: the item may come later, and be older.
    known = rows.read_deletions(connection, names)
    rows.remember_deletions(
        connection,
        {
            name: (revision, origin)
            for name in names
            if name not in stored and (revision, origin) > known.get(name, (-1, ""))
        },
    )
    return len(doomed)


def changes_of(
    names: list[str],
    content: Content | None,
    texts: str | Sequence[str | None] | None,
    times: Time | Sequence[Time | None] | None,
    sources: str | Sequence[str | None] | None,
    metadata: Metadata | Sequence[Metadata | None] | None,
    content_hashes: Sequence[str | None] | None,
) -> Changes:
    """Return what a call of `update` changes.

    Raises:
        InputError: If there are more or fewer of something than ids, or it cannot be used.
    """
    count = len(names)
    if content is not None and len(content.vectors) != count:
        raise InputError(f"update: got {count} ids for {len(content.vectors)} items.")
    files: Mapping[str, str | None] = (
        {}
        if content is None
        else {
            name: source
            for name, source in zip(names, content.sources, strict=True)
            if source is not None
        }
    )
    hashes = {} if content is None else dict(zip(names, content.hashes, strict=True))
    given_times = {} if times is None else _by_id(names, checked_times(times, count))
    if sources is not None:
        files = _by_id(names, checked_texts(sources, count, "sources"))
    if content_hashes is not None:
        hashes = _by_id(names, checked_texts(content_hashes, count, "content_hashes"))
    return Changes(
        names,
        {} if content is None else _by_id(names, content.vectors),
        None if content is None else content.modality,
        {} if texts is None else _by_id(names, checked_texts(texts, count, "texts")),
        given_times,
        files,
        {} if metadata is None else _by_id(names, checked_metadata(metadata, count)),
        hashes,
    )


def _by_id(names: list[str], values: list[_T]) -> dict[str, _T]:
    return dict(zip(names, values, strict=True))


def embedded_from_text(connection: sqlite3.Connection, names: Mapping[str, str]) -> list[str]:
    """Return which items were embedded from their text."""
    stored = rows.read_stored(connection, names)
    found = rows.read_items(connection, [held.key for held in stored.values()], vectors=False)
    return [row.item.id for row in found.values() if row.modality == Modality.TEXT.value]


def update(connection: sqlite3.Connection, changes: Changes) -> None:
    """Change items.

    Raises:
        InputError: If an id is not in the index.
    """
    stored = rows.read_stored(connection, changes.ids)
    missing = [name for name in changes.ids if name not in stored]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(
            f"ids: {missing[:3]}{more} are not in the index; nothing was changed. Add them with "
            "add, or use upsert for either."
        )
    about = read_about(connection)
    now = _now(about)
    held = rows.read_items(connection, [each.key for each in stored.values()], vectors=False)
    changed = []
    for row in held.values():
        item, name = row.item, row.item.id
        new = dataclasses.replace(
            item,
            time=changes.times.get(name, item.time),
            source=changes.sources.get(name, item.source),
            text=changes.texts.get(name, item.text),
            metadata=changes.metadata.get(name, item.metadata),
            content_hash=changes.content_hashes.get(name, item.content_hash),
            revision=max(now, item.revision + 1),
            origin=about.uuid,
        )
        modality = row.modality if changes.modality is None else changes.modality.value
        changed.append((row.key, new, modality))
    rows.update_fields(connection, changed)
    vectors = [(stored[name].key, each) for name, each in changes.vectors.items()]
    rows.replace_vectors(connection, vectors, epoch=about.epoch)


def items_after(connection: sqlite3.Connection, key: int, *, vectors: bool) -> list[ItemRow]:
    """Return the next items after a key, in the order of keys."""
    found = connection.execute(
        "SELECT key FROM items WHERE key > ? ORDER BY key LIMIT ?", (key, _ITEMS_AT_ONCE)
    ).fetchall()
    held = rows.read_items(connection, [each for (each,) in found], vectors=vectors)
    return [held[each] for (each,) in found]


def changes(connection: sqlite3.Connection, after: str | None, limit: int) -> list[Change]:
    """Return up to `limit` changes after a cursor.

    Raises:
        InputError: If the cursor is not of this index.
        RetrievalError: If deletions after it were forgotten.
    """
    about = read_about(connection)
    seq, base = position_after(after, about)
    live = connection.execute(
        "SELECT seq, id, 0, revision, origin FROM items WHERE seq > ? ORDER BY seq LIMIT ?",
        (seq, limit),
    ).fetchall()
    dead = connection.execute(
        "SELECT seq, id, 1, revision, origin FROM deletions WHERE seq > ? ORDER BY seq LIMIT ?",
        (seq, limit),
    ).fetchall()
    merged = heapq.merge(live, dead, key=lambda values: values[0])
    return [
        Change(change_cursor(about, number, base), name, bool(deleted), revision, origin)
        for number, name, deleted, revision, origin in itertools.islice(merged, limit)
    ]
