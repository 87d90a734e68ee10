"""Filters as SQL conditions over the record's items, and which items they allow."""

from __future__ import annotations

import json
import sqlite3
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mmedge.retrieval.filter_text import filter_text
from mmedge.retrieval.filters import (
    COLUMNS,
    And,
    Eq,
    Filter,
    In,
    Not,
    Or,
    Range,
    Value,
    check_filter,
)

__all__ = ["AllowedItems", "Condition", "KeyMask", "allowed", "compile_filter"]

KeyMask: TypeAlias = NDArray[np.bool_]
"""Whether an item is allowed, by its key; a key beyond the end is not."""


@dataclass(frozen=True, slots=True)
class Condition:
    """An SQL expression over the table `items` and the values of its numbered parameters.

    Attributes:
        sql: 1, 0 or NULL for a row, NULL being unknown; its parameters are ?1, ?2 and so on.
        parameters: Values by number.
    """

    sql: str
    parameters: tuple[str | int | float, ...]


def compile_filter(where: Filter) -> Condition:
    """Return the condition of a filter; nothing of the filter is pasted into the SQL.

    Raises:
        InputError: As check_filter.
    """
    check_filter(where)
    bound = _Parameters()
    sql = _sql(where, bound)
    return Condition(sql, tuple(bound.values))


@dataclass
class _Parameters:
    values: list[str | int | float] = field(default_factory=list)

    def bind(self, value: str | int | float) -> str:
        self.values.append(value)
        return f"?{len(self.values)}"

    def bind_number(self, value: float) -> str:
        """Bind a number that is compared with one of the metadata.

        SQLite reads the metadata's decimals and may differ from Python in the last bit, so it
        reads this one too.
        """
        return f"CAST({self.bind(repr(value))} AS {'REAL' if isinstance(value, float) else 'INT'})"


def _sql(where: Filter, bound: _Parameters) -> str:
    match where:
        case And() | Or():
            word = " AND " if isinstance(where, And) else " OR "
            return f"({word.join(_sql(condition, bound) for condition in where.conditions)})"
        case Not():
            return f"(NOT {_sql(where.condition, bound)})"
        case Eq():
            return _one_of(where.field, (where.value,), bound)
        case In():
            return _one_of(where.field, where.values, bound)
        case Range():
            return _between(where, bound)


def _between(where: Range, bound: _Parameters) -> str:
    column = where.field in COLUMNS
    name = where.field if column else f"json_extract(metadata, {bound.bind(_path(where.field))})"
    sides = [(where.low, ">", where.low_open), (where.high, "<", where.high_open)]
    sql = " AND ".join(
        f"{name} {sign}{'' if is_open else '='} "
        + (bound.bind(value) if column else bound.bind_number(value))
        for value, sign, is_open in sides
        if value is not None
    )
    return f"({sql})" if column else _by_type(where.field, {"integer": sql, "real": sql}, bound)


def _one_of(name: str, values: tuple[Value, ...], bound: _Parameters) -> str:
    if name == "time":
        return f"(time IN ({', '.join(map(bound.bind, values))}))"
    if name in COLUMNS:
        return f"({name} IN ({_set(values, bound)}))"
    path = bound.bind(_path(name))
    value = f"json_extract(metadata, {path})"
    texts = tuple(value for value in values if isinstance(value, str))
    numbers = tuple(value for value in values if not isinstance(value, str | bool))
    cases = {str(value).lower(): "1" for value in values if isinstance(value, bool)}
    if texts:
        among = f"IN ({_set(texts, bound)})"
        tags = f"SELECT 1 FROM json_each(metadata, {path}) WHERE value {among}"  # noqa: S608
        cases |= {"text": f"{value} {among}", "array": f"EXISTS ({tags})"}
    if numbers:
        cases |= dict.fromkeys(("integer", "real"), f"{value} IN ({_set(numbers, bound)})")
    return _by_type(name, cases, bound)


def _set(values: tuple[Value, ...], bound: _Parameters) -> str:
    # One parameter: the time to read numbered ones grows with the square of their number.
    values_json = bound.bind(json.dumps(values, ensure_ascii=False))
    return f"SELECT value FROM json_each({values_json})"  # noqa: S608, a number of a parameter


def _by_type(name: str, cases: dict[str, str], bound: _Parameters) -> str:
    kind = f"coalesce(json_type(metadata, {bound.bind(_path(name))}), 'null')"
    whens = " ".join(f"WHEN '{type_}' THEN {sql}" for type_, sql in cases.items())
    return f"(CASE {kind} WHEN 'null' THEN NULL {whens} ELSE 0 END)"


def _path(name: str) -> str:
    return f'$."{name}"'  # check_filter allows no quote and no backslash in a name


class AllowedItems:
    """Which items each of the last filters allows; after a change only changed items are read.

    Args:
        kept: Filters whose masks are kept.
    """

    def __init__(self, kept: int = 16) -> None:
        self._kept = kept
        self._masks: OrderedDict[tuple[str, str], tuple[int, KeyMask]] = OrderedDict()

    def mask(self, record: sqlite3.Connection, where: Filter, *, of: str, seq: int) -> KeyMask:
        """Return the items that a filter allows at one moment; not to be written to.

        A deleted item may stay allowed.

        Args:
            record: The index's SQLite file, in a read transaction.
            where: The filter, its fields checked.
            of: Names the index; another name where keys have come to mean other items.
            seq: Number of the last change that the transaction sees.

        Raises:
            InputError: As check_filter.
        """
        condition = compile_filter(where)
        # Its text, since Eq("on", 1) equals Eq("on", True) in Python.
        name = (of, filter_text(where))
        seen, mask = self._masks.get(name, (-1, np.zeros(0, np.bool_)))
        if seen == seq:
            self._masks.move_to_end(name)
            return mask
        if 0 <= seen < seq:
            mask = _updated(mask, record, condition, seen)
        else:
            sql = f"SELECT key FROM items WHERE {condition.sql}"  # noqa: S608, parametrised
            mask = _marked(mask[:0], _keys(record, sql, condition.parameters), allowed=True)
        self._masks[name] = (seq, mask)
        while len(self._masks) > self._kept:
            self._masks.popitem(last=False)
        return mask


def allowed(mask: KeyMask, keys: NDArray[np.int64]) -> KeyMask:
    """Return which of these (N,) item keys a mask allows."""
    inside = keys < len(mask)
    inside[inside] = mask[keys[inside]]
    return inside


def _updated(mask: KeyMask, record: sqlite3.Connection, condition: Condition, seen: int) -> KeyMask:
    """Return the mask with the items that were written since it was read."""
    # LIMIT keeps the written items apart: SQLite must not begin with an index of the condition.
    written = f"SELECT * FROM items WHERE seq > ?{len(condition.parameters) + 1} LIMIT -1"  # noqa: S608
    sql = f"SELECT key FROM ({written})"  # noqa: S608, parametrised
    parameters = (*condition.parameters, seen)
    mask = _marked(mask, _keys(record, sql, parameters), allowed=False)
    return _marked(mask, _keys(record, f"{sql} WHERE {condition.sql}", parameters), allowed=True)


def _keys(
    record: sqlite3.Connection, sql: str, parameters: tuple[str | int | float, ...]
) -> NDArray[np.int64]:
    return np.fromiter((key for (key,) in record.execute(sql, parameters)), np.int64)


def _marked(mask: KeyMask, keys: NDArray[np.int64], *, allowed: bool) -> KeyMask:
    size = max(len(mask), keys.max(initial=-1) + 1)
    marked = np.concatenate([mask, np.zeros(size - len(mask), np.bool_)])
    marked[keys] = allowed
    return marked
