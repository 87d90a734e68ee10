"""Filters in SQL find what the definition in Python finds, also after changes."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Iterator

import numpy as np
import pytest
from filters import VECTOR, filters, items
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmedge.retrieval.filter_sql import AllowedItems, KeyMask, allowed, compile_filter
from mmedge.retrieval.filters import MAX_CONDITIONS, MAX_VALUES, Eq, Filter, In, Or, Range, matches
from mmedge.retrieval.items import Item

SEQ = itertools.count(1)


@pytest.fixture(scope="module")
def record() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:")
    connection.execute(
        "CREATE TABLE items(key INTEGER PRIMARY KEY, id TEXT UNIQUE, time REAL, source TEXT, "
        "metadata TEXT, seq INTEGER UNIQUE)"
    )
    yield connection
    connection.close()


@pytest.fixture(autouse=True)
def empty(record: sqlite3.Connection) -> None:
    clear(record)


def clear(record: sqlite3.Connection) -> None:
    record.execute("DELETE FROM items")


def mask_of(kept: AllowedItems, record: sqlite3.Connection, where: Filter) -> KeyMask:
    (seq,) = record.execute("SELECT coalesce(max(seq), 0) FROM items").fetchone()
    return kept.mask(record, where, of="here", seq=seq)


def put(record: sqlite3.Connection, item: Item, key: int | None = None) -> None:
    metadata = json.dumps(item.metadata, ensure_ascii=False)
    record.execute(
        "INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?, ?)",
        (key, item.id, item.time, item.source, metadata, next(SEQ)),
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(filters, st.lists(items, min_size=1, max_size=4, unique_by=lambda item: item.id))
def test_sql_means_what_python_means(
    record: sqlite3.Connection, where: Filter, stored: list[Item]
) -> None:
    clear(record)
    for item in stored:
        put(record, item)
    condition = compile_filter(where)
    sql = f"SELECT id FROM items WHERE {condition.sql}"  # noqa: S608
    rows = record.execute(sql, condition.parameters).fetchall()
    assert {name for (name,) in rows} == {item.id for item in stored if matches(where, item)}


@pytest.mark.parametrize(
    "where",
    [
        Or(tuple(Eq("n", number) for number in range(MAX_CONDITIONS))),
        In("n", tuple(range(MAX_VALUES))),
        In("id", tuple(str(number) for number in range(MAX_VALUES))),
    ],
    ids=["conditions", "numbers", "ids"],
)
def test_the_largest_filters_run(record: sqlite3.Connection, where: Filter) -> None:
    put(record, Item("7", VECTOR, metadata={"n": 7}))
    put(record, Item("x", VECTOR, metadata={"n": -1}))
    assert np.flatnonzero(mask_of(AllowedItems(), record, where)).tolist() == [1]


def test_values_and_fields_are_no_sql(record: sqlite3.Connection) -> None:
    hostile = "x' OR 1=1; DROP TABLE items --"
    put(record, Item("a", VECTOR, metadata={"tag": "b", hostile: hostile}))
    condition = compile_filter(Or((Eq(hostile, hostile), Eq("id", hostile))))
    assert hostile not in condition.sql
    assert np.flatnonzero(mask_of(AllowedItems(), record, Eq("tag", hostile))).size == 0
    assert np.flatnonzero(mask_of(AllowedItems(), record, Eq(hostile, hostile))).tolist() == [1]


def test_a_kept_mask_follows_adds_updates_and_deletions(record: sqlite3.Connection) -> None:
    rng = np.random.default_rng(0)
    kept, where = AllowedItems(), Or((Range("n", 0, 4), Eq("on", True)))
    for _ in range(30):
        for _ in range(3):
            name = str(rng.integers(20))
            record.execute("DELETE FROM items WHERE id = ?", (name,))
            fields = {"n": int(rng.integers(10)), "on": bool(rng.integers(2))}
            if rng.random() > 0.2:
                put(record, Item(name, VECTOR, metadata=fields))
        keys = np.array([key for (key,) in record.execute("SELECT key FROM items")], np.int64)
        mask = mask_of(kept, record, where)
        fresh = mask_of(AllowedItems(), record, where)
        assert np.array_equal(allowed(mask, keys), allowed(fresh, keys))


def test_a_mask_is_read_once(record: sqlite3.Connection) -> None:
    put(record, Item("a", VECTOR, metadata={"n": 1}))
    kept = AllowedItems(kept=2)
    statements: list[str] = []
    record.set_trace_callback(statements.append)
    try:
        first = mask_of(kept, record, Eq("n", 1))
        assert mask_of(kept, record, Eq("n", 1)) is first
        assert sum("metadata" in statement for statement in statements) == 1
        assert not mask_of(kept, record, Eq("n", True)).any()  # equal to Eq("n", 1) in Python
        mask_of(kept, record, Eq("n", 2))
        mask_of(kept, record, Eq("n", 1))  # dropped meanwhile
        assert sum("metadata" in statement for statement in statements) == 4
    finally:
        record.set_trace_callback(None)


def test_a_mask_of_the_past_is_not_written_to(record: sqlite3.Connection) -> None:
    put(record, Item("a", VECTOR, metadata={"n": 1}), 5)
    kept = AllowedItems()
    before = mask_of(kept, record, Eq("n", 1))
    put(record, Item("a", VECTOR, metadata={"n": 2}), 5)
    assert not mask_of(kept, record, Eq("n", 1)).any()
    assert before.tolist() == [False] * 5 + [True]


def test_keys_beyond_a_mask_are_not_allowed() -> None:
    keys = np.array([0, 2, 9], np.int64)
    assert allowed(np.array([True, False, True]), keys).tolist() == [True, True, False]
    assert allowed(np.array([True]), keys[:0]).size == 0
    assert not allowed(np.zeros(0, np.bool_), keys).any()


def test_a_mask_of_another_moment_or_index_is_not_used(record: sqlite3.Connection) -> None:
    put(record, Item("a", VECTOR, metadata={"n": 1}), 1)
    kept = AllowedItems()
    assert kept.mask(record, Eq("n", 1), of="here", seq=9).any()
    clear(record)
    assert kept.mask(record, Eq("n", 1), of="here", seq=9).any()
    assert not kept.mask(record, Eq("n", 1), of="there", seq=9).any()
    assert not kept.mask(record, Eq("n", 1), of="here", seq=8).any()  # an older transaction
