"""The meaning of filters on one item, and what is refused."""

from __future__ import annotations

import pytest
from filters import VECTOR

from mmedge.errors import InputError
from mmedge.retrieval.filters import (
    MAX_CONDITIONS,
    MAX_DEPTH,
    MAX_VALUES,
    And,
    Eq,
    Filter,
    In,
    Not,
    Or,
    Range,
    check_fields,
    check_filter,
    fields_of,
    matches,
)
from mmedge.retrieval.items import Item

ITEM = Item(
    "a.jpg",
    VECTOR,
    time=100.0,
    source="cam0",
    metadata={"tag": ["kitchen", "night"], "n": 1, "on": True, "name": "1", "none": None, "t": []},
)


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        (Eq("id", "a.jpg"), True),
        (Eq("source", "cam1"), False),
        (Eq("time", 100), True),
        (Range("time", 100, 101), True),
        (Range("time", 100, low_open=True), False),
        (Range("time", high=100, high_open=True), False),
        (Eq("tag", "kitchen"), True),
        (Eq("tag", "kit"), False),
        (In("tag", ("hall", "night")), True),
        (Eq("tag", 1), False),
        (Not(Eq("tag", "hall")), True),
        (Not(Eq("t", "hall")), True),
        # Types are never converted.
        (Eq("n", 1.0), True),
        (Eq("n", True), False),
        (Eq("n", "1"), False),
        (Eq("on", 1), False),
        (Eq("on", True), True),
        (Eq("name", 1), False),
        (Eq("name", "1"), True),
        (Range("on", 0, 2), False),
        (Range("name", 0, 2), False),
        (Not(Range("name", 0, 2)), True),
        # What is missing is unknown, and so is its opposite.
        (Eq("other", 1), False),
        (Not(Eq("other", 1)), False),
        (Not(Eq("none", 1)), False),
        (Not(Range("other", 0)), False),
        (And((Eq("n", 1), Eq("other", 1))), False),
        (Not(And((Eq("n", 1), Eq("other", 1)))), False),
        (Not(And((Eq("n", 2), Eq("other", 1)))), True),
        (Or((Eq("n", 1), Eq("other", 1))), True),
        (Not(Or((Eq("n", 2), Eq("other", 1)))), False),
    ],
)
def test_matches(where: Filter, *, holds: bool) -> None:
    assert matches(where, ITEM) is holds


def test_a_missing_time_or_source_is_unknown() -> None:
    bare = Item("b", VECTOR)
    for where in (Range("time", 0), Eq("source", "cam0")):
        assert not matches(where, bare)
        assert not matches(Not(where), bare)


def nested(depth: int) -> Filter:
    where: Filter = Eq("n", 1)
    for _ in range(depth):
        where = Not(where)
    return where


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (Eq("n", float("nan")), "finite number"),
        (Eq("n", 2**63), "64 bits"),
        (Eq("n", "a\0b"), "NUL"),
        (Eq("n", "\ud800"), "Unicode"),
        (Eq("n", None), "expected a text"),  # type: ignore[arg-type]
        (Eq('n"', 1), "without quotes"),
        (Eq("", 1), "1 to 200 characters"),
        (In("n", ()), "tuple of values"),
        (In("n", ["a"]), "tuple of values"),  # type: ignore[arg-type]
        (Range("n"), "one or two numbers"),
        (Range("n", True), "one or two numbers"),
        (Range("n", float("inf")), "one or two numbers"),
        (Range("source", 1), "is a text"),
        (Eq("time", "2026-01-01"), "seconds since 1970"),
        (Eq("time", True), "no boolean"),
        (Eq("source", 5), "a text"),
        (And(()), "at least one"),
        (Or([Eq("n", 1)]), "tuple"),  # type: ignore[arg-type]
        ("n = 1", "parse_filter"),
        (nested(MAX_DEPTH + 1), "deep"),
        (Or((Eq("n", 1),) * (MAX_CONDITIONS + 1)), "conditions"),
        (In("n", tuple(range(MAX_VALUES + 1))), "30,000"),
    ],
)
def test_incomparable_outputs_are_refused(where: Filter, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_filter(where)


def test_the_largest_filters_are_accepted() -> None:
    check_filter(nested(MAX_DEPTH))
    check_filter(In("n", tuple(range(MAX_VALUES))))


def test_an_unknown_field_names_the_nearest() -> None:
    where = And((Eq("tgas", "x"), Range("time", 0)))
    assert fields_of(where) == {"tgas", "time"}
    check_fields(where, ["tgas"])
    with pytest.raises(InputError, match=r"'tgas'.*id, time, source, tags, n.*mean tags\?"):
        check_fields(where, ["tags", "n"])
