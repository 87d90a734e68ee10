"""A reference store in memory, and stores that fail or lie in wait, for the tests of retrieval."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mmedge.errors import BackendUnavailableError
from mmedge.retrieval.filters import Filter, matches
from mmedge.retrieval.items import Item, Match
from mmedge.retrieval.store import Change, VectorStore
from mmedge.specs import Float32Array


class MemoryStore:
    """What a store must do, in the fewest lines; it keeps cursors as an index does."""

    def __init__(self, dim: int, space: str | None = None) -> None:
        self.dim = dim
        self.space = space
        self.identity = str(uuid.uuid4())
        self.now: dict[str, tuple[int, Change, Item | None]] = {}
        self.cursors: dict[str, str] = {}
        self.seq = 0
        self.clock = 1_000

    def upsert(self, items: Sequence[Item]) -> int:
        written = 0
        for item in items:
            now = item
            if item.revision == 0:
                now = replace(item, revision=self._next(item.id), origin=self.identity)
            written += self._put(Change("", now.id, False, now.revision, now.origin), now)
        return written

    def delete(self, ids: Sequence[str], *, revision: int | None = None, origin: str = "") -> int:
        deleted = 0
        for one in dict.fromkeys(ids):
            there = self.get([one]) != [None]
            if revision is None and not there:
                continue
            when = self._next(one) if revision is None else revision
            deleted += self._put(Change("", one, True, when, origin), None) and there
        return deleted

    def _next(self, name: str) -> int:
        (held,) = self.revisions([name])
        return max(self.clock, held[0] + 1 if held else 0)

    def _put(self, change: Change, item: Item | None) -> bool:
        (held,) = self.revisions([change.id])
        if held and (change.revision, change.origin) <= held:
            return False
        self.seq += 1
        self.now[change.id] = (self.seq, change, item)
        return True

    def get(self, ids: Sequence[str]) -> list[Item | None]:
        return [self.now[one][2] if one in self.now else None for one in ids]

    def revisions(self, ids: Sequence[str]) -> list[tuple[int, str] | None]:
        held = [self.now[one][1] if one in self.now else None for one in ids]
        return [change and (change.revision, change.origin) for change in held]

    def search(
        self,
        vectors: Float32Array,
        k: int,
        *,
        where: Filter | None = None,
        recall: float = 0.95,  # noqa: ARG002
    ) -> list[list[Match]]:
        items = [one for *_, one in self.now.values() if one is not None]
        items = [one for one in items if where is None or matches(where, one)]
        results = []
        for query in vectors:
            hits = []
            for item in items:
                scores = item.vectors @ query
                part = int(np.argmax(scores))
                hits.append(
                    Match(
                        item.id,
                        float(scores[part]),
                        item.metadata,
                        item.time,
                        item.source,
                        item.text,
                        part,
                    )
                )
            results.append(sorted(hits, key=lambda hit: -hit.score)[:k])
        return results

    def changes(self, after: str | None, limit: int) -> list[Change]:
        later = [one for one in self.now.values() if one[0] > int(after or 0)]
        later = sorted(later, key=lambda one: one[0])[:limit]
        return [replace(change, cursor=str(seq)) for seq, change, _ in later]

    def __len__(self) -> int:
        return sum(item is not None for *_, item in self.now.values())

    def cursor(self, name: str) -> str | None:
        return self.cursors.get(name)

    def set_cursor(self, name: str, cursor: str | None) -> None:
        if cursor is None:
            self.cursors.pop(name, None)
        else:
            self.cursors[name] = cursor

    def close(self) -> None:
        pass


def once(point: int) -> Callable[[], bool]:
    """True the one time that it is called after `point` times."""
    count = itertools.count()
    return lambda: next(count) == point


class Dropping:
    """What lies beyond a link that drops: before a call gets there, or before its result is back.

    Args:
        store: Beyond the link.
        drops: Asked before each call and before each result whether the link drops.
        of: Attributes that are no calls.
    """

    def __init__(
        self,
        store: object,
        drops: Callable[[], bool],
        of: Sequence[str] = ("dim", "space", "identity"),
    ) -> None:
        self.store: Any = store
        self.drops = drops
        for name in of:
            setattr(self, name, getattr(store, name))

    def _over_link(self, name: str, *args: object, **options: object) -> object:
        self._drop()
        result = getattr(self.store, name)(*args, **options)
        self._drop()
        return result

    def _drop(self) -> None:
        if self.drops():
            raise BackendUnavailableError("The link dropped.")

    def close(self) -> None:
        self.store.close()

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self._over_link(name, *args, **options)


def contents(store: VectorStore) -> dict[str, tuple[object, ...]]:
    """All items of a store by id, comparable."""
    ids: list[str] = []
    after = None
    while changes := store.changes(after, 100):
        after = changes[-1].cursor
        ids += [change.id for change in changes]
    found = {item.id: item for item in store.get(list(dict.fromkeys(ids))) if item is not None}
    assert len(store) == len(found)
    return {name: comparable(item) for name, item in found.items()}


def comparable(item: Item) -> tuple[object, ...]:
    """An item as a value; vectors as an index keeps them."""
    return (
        item.vectors.astype(np.float16).tolist(),
        item.time,
        item.source,
        item.text,
        dict(item.metadata),
        item.content_hash,
        item.revision,
        item.origin,
    )
