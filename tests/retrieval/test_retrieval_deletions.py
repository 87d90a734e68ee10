"""Deletions: remembered for stores that lack them, and forgotten after that."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from indexes import filled
from stores import Dropping, MemoryStore, contents, once

from mmedge.errors import BackendUnavailableError, InputError, RetrievalError
from mmedge.retrieval import rows
from mmedge.retrieval.index import Index
from mmedge.retrieval.items import Item
from mmedge.retrieval.sync import Synced, pull, push

DIM = 32
VECTOR = np.eye(1, DIM, dtype=np.float32)


def remembered(index: Index) -> set[str]:
    return {change.id for change in index.changes(None, 1000) if change.deleted}


def compacted(index: Index) -> set[str]:
    index.compact()
    return remembered(index)


def test_an_index_of_its_own_forgets_its_deletions(tmp_path: Path) -> None:
    with filled(tmp_path / "a.index", 5) as index:
        index.delete(["item1", "item2"])
        index.delete(["item3", "nowhere"], revision=2**60, origin="another device")
        assert compacted(index) == {"item3", "nowhere"}
        index.add(vectors=VECTOR, ids="item1")
        assert compacted(index) == {"item3", "nowhere"}


def test_a_deletion_is_kept_until_all_stores_have_it(tmp_path: Path) -> None:
    one, two = MemoryStore(DIM), MemoryStore(DIM)
    two.upsert([Item("other", VECTOR, revision=1)])
    with filled(tmp_path / "a.index", 5) as index:
        push(index, one)
        pull(index, two)
        index.delete(["item1", "item2"])
        assert compacted(index) == {"item1", "item2"}
        push(index, one)
        assert compacted(index) == {"item1", "item2"}
        push(index, two)
        index.delete("item3")
        assert compacted(index) == {"item3"}
        assert push(index, one) == push(index, two) == Synced(changes=1, deleted=1)
        assert compacted(index) == set()
        assert contents(one) == contents(two) == contents(index)
        assert push(index, one) == Synced()


def test_a_deletion_made_elsewhere_is_forgotten_where_nothing_is_pushed(tmp_path: Path) -> None:
    store = MemoryStore(DIM)
    store.upsert([Item(name, VECTOR, revision=1) for name in "abc"])
    with Index.create(tmp_path / "a.index", dim=DIM) as index:
        pull(index, store)
        store.delete(["a", "b"])
        index.delete("c")
        pull(index, store)
        assert compacted(index) == {"c"}
        push(index, store)
        assert compacted(index) == set()
        assert len(store) == 0


def test_a_reader_is_warned_after_a_forgotten_deletion(tmp_path: Path) -> None:
    with filled(tmp_path / "a.index", 5) as index:
        before = index.changes(None, 3)[-1].cursor
        index.delete("item4")
        after = index.changes(before, 10)[-1].cursor
        index.compact()
        with pytest.raises(RetrievalError, match=r"forgotten by 'compact'.*Make the copy again"):
            index.changes(before, 10)
        index.add(vectors=VECTOR, ids="new")
        assert [change.id for change in index.changes(after, 10)] == ["new"]
        anew = index.changes(None, 2)[-1].cursor
        assert [change.id for change in index.changes(anew, 10)] == ["item2", "item3", "new"]
        for cursor in (after.rpartition(":")[0], after + ":1", after + "x"):
            with pytest.raises(InputError, match="cursor"):
                index.changes(cursor, 1)


def test_a_push_of_everything_goes_on_after_a_drop(tmp_path: Path) -> None:
    store = MemoryStore(DIM)
    with filled(tmp_path / "a.index", 9) as index:
        index.delete("item8")
        push(index, store)
        index.compact()
        store.now.clear()
        with pytest.raises(BackendUnavailableError):
            push(index, Dropping(store, once(6)), batch=2, everything=True)
        assert 0 < len(store) < 8
        push(index, store)
        assert contents(store) == contents(index)


@pytest.mark.parametrize("seed", range(4))
def test_devices_converge_whenever_they_forget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Two devices, whose clocks jump, change, delete, push, pull and compact."""
    drawn = random.Random(seed)  # noqa: S311
    monkeypatch.setattr(rows, "now_us", lambda: drawn.randrange(1, 40))
    store = MemoryStore(DIM)
    devices = [Index.create(tmp_path / f"{name}.index", dim=DIM) for name in "ab"]
    forgotten = 0
    for _ in range(80):
        index, name = drawn.choice(devices), drawn.choice("abcd")
        step = drawn.choice(["put", "put", "delete", "delete", "push", "pull", "compact"])
        if step == "put":
            index.upsert([Item(name, VECTOR)], durability="batch")
        elif step == "delete":
            index.delete(name, durability="batch")
        elif step == "compact":
            before = len(remembered(index))
            forgotten += before - len(compacted(index))
        else:
            (push if step == "push" else pull)(index, store, batch=3)
    for copy in (push, pull):
        for index in devices:
            copy(index, store)
    assert contents(devices[0]) == contents(devices[1]) == contents(store)
    assert forgotten
    for index in devices:
        index.close()
