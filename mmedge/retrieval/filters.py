"""Filters as data: conditions on an item's time, source and metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["And", "Eq", "Filter", "In", "Not", "Or", "Range", "Value"]

Value: TypeAlias = str | int | float | bool


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
    """The field lies between two values; None leaves a side open.

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
    """The condition does not hold; a missing field does not hold either."""

    condition: Filter


Filter: TypeAlias = Eq | In | Range | And | Or | Not
