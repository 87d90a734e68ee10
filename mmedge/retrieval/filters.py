"""Filters as data: conditions on an item's id, time, source and metadata, and their meaning.

A condition on a field that an item lacks, or that is null, is unknown rather than false, and so is
its `Not`: an item is found only where the filter is known to hold (the logic of SQL). A value of
another type does not match: 1, "1" and true are three values, while 1 and 1.0 are one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from mmedge.errors import InputError
from mmedge.retrieval.items import Item
from mmedge.specs import did_you_mean

__all__ = [
    "COLUMNS",
    "MAX_CONDITIONS",
    "MAX_DEPTH",
    "MAX_VALUES",
    "And",
    "Eq",
    "Filter",
    "In",
    "Not",
    "Or",
    "Range",
    "Value",
    "check_fields",
    "check_filter",
    "fields_of",
    "matches",
]

Value: TypeAlias = str | int | float | bool

COLUMNS: dict[str, type] = {"id": str, "time": float, "source": str}
"""Fields that every item has beside its metadata; metadata of the same name is not searched."""

MAX_DEPTH = 32
"""Nested And, Or and Not in one filter."""
MAX_CONDITIONS = 256
"""Conditions in one filter."""
MAX_VALUES = 30_000
"""Values in one filter, those of In included."""

_TEXT = re.compile(r"[^\0\ud800-\udfff]*")
_NAME = re.compile(r'[^"\\\x00-\x1f\ud800-\udfff]{1,200}')


@dataclass(frozen=True, slots=True)
class Eq:
    """The field has this value; a field of tags holds this tag."""

    field: str
    value: Value


@dataclass(frozen=True, slots=True)
class In:
    """The field has one of these values; a field of tags holds one of these tags."""

    field: str
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """The field is a number between two values; None leaves a side open, but not both.

    Attributes:
        field: A number, or "time" in seconds since 1970 (UTC).
        low: Smallest value.
        high: Largest value.
        low_open: Whether `low` itself is out.
        high_open: Whether `high` itself is out.
    """

    field: str
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False


@dataclass(frozen=True, slots=True)
class And:
    """All of these conditions hold."""

    conditions: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """At least one of these conditions holds."""

    conditions: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """The condition does not hold; unknown, as the condition is, for a missing field."""

    condition: Filter


Filter: TypeAlias = Eq | In | Range | And | Or | Not


def matches(where: Filter, item: Item) -> bool:
    """Return whether a filter holds for an item: the definition that every store follows.

    Raises:
        InputError: As check_filter.
    """
    check_filter(where)
    return _holds(where, item) is True


def check_filter(where: Filter) -> None:
    """Check the types, numbers and size of a filter.

    Raises:
        InputError: If a part is no filter, a value cannot be compared (NaN, an integer beyond 64
            bits, a text for the time), or the filter is too large.
    """
    leaves = values = 0
    for leaf in _leaves(where, MAX_DEPTH):
        leaves += 1
        values += _check_leaf(leaf)
    if leaves > MAX_CONDITIONS:
        raise InputError(f"Filter: got {leaves} conditions, expected at most {MAX_CONDITIONS}.")
    if values > MAX_VALUES:
        raise InputError(
            f"Filter: got {values:,} values, expected at most {MAX_VALUES:,}. Mark the items with "
            "a tag and filter by that."
        )


def check_fields(where: Filter, known: Iterable[str]) -> None:
    """Check that every field of a filter is a column or one of these metadata fields.

    Raises:
        InputError: If a field is unknown; names the nearest known field.
    """
    names = [*COLUMNS, *(name for name in known if name not in COLUMNS)]
    for field in fields_of(where):
        if field not in names:
            shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise InputError(
                f"Unknown field in filter: got '{field}', expected one of {shown}."
                + did_you_mean(field, names)
            )


def fields_of(where: Filter) -> set[str]:
    """Return the fields that a filter names."""
    return {leaf.field for leaf in _leaves(where, MAX_DEPTH)}


def _leaves(where: Filter, depth: int) -> Iterator[Eq | In | Range]:
    if depth < 0:
        raise InputError(f"Filter: nested more than {MAX_DEPTH} deep. Use In for several values.")
    match where:
        case Eq() | In() | Range():
            yield where
        case Not():
            yield from _leaves(where.condition, depth - 1)
        case And() | Or():
            if not isinstance(where.conditions, tuple) or not where.conditions:
                raise InputError(
                    f"{type(where).__name__}: got {where.conditions!r}, expected a tuple of "
                    "conditions, at least one."
                )
            for condition in where.conditions:
                yield from _leaves(condition, depth - 1)
        case _:
            raise InputError(
                f"Filter: got {type(where).__name__}, expected Eq, In, Range, And, Or or Not. "
                "Read a text with mmedge.retrieval.parse_filter."
            )


def _check_leaf(leaf: Eq | In | Range) -> int:
    """Check one condition and return how many values it has."""
    if not isinstance(leaf.field, str) or not _NAME.fullmatch(leaf.field):
        raise InputError(
            f"Field of a filter: got {leaf.field!r}, expected 1 to 200 characters without quotes, "
            "backslashes and control characters."
        )
    column = COLUMNS.get(leaf.field)
    if isinstance(leaf, Range):
        bounds = [value for value in (leaf.low, leaf.high) if value is not None]
        if not bounds or not all(_is_number(value) for value in bounds):
            raise InputError(
                f"Range of '{leaf.field}': got {leaf.low!r} to {leaf.high!r}, expected one or two "
                "numbers."
            )
        if column is str:
            raise InputError(
                f"Range of '{leaf.field}': the field is a text, expected 'time' or a number."
            )
        return len(bounds)
    values = (leaf.value,) if isinstance(leaf, Eq) else leaf.values
    if not isinstance(values, tuple) or not values:
        raise InputError(f"In '{leaf.field}': got {values!r}, expected a tuple of values.")
    for value in values:
        if not _is_number(value) and not isinstance(value, str | bool):
            raise InputError(
                f"Value of '{leaf.field}': got {value!r}, expected a text, a finite number of at "
                "most 64 bits, or a boolean."
            )
        if isinstance(value, str) and not _TEXT.fullmatch(value):
            raise InputError(f"Value of '{leaf.field}': {value!r} is no Unicode text without NUL.")
        if column and isinstance(value, str) is not (column is str):
            expected = "a text" if column is str else "a number of seconds since 1970 (UTC)"
            raise InputError(f"Value of '{leaf.field}': got {value!r}, expected {expected}.")
        if column and isinstance(value, bool):
            raise InputError(f"Value of '{leaf.field}': got {value!r}, expected no boolean.")
    return len(values)


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return type(value) is int and -(2**63) <= value < 2**63


def _holds(where: Filter, item: Item) -> bool | None:
    match where:
        case And():
            parts = [_holds(condition, item) for condition in where.conditions]
            return False if False in parts else None if None in parts else True
        case Or():
            parts = [_holds(condition, item) for condition in where.conditions]
            return True if True in parts else None if None in parts else False
        case Not():
            part = _holds(where.condition, item)
            return None if part is None else not part
    of_item = {"id": item.id, "time": item.time, "source": item.source}
    value = (of_item if where.field in COLUMNS else item.metadata).get(where.field)
    if value is None:
        return None
    match where:
        case Eq():
            return _equals(value, where.value)
        case In():
            return any(_equals(value, one) for one in where.values)
    if isinstance(value, str | bool | list):
        return False
    above = where.low is None or value > where.low or (value == where.low and not where.low_open)
    below = (
        where.high is None or value < where.high or (value == where.high and not where.high_open)
    )
    return above and below


def _equals(got: object, wanted: Value) -> bool:
    if isinstance(got, list):
        return wanted in got if isinstance(wanted, str) else False
    if isinstance(got, bool | str) or isinstance(wanted, bool | str):
        return type(got) is type(wanted) and got == wanted
    return got == wanted
