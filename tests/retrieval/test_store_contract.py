"""One suite over every store: what VectorStore promises. A new store joins by a line in STORES."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filters as drawn
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import milvus_lite, milvus_server, new_name
from stores import MemoryStore, comparable, contents

from mmedge.errors import MmedgeError, ShapeError
from mmedge.retrieval.filters import And, Eq, Filter, In, Not, Or, Range, matches
from mmedge.retrieval.index import Index
from mmedge.retrieval.items import Item
from mmedge.retrieval.store import Change, VectorStore
from mmedge.specs import Float32Array

DIM = 8
Open = Callable[[], VectorStore]


def memory(_: Path) -> Open:
    store = MemoryStore(DIM, "space")
    return lambda: store


def index(folder: Path) -> Open:
    Index.create(folder / "items.index", dim=DIM).close()
    return lambda: Index.open(folder / "items.index")


def lite(folder: Path) -> Open:
    return milvus_lite(folder, dim=DIM, space="space")


def server(_: Path) -> Open:
    return milvus_server(dim=DIM, space="space")


STORES: dict[str, Any] = {
    "memory": memory,
    "index": index,
    "milvus-lite": lite,
    "milvus": pytest.param(server, marks=pytest.mark.server),
}


@pytest.fixture(params=STORES.values(), ids=list(STORES))
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens one empty store of a kind, again and again."""
    opened: list[VectorStore] = []
    open_ = request.param(tmp_path)

    def reopen() -> VectorStore:
        opened.append(open_())
        return opened[-1]

    yield reopen
    for store in opened:
        store.close()


@pytest.fixture
def store(reopen: Open) -> VectorStore:
    return reopen()


def unit(seed: int, count: int = 1) -> Float32Array:
    """Vectors of length 1 that fp16 holds exactly."""
    vectors = np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float16).astype(np.float32)


def item(name: str, revision: int = 1, origin: str = "a", seed: int | None = None) -> Item:
    vectors = unit(zlib.crc32(name.encode()) if seed is None else seed)
    return Item(name, vectors, revision=revision, origin=origin)


FULL = Item(
    "päth/'a\"\\ 🐈.jpg",
    unit(3, 3),
    time=1767225600.25,
    source='cam"0',
    text="a red mug\nbeside a \U0001f408",
    metadata={"tag": ["kitchen", "é"], "n": 3, "x": 0.1, "big": 2**62 + 1, "on": True, "no": None},
    content_hash="abc",
    revision=1_767_225_600_000_001,
    origin="device-1",
)


def test_the_repr_describes_the_content(store: VectorStore) -> None:
    assert (store.dim, len(store)) == (DIM, 0)
    assert store.space == (None if isinstance(store, Index) else "space")
    assert store.identity


def test_an_item_is_returned_unchanged(store: VectorStore) -> None:
    assert store.upsert([FULL]) == 1
    (got,) = store.get([FULL.id])
    assert got is not None
    assert got.id == FULL.id
    assert comparable(got) == comparable(FULL)
    assert got.vectors.dtype == np.float32
    assert {name: type(value) for name, value in got.metadata.items()} == {
        name: type(value) for name, value in FULL.metadata.items()
    }
    assert len(store) == 1


def test_get_keeps_the_order_with_none_for_missing_items(store: VectorStore) -> None:
    store.upsert([item("a"), item("b")])
    got = store.get(["b", "nowhere", "a"])
    assert [one and one.id for one in got] == ["b", None, "a"]
    assert store.get([]) == []


def test_written_data_is_there_after_reopening(reopen: Open) -> None:
    first = reopen()
    first.upsert([item("a"), item("b")])
    first.delete(["b"], revision=2, origin="a")
    identity = first.identity
    if not isinstance(first, MemoryStore):
        first.close()
    again = reopen()
    assert again.identity == identity
    assert set(contents(again)) == {"a"}


@pytest.mark.parametrize(
    ("first", "second", "wins"),
    [
        ((1, "a"), (2, "a"), True),
        ((2, "a"), (1, "a"), False),
        ((1, "a"), (1, "b"), True),
        ((1, "b"), (1, "a"), False),
        ((1, "a"), (1, "a"), False),
    ],
)
def test_the_later_of_two_versions_counts(
    store: VectorStore, first: tuple[int, str], second: tuple[int, str], wins: bool
) -> None:
    assert store.upsert([item("a", *first, seed=1)]) == 1
    assert store.upsert([item("a", *second, seed=2)]) == int(wins)
    (got,) = store.get(["a"])
    assert got is not None
    assert (got.revision, got.origin) == (second if wins else first)
    assert np.array_equal(got.vectors, unit(2 if wins else 1))
    assert len(store) == 1


def test_a_change_without_revision_is_made_now(store: VectorStore) -> None:
    store.upsert([item("a", 2**60)])
    store.delete(["a"])
    assert store.upsert([item("a", 0), item("b", 0)]) == 2
    for got in store.get(["a", "b"]):
        assert got is not None
        assert got.revision > (2**60 if got.id == "a" else 0)
        assert got.origin


def test_a_deletion_is_remembered(store: VectorStore) -> None:
    store.upsert([item("a", 5), item("b", 5)])
    assert store.delete(["a", "nowhere"]) == 1
    assert store.get(["a"]) == [None]
    assert len(store) == 1
    assert store.upsert([item("a", 5, "z")]) == 0
    assert store.upsert([item("a", 2**61)]) == 1
    assert len(store) == 2


def test_a_deletion_follows_the_revisions(store: VectorStore) -> None:
    store.upsert([item("a", 5, "m")])
    assert store.delete(["a"], revision=4, origin="z") == 0
    assert store.delete(["a"], revision=5, origin="a") == 0
    assert store.get(["a"]) != [None]
    assert store.delete(["a"], revision=5, origin="z") == 1
    assert store.delete(["a"], revision=6, origin="a") == 0
    assert store.upsert([item("a", 5, "zz")]) == 0


def test_the_deletion_of_a_missing_item_is_remembered(store: VectorStore) -> None:
    assert store.delete(["a"], revision=5, origin="m") == 0
    assert store.upsert([item("a", 4)]) == 0
    assert store.upsert([item("a", 6)]) == 1
    (change,) = store.changes(None, 10)
    assert not change.deleted


def test_a_deletion_without_revision_outranks_a_clock_that_is_ahead(store: VectorStore) -> None:
    store.upsert([item("a", 2**60)])
    assert store.delete(["a"]) == 1
    (change,) = store.changes(None, 10)
    assert change.deleted
    assert change.revision > 2**60


def test_changes_are_paged_and_lose_nothing(store: VectorStore) -> None:
    names = [f"item {number}" for number in range(25)]
    store.upsert([item(name) for name in names])
    store.delete(names[:3], revision=2, origin="b")
    seen: dict[str, Change] = {}
    after = None
    while page := store.changes(after, 4):
        assert len(page) <= 4
        after = page[-1].cursor
        seen |= {change.id: change for change in page}
    assert set(seen) == set(names)
    assert {name for name, change in seen.items() if change.deleted} == set(names[:3])
    assert all(change.origin == ("b" if change.deleted else "a") for change in seen.values())
    assert store.changes(after, 4) == []
    store.upsert([item("later"), item("item 7", 9)])
    assert {change.id for change in store.changes(after, 10)} == {"later", "item 7"}


def test_a_change_comes_after_its_cursor_from_any_writer(reopen: Open) -> None:
    one, two = reopen(), reopen()
    one.upsert([item("a", 100)])
    after = one.changes(None, 10)[-1].cursor
    two.upsert([item("late", 1)])  # by a device that was away: of an old revision
    one.upsert([item("b", 101)])
    assert {change.id for change in one.changes(after, 10)} == {"late", "b"}


def test_a_foreign_cursor_is_refused(store: VectorStore) -> None:
    if isinstance(store, MemoryStore):
        pytest.skip("the reference trusts its cursors")
    for cursor in ("nonsense", "[]", '{"a": 1}', '{"" : "x\\" or true or \\""}'):
        with pytest.raises(MmedgeError, match="ursor"):
            store.changes(cursor, 10)


def test_the_nearest_items_are_found(store: VectorStore) -> None:
    vectors = unit(0, 60)
    store.upsert([Item(str(n), vectors[n : n + 1], revision=1) for n in range(60)])
    queries = unit(1, 4)
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :5]
    found = store.search(queries, 5)
    assert [[hit.id for hit in hits] for hits in found] == exact.astype(str).tolist()
    best = (queries @ vectors.T).max(axis=1)
    assert np.allclose([hits[0].score for hits in found], best, atol=2e-3)
    assert store.search(np.empty((0, DIM), np.float32), 5) == []


def test_an_item_of_several_vectors_is_one_hit(store: VectorStore) -> None:
    frames = unit(5, 30)
    store.upsert([Item("video", frames, revision=1), item("photo", seed=6), item("other", seed=7)])
    ((first, *rest),) = store.search(frames[17:18], 3)
    assert (first.id, first.part) == ("video", 17)
    assert {hit.id for hit in rest} == {"photo", "other"}
    store.delete(["video"])
    assert {hit.id for hit in store.search(frames[17:18], 3)[0]} == {"photo", "other"}


def test_a_hit_describes_its_item(store: VectorStore) -> None:
    store.upsert([FULL])
    ((hit,),) = store.search(FULL.vectors[1:2], 3)
    assert (hit.id, hit.part, hit.time, hit.source, hit.text) == (
        FULL.id,
        1,
        FULL.time,
        FULL.source,
        FULL.text,
    )
    assert dict(hit.metadata) == dict(FULL.metadata)


def test_an_update_replaces_everything(store: VectorStore) -> None:
    store.upsert([Item("a", unit(1, 4), metadata={"n": 1}, revision=1)])
    store.upsert([Item("a", unit(2, 2), metadata={"n": 2}, revision=2)])
    assert store.search(unit(1), 5, where=Eq("n", 1)) == [[]]
    ((hit,),) = store.search(unit(2, 2)[1:], 5, where=Eq("n", 2))
    assert (hit.part, dict(hit.metadata)) == (1, {"n": 2})


def test_vectors_of_another_length_are_refused(store: VectorStore) -> None:
    if isinstance(store, MemoryStore):
        pytest.skip("the reference checks nothing")
    with pytest.raises(MmedgeError, match=str(DIM)):
        store.upsert([Item("a", np.ones((1, DIM + 1), np.float32), revision=1)])
    with pytest.raises(ShapeError, match=str(DIM)):
        store.search(np.ones((1, DIM + 1), np.float32), 5)
    assert len(store) == 0


ITEMS = [
    Item("a", unit(1), 100.0, "cam0", metadata={"tag": ["x", "y"], "n": 1, "on": True}),
    Item("b", unit(2), 200.0, "cam1", metadata={"tag": "x", "n": 2.5, "s": "1"}),
    Item("c", unit(3), None, None, metadata={"n": "1", "none": None, "t": []}),
    Item('d"] or true', unit(4), 2**53 + 2.0, '"', metadata={"] or [": 1, "n": 2**53 + 1}),
]


@pytest.mark.parametrize(
    "where",
    [
        Eq("n", 1),
        Eq("n", "1"),
        Eq("n", True),
        Eq("on", True),
        Eq("on", 1),
        Eq("tag", "x"),
        In("tag", ("y", "q")),
        In("n", (1, "1", 7)),
        Eq("id", 'd"] or true'),
        Eq("source", '"'),
        Range("time", 100, 200),
        Range("time", 100, 200, low_open=True),
        Range("time", 100, 200, high_open=True),
        Range("n", 1, 2.5, high_open=True),
        Range("n", 2**53),
        Range("n", 2**53, low_open=True),
        Range("n", 2**53 + 1, low_open=True),
        Not(Range("n", 1)),
        Not(Eq("on", False)),
        Not(Eq("none", 1)),
        Not(In("tag", ("y",))),
        Not(And((Eq("n", 1), Eq("on", True)))),
        Not(Or((Eq("n", 1), Eq("tag", "x")))),
        Or((Eq("] or [", 1), Range("time", None, 150))),
        Eq("n", '1" or "" == "'),
    ],
    ids=repr,
)
def test_a_filter_finds_the_matching_items(filtered: VectorStore, where: Filter) -> None:
    expected = {one.id for one in ITEMS if matches(where, one)}
    assert {hit.id for hit in filtered.search(unit(0), 10, where=where)[0]} == expected


@pytest.fixture(scope="module", params=STORES.values(), ids=list(STORES))
def filtered(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[VectorStore]:
    """A store with ITEMS."""
    store = request.param(tmp_path_factory.mktemp("filtered"))()
    store.upsert([_revised(one) for one in ITEMS])
    yield store
    store.close()


def _revised(one: Item) -> Item:
    return Item(one.id, one.vectors, one.time, one.source, metadata=one.metadata, revision=1)


REVISIONS = itertools.count(2**60, 1_000)


@given(st.data())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_filter_finds_the_matching_items(empty: VectorStore, data: st.DataObject) -> None:
    """Over random items and filters, hostile texts among them."""
    vectors = unit(9, 4)
    revision = next(REVISIONS)
    items = [
        Item(one.id + str(n), vectors[n : n + 1], one.time, one.source, metadata=one.metadata,
             revision=revision)
        for n, one in enumerate(data.draw(st.lists(drawn.items, min_size=1, max_size=4)))
    ]  # fmt: skip
    names = dict.fromkeys(drawn.NAMES)  # an index refuses fields that no item has
    items.append(Item("names", vectors[:1], metadata=names, revision=revision))
    wheres = data.draw(st.lists(drawn.filters, min_size=1, max_size=8))
    empty.upsert(items)
    for where in wheres:
        expected = {one.id for one in items if matches(where, one)}
        found = empty.search(vectors[:1], 10, where=where)[0]
        assert {hit.id for hit in found} == expected, where
    empty.delete([one.id for one in items])
    assert len(empty) == 0


@pytest.fixture
def empty(reopen: Open) -> VectorStore:
    return reopen()


def test_a_store_of_another_name_is_another_store() -> None:
    assert new_name() != new_name()
