"""Push and pull: what is copied, over links that drop at any call, and by two devices at once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import Dropping, MemoryStore, contents, once

from mmedge.errors import BackendUnavailableError, InputError, SpaceMismatchError
from mmedge.retrieval.index import Index
from mmedge.retrieval.items import Item
from mmedge.retrieval.sync import Synced, pull, push

DIM = 4
NAMES = ["a", "b", "c", "d", "e"]


def item(name: str, revision: int, origin: str = "a") -> Item:
    vectors = np.random.default_rng(revision).normal(size=(1 + revision % 3, DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    metadata = {"n": revision, "tag": ["x"]}
    return Item(
        name, vectors.astype(np.float32), metadata=metadata, revision=revision, origin=origin
    )


def filled(count: int, *, deleted: int = 0) -> MemoryStore:
    index = MemoryStore(DIM)
    names = [f"item {number}" for number in range(count)]
    index.upsert([item(name, number + 1) for number, name in enumerate(names)])
    index.delete(names[:deleted])
    return index


def test_a_push_then_a_pull_copies_everything() -> None:
    one, store, two = filled(23, deleted=3), MemoryStore(DIM), MemoryStore(DIM)
    assert push(one, store, batch=5) == Synced(changes=23, written=20, deleted=0)
    assert pull(two, store, batch=7) == Synced(changes=23, written=20, deleted=0)
    assert contents(one) == contents(store) == contents(two)


def test_a_second_push_sends_only_changes() -> None:
    index, store = filled(10), MemoryStore(DIM)
    push(index, store)
    assert push(index, store) == Synced()
    index.upsert([item("item 3", 99), item("new", 100)])
    index.delete(["item 4"], revision=101, origin="a")
    assert push(index, store) == Synced(changes=3, written=2, deleted=1)
    assert contents(index) == contents(store)


def test_a_deletion_reaches_the_other_device() -> None:
    one, store, two = filled(3), MemoryStore(DIM), MemoryStore(DIM)
    push(one, store)
    pull(two, store)
    one.delete(["item 1"])
    push(one, store)
    assert pull(two, store).deleted == 1
    assert set(contents(two)) == {"item 0", "item 2"}
    push(two, store)  # and does not come back
    assert set(contents(store)) == {"item 0", "item 2"}


def test_a_late_push_of_an_old_change_loses() -> None:
    away, store, other = MemoryStore(DIM), MemoryStore(DIM), MemoryStore(DIM)
    away.upsert([item("a", 5, "away"), item("b", 5, "away"), item("c", 5, "away")])
    other.upsert([item("a", 6, "other")])
    other.delete(["b"], revision=6, origin="other")
    push(other, store)
    push(away, store)
    pull(away, store)
    pull(other, store)
    assert contents(away) == contents(other) == contents(store)
    assert set(contents(store)) == {"a", "c"}
    assert contents(store)["a"][-2:] == (6, "other")


def test_a_device_fetches_only_what_it_has_not() -> None:
    one, two, store = filled(5, deleted=1), MemoryStore(DIM), MemoryStore(DIM)
    fetched: list[str] = []

    class Recorded(Dropping):
        def get(self, ids: list[str]) -> object:
            fetched.extend(ids)
            return self._over_link("get", ids)

    link = Recorded(store, lambda: False)
    two.upsert([item("new", 9, "b")])
    push(one, store)
    push(two, store)
    assert pull(one, link) == Synced(changes=6, written=1)
    assert fetched == ["new"]
    del one.now["item 3"]  # restored from a backup
    assert pull(one, link, everything=True) == Synced(changes=6, written=1)
    assert fetched == ["new", "item 3"]


def test_cursors_are_kept_apart_for_each_store() -> None:
    index, one, two = filled(4), MemoryStore(DIM), MemoryStore(DIM)
    push(index, one)
    assert push(index, two).written == 4
    assert pull(index, two).changes == 4


def test_everything_starts_anew_for_a_store_that_lost_items() -> None:
    index, store = filled(4), MemoryStore(DIM)
    push(index, store)
    store.now.clear()
    assert push(index, store) == Synced()
    assert push(index, store, everything=True).written == 4


def test_progress_is_called_with_what_was_acknowledged() -> None:
    seen: list[Synced] = []
    push(filled(5), MemoryStore(DIM), batch=2, on_progress=seen.append)
    assert [done.changes for done in seen] == [2, 4, 5]


@pytest.mark.parametrize(
    ("one", "two"), [((4, "x"), (4, "y")), ((4, None), (5, None)), ((4, "x"), (5, "x"))]
)
def test_another_space_is_refused(one: tuple[int, str | None], two: tuple[int, str | None]) -> None:
    index, store = MemoryStore(*one), MemoryStore(*two)
    for copy in (push, pull):
        with pytest.raises(SpaceMismatchError, match="migrate"):
            copy(index, store)


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="batch: got 0"):
        push(filled(1), MemoryStore(DIM), batch=0)


@pytest.mark.parametrize("copy", [push, pull])
def test_a_link_that_drops_at_any_call_loses_nothing(copy: Callable[..., Synced]) -> None:
    """The link drops once, at each point in turn: before and after each call on either side."""
    for point in itertools.count():
        index, store = filled(7, deleted=2), MemoryStore(DIM)
        if copy is pull:
            index, store = store, index
        dropping = Dropping(store, once(point))
        try:
            copy(index, dropping, batch=2)
        except BackendUnavailableError:
            copy(index, dropping, batch=2)
        else:
            return  # the link held: all points were tried
        assert contents(index) == contents(store)
        assert copy(index, dropping, batch=2) == Synced()
    raise AssertionError


@pytest.mark.parametrize("copy", [push, pull])
def test_a_cursor_that_cannot_be_saved_loses_nothing(copy: Callable[..., Synced]) -> None:
    for point in range(20):
        index, store = filled(7, deleted=2), MemoryStore(DIM)
        if copy is pull:
            index, store = store, index
        failing = Dropping(index, once(point))
        with pytest.raises(BackendUnavailableError):
            copy(failing, store, batch=2)
        copy(index, store, batch=2)
        assert contents(index) == contents(store)


operations = st.lists(
    st.tuples(
        st.sampled_from(["put", "delete", "push", "pull"]),
        st.integers(0, 1),
        st.sampled_from(NAMES),
        st.integers(1, 12),
    ),
    max_size=40,
)


@given(operations, st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 0.4]))
def test_two_devices_converge(
    steps: list[tuple[str, int, str, int]], seed: int, rate: float
) -> None:
    """Whatever two devices do, under clocks that disagree and a link that drops, they end equal."""
    drops = random.Random(seed)  # noqa: S311
    store = MemoryStore(DIM)
    link = Dropping(store, lambda: drops.random() < rate)
    devices = [MemoryStore(DIM), MemoryStore(DIM)]
    for step, number, name, revision in steps:
        index, origin = devices[number], f"device {number}"
        if step == "put":
            index.upsert([item(name, revision, origin)])
        elif step == "delete":
            index.delete([name], revision=revision, origin=origin)
        else:
            try:
                (push if step == "push" else pull)(index, link, batch=2)
            except BackendUnavailableError:
                assert rate
    for copy in (push, pull):
        for index in devices:
            copy(index, store, batch=3)
    assert contents(devices[0]) == contents(devices[1]) == contents(store)


def test_indexes_go_on_after_a_drop(tmp_path: Path) -> None:
    """Real indexes keep their cursors in their records, over a restart too."""
    one, two = (Index.create(tmp_path / f"{name}.index", dim=DIM) for name in ("one", "two"))
    store = MemoryStore(DIM)
    one.add(vectors=np.eye(DIM, dtype=np.float32), ids=NAMES[:DIM])
    one.delete(["b"])
    for point in range(2, 20):
        try:
            push(one, Dropping(store, once(point)), batch=1)
            break
        except BackendUnavailableError:
            one.close()
            one = Index.open(tmp_path / "one.index")
    two.add(vectors=np.ones(DIM, np.float32), ids="a")
    push(two, store)
    for index in (one, two):
        pull(index, store, batch=2)
    assert contents(one) == contents(two) == contents(store)
    assert len(two) == 3
    assert push(one, store).written == pull(two, store).written == 0
    one.close()
    two.close()
