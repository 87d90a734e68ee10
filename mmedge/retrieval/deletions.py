"""When an index forgets a deletion: once nobody can be without it any more."""

from __future__ import annotations

import sqlite3

from mmedge.errors import InputError, RetrievalError
from mmedge.retrieval.schema import About, read_about
from mmedge.retrieval.sync import pushed_to

__all__ = ["change_cursor", "forget_deletions", "position_after"]


def forget_deletions(connection: sqlite3.Connection) -> None:
    """Forget the deletions that all stores have with which changes were exchanged.

    A store has those that were pushed to it. An index that never pushes and pulls from a single
    store forgets the others' deletions, which came from there; one that exchanges changes with no
    store forgets its own, and keeps those of devices for which it may be the store.

    Args:
        connection: In a write transaction.
    """
    about = read_about(connection)
    stores = pushed_to(dict(connection.execute("SELECT name, cursor FROM cursors").fetchall()))
    value: str | int = about.uuid
    if not stores:
        condition = "origin = ?"
    elif list(stores.values()) == [None]:
        condition = "origin <> ?"
    else:
        condition = "seq <= ?"
        value = min(0 if held is None else _pushed(held, about) for held in stores.values())
    last, revision = connection.execute(
        f"SELECT max(seq), max(revision) FROM deletions WHERE {condition}",  # noqa: S608, from above
        (value,),
    ).fetchone()
    if last is not None:
        connection.execute(f"DELETE FROM deletions WHERE {condition}", (value,))  # noqa: S608
        connection.execute(
            """UPDATE about SET forgotten = max(forgotten, ?),
            forgotten_us = max(forgotten_us, ?)""",
            (last, revision),
        )


def _pushed(cursor: str, about: About) -> int:
    try:
        return _parsed(cursor, about)[0]
    except InputError:  # of the index that this one was recovered from
        return 0


def change_cursor(about: About, seq: int, base: int) -> str:
    """Return the cursor of a change.

    Args:
        about: The index.
        seq: Number of the change.
        base: Of the cursor that it is read after; see position_after.
    """
    return f"{about.uuid}:{seq}:{base}"


def position_after(cursor: str | None, about: About) -> tuple[int, int]:
    """Return the change after which a cursor is, and up to which its reader lacks no deletion.

    Whoever starts at the first change never had what was deleted and forgotten before.

    Raises:
        InputError: If the cursor is not of this index.
        RetrievalError: If deletions after it were forgotten.
    """
    if cursor is None:
        return 0, about.forgotten
    seq, base = _parsed(cursor, about)
    if about.forgotten > max(seq, base):
        raise RetrievalError(
            "Deletions after this cursor were forgotten by 'compact', so what follows it may hold "
            "items that are deleted here. Make the copy again: start with an empty one, without a "
            "cursor."
        )
    return seq, base


def _parsed(cursor: str, about: About) -> tuple[int, int]:
    owner, *numbers = cursor.split(":")
    if (
        owner != about.uuid
        or len(numbers) != 2
        or not all(number.isdecimal() and len(number) <= 18 for number in numbers)
    ):
        raise InputError(
            f"changes: the cursor {cursor!r} is not of this index ({about.uuid}). Pass the cursor "
            "of its last change, or None to begin again."
        )
    return int(numbers[0]), int(numbers[1])
