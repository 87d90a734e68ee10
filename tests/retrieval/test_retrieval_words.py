"""Words in the full-text index: nothing a user writes is FTS5 syntax."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmedge.errors import InputError
from mmedge.retrieval.words import MAX_WORDS, match_expression, search_words

TEXTS = {
    1: "a red mug on the kitchen table",
    2: "a blue mug",
    5: "the kitchen in the evening, the kitchen at night",
    9: 'she said "NOT that one" AND left',
}


@pytest.fixture(scope="module")
def record() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE VIRTUAL TABLE words USING fts5(text)")
    connection.executemany("INSERT INTO words(rowid, text) VALUES (?, ?)", TEXTS.items())
    yield connection
    connection.close()


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        ("mug", [2, 1]),  # the shorter text first
        ("Kitchen", [5, 1]),  # the more often first
        ("red kitchen", [1, 5]),
        ("sofa", []),
        ("NOT", [9]),
        ('said "NOT', [9]),
        ("mug AND sofa", [9, 2, 1]),
        ("mu*", []),
        ("text:mug", []),
        ("NEAR(red mug)", [2, 1]),  # NEAR(red and mug): two words, one of which is there
        ("^a", [2, 1]),
        ("red-mug", [1]),  # one word in two parts, which follow each other
    ],
)
def test_words_are_words(record: sqlite3.Connection, words: str, keys: list[int]) -> None:
    assert search_words(record, words, 10).tolist() == keys


def test_a_mask_and_a_limit(record: sqlite3.Connection) -> None:
    mask = np.zeros(6, np.bool_)
    mask[[1, 5]] = True
    assert search_words(record, "the a mug kitchen", 10, mask).tolist() in ([5, 1], [1, 5])
    assert len(search_words(record, "mug kitchen", 1)) == 1


def test_no_words_and_too_many_are_refused(record: sqlite3.Connection) -> None:
    for words in ("", "  ", "- *", '"', "\0"):
        with pytest.raises(InputError, match="at least one word"):
            search_words(record, words, 10)
    many = " ".join(map(str, range(MAX_WORDS + 1)))
    with pytest.raises(InputError, match=f"{MAX_WORDS + 1} different"):
        match_expression(many)
    assert match_expression("mug mug") == '"mug"'
    assert len(search_words(record, " ".join(map(str, range(MAX_WORDS))), 10)) == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=30) | st.text("\"'*^:+-(){}ANDORTE ab\0", max_size=30))
def test_no_text_breaks_the_query(record: sqlite3.Connection, words: str) -> None:
    try:
        keys = search_words(record, words, 10)
    except InputError:
        return
    assert set(keys.tolist()) <= TEXTS.keys()
