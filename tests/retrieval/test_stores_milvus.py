"""What is Milvus's own: expressions, errors, epochs, requests of unknown outcome."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filters as drawn
import numpy as np
import pytest
from hypothesis import given
from stores import Dropping, MemoryStore, contents, once

from mmedge.errors import (
    BackendUnavailableError,
    InputError,
    RetrievalError,
    SpaceMismatchError,
)
from mmedge.retrieval.filters import Filter, Range
from mmedge.retrieval.items import Item
from mmedge.retrieval.stores.terms import _sortable, filter_expression
from mmedge.retrieval.sync import Synced, pull, push

pymilvus = pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")
from mmedge.retrieval.stores.milvus import MilvusStore  # noqa: E402

DIM = 4
VECTOR = np.eye(1, DIM, dtype=np.float32)


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "store.db")


def item(name: str, revision: int = 1, origin: str = "a", count: int = 1) -> Item:
    return Item(name, np.repeat(VECTOR, count, 0), revision=revision, origin=origin)


# Expressions

LEXEMES = re.compile(
    r'(?:json_contains(?:_any)?\(|terms\["(?:t|n[\w-]{16})"\]|"[\w-]{16}"|"[0-9a-f]{20}"'
    r"| and | or |not |[()\[\], ]|[<>]=?)*",
    re.ASCII,
)


@given(drawn.filters)
def test_an_expression_holds_nothing_of_the_filter(where: Filter) -> None:
    assert LEXEMES.fullmatch(filter_expression(where))


@given(drawn.numbers, drawn.numbers)
def test_sortable_digits_sort_as_numbers(one: float, two: float) -> None:
    assert (_sortable(one) < _sortable(two)) is (one < two)
    assert (_sortable(one) == _sortable(two)) is (one == two)


def test_a_filter_that_is_none_is_refused(address: str) -> None:
    with (
        MilvusStore(address, "items", dim=DIM) as store,
        pytest.raises(InputError, match="Range of 'n'"),
    ):
        store.search(VECTOR, 1, where=Range("n"))


# Errors


def test_without_pymilvus_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pymilvus", None)
    with pytest.raises(BackendUnavailableError, match=r"mmedge\[milvus\]"):
        MilvusStore("http://127.0.0.1:1", "items", dim=DIM)


def test_a_server_that_is_down_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(BackendUnavailableError, match=f"127.0.0.1:{port}.*Check that the server"):
        MilvusStore(f"http://127.0.0.1:{port}", "items", dim=DIM, timeout_s=2)


def test_a_silent_server_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(BackendUnavailableError, match=r"within 0\.5 s.*timeout_s"):
            MilvusStore(address, "items", dim=DIM, timeout_s=0.5)


def test_a_server_that_speaks_something_else_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def talk() -> None:
            try:
                while True:
                    connection, _ = other.accept()
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    connection.close()
            except OSError:
                return

        threading.Thread(target=talk, daemon=True).start()
        address = f"http://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(BackendUnavailableError, match="could not connect"):
            MilvusStore(address, "items", dim=DIM, timeout_s=1)


@pytest.mark.parametrize("address", ["", "nonsense", "ftp://host", "/nowhere/at/all/store.db"])
def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(RetrievalError, match="Expected http://HOST"):
        MilvusStore(address, "items", dim=DIM)


def test_a_server_of_an_old_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    client = SimpleNamespace(
        get_server_version=lambda **_: "v2.2.16", close=lambda: closed.append(True)
    )
    monkeypatch.setattr(pymilvus, "MilvusClient", lambda *_, **__: client)
    with pytest.raises(BackendUnavailableError, match=r"got version v2\.2\.16, expected 2\.3"):
        MilvusStore("http://host:19530", "items", dim=DIM)
    assert closed


@pytest.mark.parametrize("name", ["", "a b", "1a", "a-b", 'x"', "a" * 300])
def test_a_name_that_is_no_collections_is_refused(address: str, name: str) -> None:
    with pytest.raises(InputError, match="letters, digits and underscores"):
        MilvusStore(address, name, dim=DIM)


def test_a_collection_that_is_not_there_is_not_made_without_a_width(address: str) -> None:
    with pytest.raises(RetrievalError, match=r"no collection 'items'.*pass dim"):
        MilvusStore(address, "items")


def test_another_width_or_space_is_refused(address: str) -> None:
    MilvusStore(address, "items", dim=DIM, space="one").close()
    with pytest.raises(SpaceMismatchError, match=r"space one.*space two"):
        MilvusStore(address, "items", space="two")
    with pytest.raises(SpaceMismatchError, match=f"length {DIM}.*length 9"):
        MilvusStore(address, "items", dim=9)
    with MilvusStore(address, "items") as store:
        assert (store.dim, store.space) == (DIM, "one")


def test_another_programs_collection_is_refused_and_left_alone(address: str) -> None:
    client = pymilvus.MilvusClient(address)
    client.create_collection("items", dimension=DIM)
    with pytest.raises(RetrievalError, match=r"not made by this version.*'vector'"):
        MilvusStore(address, "items", dim=DIM)
    assert client.query("items", "id >= 0") == []
    client.close()


def test_the_servers_message_is_passed_on(address: str) -> None:
    with MilvusStore(address, "items", dim=DIM) as store:
        client = pymilvus.MilvusClient(address)
        client.drop_collection("items")
        with pytest.raises(RetrievalError, match=f"{re.escape(address)} refused to .*items"):
            store.get(["a"])
        client.close()


def test_a_closed_store_is_an_error(address: str) -> None:
    store = MilvusStore(address, "items", dim=DIM)
    store.close()
    with pytest.raises(RetrievalError, match="is closed"):
        store.get(["a"])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (Item("a", VECTOR, text="x" * 70_000), "65,000"),
        (Item("a", VECTOR, metadata={"n": float("nan")}), "JSON"),
        (Item("a", VECTOR, metadata={"n": 2**70}), "64 bits"),
        (Item("a", VECTOR, source="\ud800"), "JSON"),
        (Item("a", VECTOR, revision=1, origin="x" * 600), "origin"),
        (Item("a", VECTOR, revision=-1), "revision -1"),
        (Item("a", VECTOR * np.nan), "NaN"),
        (Item("a", VECTOR[:0]), "shape"),
    ],
)
def test_an_item_that_cannot_be_stored_is_refused(address: str, bad: Item, says: str) -> None:
    with MilvusStore(address, "items", dim=DIM) as store:
        with pytest.raises(InputError, match=says):
            store.upsert([item("good"), bad])
        assert len(store) == 0


@pytest.mark.parametrize(
    ("k", "recall", "says"), [(0, 0.9, "k: got 0"), (1, 0.0, "recall"), (1, 1.1, "recall")]
)
def test_a_search_that_cannot_be_is_refused(address: str, k: int, recall: float, says: str) -> None:
    with MilvusStore(address, "items", dim=DIM) as store, pytest.raises(InputError, match=says):
        store.search(VECTOR, k, recall=recall)


# Requests of which the outcome is unknown


def lossy(store: MilvusStore, drops: Callable[[], bool]) -> MilvusStore:
    """Let any request of a store be lost, or its answer."""
    store._rows = Dropping(store._rows, drops, of=("place", "dim"))  # type: ignore[assignment]
    return store


@pytest.mark.parametrize("writer", [None, "device"])
def test_a_push_goes_on_after_any_request_is_lost(address: str, writer: str | None) -> None:
    index = MemoryStore(DIM)
    index.upsert([item(f"item {n}", n + 1, count=1 + n % 2) for n in range(3)])
    index.delete(["item 1"], revision=50, origin="a")
    for point in range(200):
        collection = f"at_{point}"
        with lossy(MilvusStore(address, collection, dim=DIM, writer=writer), once(point)) as store:
            try:
                push(index, store, batch=2)
            except BackendUnavailableError:
                reader = MemoryStore(DIM)
                pull(reader, MilvusStore(address, collection))
                push(index, store, batch=2)
            else:
                assert point > 5
                return
            pull(reader, store)
            assert contents(index) == contents(store) == contents(reader)
        index.cursors.clear()
    raise AssertionError


@pytest.mark.parametrize("writer", [None, "device"])
def test_rows_that_arrive_late_are_not_passed_over(address: str, writer: str | None) -> None:
    """A write times out, others follow and are read; then its rows arrive after all."""
    with (
        MilvusStore(address, "items", dim=DIM, writer=writer) as store,
        MilvusStore(address, "items") as reader,
    ):
        insert, late = store._rows.write, []

        def lose(rows: Sequence[Any]) -> None:
            late.append(rows)
            raise BackendUnavailableError("too slow")

        store.upsert([item("first")])
        store._rows.write = lose  # type: ignore[method-assign]
        with pytest.raises(BackendUnavailableError):
            store.upsert([item("late")])
        store._rows.write = insert  # type: ignore[method-assign]
        store.upsert([item("next")])
        after = reader.changes(None, 10)[-1].cursor
        insert(late[0])
        assert store.upsert([item("late")]) == 0  # it is there
        assert {change.id for change in reader.changes(after, 10)} == {"late"}
        assert len(store) == 3


def test_no_contents_cross_the_link_twice(address: str) -> None:
    index, other = MemoryStore(DIM), MemoryStore(DIM)
    index.upsert([item(f"item {n}", n + 1, count=1 + n % 2) for n in range(6)])
    index.delete(["item 1"])
    other.upsert([item("other")])
    with (
        MilvusStore(address, "items", dim=DIM, writer="device") as store,
        MilvusStore(address, "items") as second,
    ):
        push(index, store)
        query, write, read, written = store._rows.query, store._rows.write, [], []

        def count(expression: str, fields: Sequence[str], **options: Any) -> list[Any]:
            rows = query(expression, fields, **options)
            read.extend(row["id"]["id"] for row in rows if {"body", "vector"} & {*fields})
            return rows

        store._rows.query = count  # type: ignore[method-assign]
        store._rows.write = written.extend  # type: ignore[method-assign]
        assert pull(index, store).written == 0
        assert read == []
        push(other, second)
        store._rows.query = query  # type: ignore[method-assign]
        assert pull(index, store) == Synced(changes=1, written=1)
        assert push(index, store) == Synced(changes=1)
        assert written == []
        store._rows.write = write  # type: ignore[method-assign]


def test_two_processes_under_one_name_lose_nothing(address: str) -> None:
    with (
        MilvusStore(address, "items", dim=DIM, writer="device") as one,
        MilvusStore(address, "items", writer="device") as two,
        MilvusStore(address, "items") as reader,
    ):
        seen: set[str] = set()
        after = None
        for number in range(6):
            (one if number % 2 else two).upsert([item(f"item {number}")])
            page = reader.changes(after, 10)
            after = page[-1].cursor
            seen |= {change.id for change in page}
        assert seen == {f"item {number}" for number in range(6)}
        assert len(one) == 6


def test_a_device_has_one_place_in_a_cursor_over_many_sessions(address: str) -> None:
    for number in range(4):
        with MilvusStore(address, "items", dim=DIM, writer="device") as store:
            store.upsert([item(f"item {number}")])
            *_, last = store.changes(None, 10)
    assert last.cursor.count("/") == 2
    assert last.id == "item 3"


def test_versions_of_a_writer_that_died_are_not_seen(address: str) -> None:
    """Rows of a version are deleted by the next who comes by, found by no search meanwhile."""
    with MilvusStore(address, "items", dim=DIM) as store:
        store.upsert([item("a", 1), item("b", 1)])
        store._rows.delete = lambda _: None  # type: ignore[method-assign]
        store.upsert([item("a", 2, count=2)])
        store.delete(["b"])
        assert len(store._rows.query("part == 0", ["key"])) == 4
        ((hit,),) = store.search(VECTOR, 10)
        assert hit.id == "a"
        del store._rows.delete  # type: ignore[method-assign]
        assert store.get(["b", "a"])[0] is None
        assert len(store) == 1


def test_a_version_of_which_a_part_is_missing_does_not_count(address: str) -> None:
    with MilvusStore(address, "items", dim=DIM) as store:
        store.upsert([item("a", 1)])
        insert = store._rows.write
        store._rows.write = lambda rows: insert(rows[:-1])  # type: ignore[method-assign]
        store._rows.delete = lambda _: None  # type: ignore[method-assign]
        store.upsert([item("a", 2, count=3)])
        del store._rows.write, store._rows.delete  # type: ignore[method-assign]
        (got,) = store.get(["a"])
        assert got is not None
        assert got.revision == 1
        assert store.upsert([item("a", 3)]) == 1
        assert [hit.id for hit in store.search(VECTOR, 5)[0]] == ["a"]
