"""The text form of filters: what it means, what is written, and where an error is shown."""

from __future__ import annotations

import re

import pytest
from filters import filters
from hypothesis import given
from hypothesis import strategies as st

from mmedge.errors import InputError
from mmedge.retrieval.filter_text import MAX_LENGTH, filter_text, parse_filter
from mmedge.retrieval.filters import MAX_DEPTH, And, Eq, Filter, In, Not, Or, Range

NEW_YEAR = 1767225600.0  # 2026-01-01T00:00:00Z


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (
            'time > 2026-01-01 and tag = "kitchen"',
            And((Range("time", NEW_YEAR, low_open=True), Eq("tag", "kitchen"))),
        ),
        ("time >= 2026-01-01T02:00+02:00", Range("time", NEW_YEAR)),
        ("time < 2026-01-01T00:00:00.5Z", Range("time", high=NEW_YEAR + 0.5, high_open=True)),
        ('time <= "2026-01-01 00:00:01"', Range("time", high=NEW_YEAR + 1)),
        ("time = 5", Eq("time", 5)),
        ("0 <= n < 5.5", Range("n", 0, 5.5, high_open=True)),
        ("2026-01-01<time<=2026-01-02", Range("time", NEW_YEAR, NEW_YEAR + 86400, low_open=True)),
        ("n=-3", Eq("n", -3)),
        ("n = .5e1", Eq("n", 5.0)),
        ("night = TRUE", Eq("night", True)),
        ("night != false", Not(Eq("night", False))),
        ("room = kitchen", Eq("room", "kitchen")),
        ("path = cam/front-2:a.jpg", Eq("path", "cam/front-2:a.jpg")),
        ("id = 00012", Eq("id", "00012")),
        ("source in (3, '2026-01-01')", In("source", ("3", "2026-01-01"))),
        ('day = "2026-01-01"', Eq("day", "2026-01-01")),
        ("tag not in (a, 'b c')", Not(In("tag", ("a", "b c")))),
        (r"""name = "say \"hi\" \\" """, Eq("name", 'say "hi" \\')),
        ("'two words' = 1", Eq("two words", 1)),
        ('"and" = 1', Eq("and", 1)),
        (
            "a=1 or b=2 AND not (c=3 or d=4)",
            Or((Eq("a", 1), And((Eq("b", 2), Not(Or((Eq("c", 3), Eq("d", 4)))))))),
        ),
        ("(a=1 and b=2) and c=3", And((And((Eq("a", 1), Eq("b", 2))), Eq("c", 3)))),
    ],
)
def test_parse(text: str, where: Filter) -> None:
    parsed = parse_filter(text)
    assert parsed == where
    assert repr(parsed).replace(".0", "") == repr(where).replace(".0", "")  # True equals 1
    assert parse_filter(filter_text(where)) == where


@given(filters)
def test_written_data_is_read_back(where: Filter) -> None:
    assert repr(parse_filter(filter_text(where))) == repr(where)


def test_a_moment_is_written_as_a_date() -> None:
    assert filter_text(Range("time", NEW_YEAR)) == "time >= 2026-01-01T00:00:00Z"
    assert filter_text(Range("time", 1e18)) == "time >= 1e+18"
    assert filter_text(Range("n", NEW_YEAR)) == "n >= 1767225600.0"


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", 0, "expected a field"),
        ("tag = ", 6, "expected a value"),
        ("tag == a", 5, "expected a value"),
        ('tag = "a', 6, "quote is not closed"),
        ("tag = a; drop table items", 7, "unexpected character"),
        ("tag = a b = c", 8, "expected 'and', 'or' or the end"),
        ("tag like 'a%'", 4, "expected one of = != < <= > >="),
        ("tag in ()", 8, "expected a value"),
        ("tag in (a", 9, r"expected '\)'"),
        ("tag not a", 8, "expected 'in'"),
        ("tag < 'a'", 6, "expected a number or a date; texts are compared"),
        ("source > 3", 9, "expected a number or a date; texts are compared"),
        ("n = 12abc", 4, "neither a number nor a date"),
        ("n = 1e999", 4, "too large"),
        ("n = 9223372036854775808", 0, "64 bits"),
        ("n = " + "9" * 5000, 4, "too large"),
        ("time > 2026-02-30", 7, "no such date"),
        ("time = 2026-01-01", 7, "the moment 00:00 UTC; give a range"),
        ("day in (2026-01-01)", 8, "or a text in quotes"),
        ("time = now", 7, "expected a date or time"),
        ("time = true", 0, "no boolean"),
        ("5 < 6", 4, "expected a field; quote a name"),
        ("5 = n", 2, "expected one of < <="),
        (r'tag = "a\n"', 8, "after a backslash"),
        ("(" * (MAX_DEPTH + 2), MAX_DEPTH + 1, "deep"),
        ("not " * (MAX_DEPTH + 2), 4 * (MAX_DEPTH + 1), "deep"),
        ("tag = 'a' or\n\ttag = *", 20, "unexpected character"),
        ("tag = '\ud800'", 0, "Unicode"),
    ],
)
def test_an_error_shows_its_place(text: str, place: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_filter(text)
    _, line, caret = str(caught.value).encode().decode().split("\n")
    start = max(0, min(place - 36, len(text) - 72))
    assert caret == "  " + " " * (place - start) + "^"
    shown = re.sub(r"\s", " ", text[start : start + 72].encode(errors="replace").decode())
    assert line == "  " + shown


@given(st.text(max_size=40) | st.text("()=<>!'\"\\ ,andotr1.-:TZ", max_size=40))
def test_any_text_is_a_filter_or_an_error(text: str) -> None:
    try:
        where = parse_filter(text)
    except InputError:
        return
    assert parse_filter(filter_text(where)) == where


def test_an_endless_text_is_refused() -> None:
    with pytest.raises(InputError, match="100,001 characters"):
        parse_filter("a" * (MAX_LENGTH + 1))
