"""Words of an item's text: queries of SQLite's full-text index (FTS5)."""

from __future__ import annotations

import sqlite3

import numpy as np
from numpy.typing import NDArray

from mmedge.errors import InputError
from mmedge.retrieval.filter_sql import KeyMask, allowed

__all__ = ["MAX_WORDS", "match_expression", "search_words"]

MAX_WORDS = 64
"""Different words in one query."""

_AT_ONCE = 1000


def match_expression(words: str) -> str:
    """Return the FTS5 expression for items that hold any of these words.

    Every word is quoted, so that nothing in it is an operator of FTS5.

    Raises:
        InputError: If there is no word, or there are too many.
    """
    usable = words.replace("\0", " ").encode(errors="replace").decode()
    different = list(dict.fromkeys(usable.split()))
    if not any(any(map(str.isalnum, word)) for word in different):
        raise InputError(f"Words: got {words!r}, expected at least one word to look for.")
    if len(different) > MAX_WORDS:
        raise InputError(
            f"Words: got {len(different)} different ones, expected at most {MAX_WORDS}. Give the "
            "words that matter."
        )
    return " OR ".join('"' + word.replace('"', '""') + '"' for word in different)


def search_words(
    record: sqlite3.Connection, words: str, limit: int, mask: KeyMask | None = None
) -> NDArray[np.int64]:
    """Return the items whose text fits some words best.

    They are ranked by BM25 (S. Robertson and H. Zaragoza, The Probabilistic Relevance Framework:
    BM25 and Beyond, 2009) as FTS5 computes it: a rare word counts more, and so does a short text.

    Args:
        record: The index's SQLite file.
        words: Words of which an item has one or more.
        limit: At most so many items.
        mask: Which items are allowed; None for all.

    Returns:
        Keys, best first.

    Raises:
        InputError: As match_expression.
    """
    cursor = record.execute(
        "SELECT rowid FROM words WHERE words MATCH ? ORDER BY rank, rowid",
        (match_expression(words),),
    )
    found = np.empty(0, np.int64)
    while len(found) < limit and (rows := cursor.fetchmany(_AT_ONCE)):
        keys = np.array([key for (key,) in rows], np.int64)
        found = np.concatenate([found, keys if mask is None else keys[allowed(mask, keys)]])
    cursor.close()
    return found[:limit]
