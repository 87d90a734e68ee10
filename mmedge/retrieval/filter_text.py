"""Text form of filters: `time > 2026-01-01 and tag in ("kitchen", "hall")`, read and written.

    filter     = and-terms joined by `or`; terms joined by `and`; `not` before a term
    term       = "(" filter ")" | condition
    condition  = FIELD (= | != | < | <= | > | >=) VALUE
               | FIELD [not] in "(" VALUE, ... ")"
               | NUMBER (< | <=) FIELD (< | <=) NUMBER
    VALUE      = a text in quotes, a word, a number, true, false, a date or time

A word without quotes is letters, digits and `_ . - / : + @`, with a letter or `_` first; for the
fields `id` and `source` every word is a text. A date or time in ISO 8601 (2026-01-31,
2026-01-31T08:30, 2026-01-31T08:30:00+02:00) is seconds since 1970, in UTC unless an offset is
given; in quotes it is a text, except for the field `time`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from types import UnionType
from typing import NoReturn

from mmedge.errors import InputError
from mmedge.retrieval.filters import (
    COLUMNS,
    MAX_DEPTH,
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

__all__ = ["MAX_LENGTH", "filter_text", "parse_filter"]

MAX_LENGTH = 100_000
"""Characters in the text of a filter."""

_TOKENS = re.compile(
    r"""(?P<space>\s+)
    | (?P<quoted>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    | (?P<sign><=|>=|!=|[=<>(),])
    | (?P<word>[\w./:+@-]+)""",
    re.VERBOSE | re.DOTALL,
)
_KEYWORDS = {"and", "or", "not", "in", "true", "false"}
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_DATE = re.compile(
    r"(?P<day>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"([T ](?P<clock>[0-9]{2}:[0-9]{2}(:[0-9]{2})?)(\.(?P<fraction>[0-9]{1,6}))?"
    r"(?P<offset>Z|[+-][0-9]{2}:[0-9]{2})?)?"
)
_BARE = re.compile(r"[^\W0-9][\w./:+@-]*")
_SHOWN = 72
_MAX_DIGITS = 100


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str  # quoted, sign, word, keyword, end
    text: str  # without quotes; keywords in lower case
    start: int

    def is_sign(self, *signs: str) -> bool:
        return self.kind == "sign" and self.text in signs

    def is_keyword(self, *words: str) -> bool:
        return self.kind == "keyword" and self.text in words


def parse_filter(text: str) -> Filter:
    """Read a filter from its text form, which is data and never evaluated as code.

    Raises:
        InputError: If the text does not follow the form; shows the place.
    """
    if len(text) > MAX_LENGTH:
        raise InputError(
            f"Filter: got {len(text):,} characters, expected at most {MAX_LENGTH:,}. Build it from "
            "mmedge.retrieval.In, Range and And."
        )
    parser = _Parser(text)
    where = parser.alternatives(0)
    if parser.token.kind != "end":
        parser.fail("expected 'and', 'or' or the end")
    check_filter(where)
    return where


def filter_text(where: Filter) -> str:
    """Return the text form of a filter; parse_filter reads the same filter from it.

    Raises:
        InputError: As check_filter.
    """
    check_filter(where)
    return _text(where)


class _Parser:
    """Recursive descent over the tokens of one text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.token = self._next()

    def alternatives(self, depth: int) -> Filter:
        return self._joined("or", self._terms, Or, depth)

    def _terms(self, depth: int) -> Filter:
        return self._joined("and", self._term, And, depth)

    def _joined(
        self,
        word: str,
        part: Callable[[int], Filter],
        joined: type[And] | type[Or],
        depth: int,
    ) -> Filter:
        parts = [part(depth)]
        while self.token.is_keyword(word):
            self._take()
            parts.append(part(depth))
        return parts[0] if len(parts) == 1 else joined(tuple(parts))

    def _term(self, depth: int) -> Filter:
        if depth > MAX_DEPTH:
            self.fail(f"nested more than {MAX_DEPTH} deep")
        if self.token.is_keyword("not"):
            self._take()
            return Not(self._term(depth + 1))
        if self.token.is_sign("("):
            self._take()
            where = self.alternatives(depth + 1)
            self._expect(")")
            return where
        if self.token.kind == "word" and not _BARE.fullmatch(self.token.text):
            return self._checked(self._between)
        return self._checked(self._condition)

    def _checked(self, condition: Callable[[], Filter]) -> Filter:
        """Read one condition; what check_filter finds wrong is shown at its place."""
        start = self.token.start
        where = condition()
        try:
            check_filter(where)
        except InputError as error:
            self._fail_at(start, str(error).rstrip("."))
        return where

    def _between(self) -> Filter:
        low = self._bound("")
        low_open = self._sign("<", "<=") == "<"
        field = self._field()
        high_open = self._sign("<", "<=") == "<"
        return Range(field, low, self._bound(field), low_open, high_open)

    def _condition(self) -> Filter:
        field = self._field()
        if self.token.is_keyword("not"):
            self._take()
            if not self.token.is_keyword("in"):
                self.fail("expected 'in'")
            return Not(self._set(field))
        if self.token.is_keyword("in"):
            return self._set(field)
        sign = self._sign("=", "!=", "<", "<=", ">", ">=")
        if sign in ("=", "!="):
            equal = Eq(field, self._value(field))
            return equal if sign == "=" else Not(equal)
        bound = self._bound(field)
        if sign in ("<", "<="):
            return Range(field, high=bound, high_open=sign == "<")
        return Range(field, low=bound, low_open=sign == ">")

    def _set(self, field: str) -> Filter:
        self._take()
        self._expect("(")
        values = [self._value(field)]
        while self.token.is_sign(","):
            self._take()
            values.append(self._value(field))
        self._expect(")")
        return In(field, tuple(values))

    def _field(self) -> str:
        if self.token.kind not in ("word", "quoted"):
            self.fail("expected a field, such as time, source or tag")
        if self.token.kind == "word" and not _BARE.fullmatch(self.token.text):
            self.fail("expected a field; quote a name that begins with a digit")
        return self._take().text

    def _bound(self, field: str) -> float:
        value = self._read(field)
        if isinstance(value, str | bool):
            self.fail("expected a number or a date; texts are compared with = and != only")
        self._take()
        return value

    def _value(self, field: str) -> Value:
        value = self._read(field)
        if isinstance(value, float) and _is_day(self.token.text):
            day = self.token.text
            self.fail(f"{day} is the moment 00:00 UTC; give a range, or a text in quotes")
        self._take()
        return value

    def _read(self, field: str) -> Value:
        """Return the value of the token in hand, as the field takes it."""
        token = self.token
        if token.is_keyword("true", "false"):
            return token.text == "true"
        if token.kind not in ("word", "quoted"):
            self.fail("expected a value: a text in quotes, a number, a date, true or false")
        if COLUMNS.get(field) is str:
            return token.text
        date = _DATE.fullmatch(token.text)
        if date and (token.kind == "word" or field == "time"):
            return self._seconds(date)
        if token.kind == "quoted" or _BARE.fullmatch(token.text):
            if field == "time":
                self.fail("expected a date or time such as 2026-01-31T08:30, or seconds since 1970")
            return token.text
        if not _NUMBER.fullmatch(token.text):
            self.fail("neither a number nor a date such as 2026-01-31T08:30; quote a text")
        if len(token.text) > _MAX_DIGITS or not math.isfinite(float(token.text)):
            self.fail("the number is too large")
        return int(token.text) if token.text.lstrip("+-").isdecimal() else float(token.text)

    def _seconds(self, date: re.Match[str]) -> float:
        text = f"{date['day']}T{date['clock'] or '00:00'}"
        if date["fraction"]:
            text += "." + date["fraction"].ljust(6, "0")  # Python 3.10 reads no other width
        offset = date["offset"] or "Z"
        try:
            moment = datetime.fromisoformat(text + offset.replace("Z", "+00:00"))
        except ValueError as error:
            self.fail(f"no such date or time ({error})")
        return moment.timestamp()

    def _sign(self, *signs: str) -> str:
        if not self.token.is_sign(*signs):
            self.fail(f"expected one of {' '.join(signs)}")
        return self._take().text

    def _expect(self, sign: str) -> None:
        if not self.token.is_sign(sign):
            self.fail(f"expected '{sign}'")
        self._take()

    def _take(self) -> _Token:
        token, self.token = self.token, self._next()
        return token

    def _next(self) -> _Token:
        while self.position < len(self.text):
            found = _TOKENS.match(self.text, self.position)
            start = self.position
            if found is None:
                what = (
                    "this quote is not closed"
                    if self.text[start] in "\"'"
                    else "unexpected character"
                )
                self._fail_at(start, what)
            self.position = found.end()
            kind, text = str(found.lastgroup), found[0]
            if kind == "quoted":
                return _Token(kind, self._unquoted(text, start), start)
            if kind == "word" and text.lower() in _KEYWORDS:
                return _Token("keyword", text.lower(), start)
            if kind != "space":
                return _Token(kind, text, start)
        return _Token("end", "", len(self.text))

    def _unquoted(self, text: str, start: int) -> str:
        for escape in re.finditer(r"\\(.)", text, re.DOTALL):
            if escape[1] not in "\"'\\":
                self._fail_at(start + escape.start(), r"expected \" or \\ after a backslash")
        return re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL)

    def fail(self, what: str) -> NoReturn:
        """Raise the error for the token in hand."""
        self._fail_at(self.token.start, what)

    def _fail_at(self, place: int, what: str) -> NoReturn:
        first = max(0, min(place - _SHOWN // 2, len(self.text) - _SHOWN))
        line = self.text[first : first + _SHOWN].encode(errors="replace").decode()
        line = re.sub(r"[\s\x00-\x1f]", " ", line)
        raise InputError(f"Filter: {what}:\n  {line}\n  {' ' * (place - first)}^")


def _is_day(text: str) -> bool:
    found = _DATE.fullmatch(text)
    return found is not None and found["clock"] is None


def _text(where: Filter) -> str:
    match where:
        case And():
            return " and ".join(_part(part, And | Or) for part in where.conditions)
        case Or():
            return " or ".join(_part(part, Or) for part in where.conditions)
        case Not(Eq(field, value)):
            return f"{_name(field)} != {_value_text(value, field)}"
        case Not(In(field, values)):
            return f"{_name(field)} not in {_set_text(values, field)}"
        case Not(condition):
            return f"not {_part(condition, And | Or)}"
        case Eq(field, value):
            return f"{_name(field)} = {_value_text(value, field)}"
        case In(field, values):
            return f"{_name(field)} in {_set_text(values, field)}"
        case Range():
            return _range_text(where)


def _range_text(where: Range) -> str:
    name, field = _name(where.field), where.field
    above, below = ("<" if is_open else "<=" for is_open in (where.low_open, where.high_open))
    if where.high is None:
        return f"{name} {above.replace('<', '>')} {_value_text(where.low, field)}"
    text = f"{name} {below} {_value_text(where.high, field)}"
    return text if where.low is None else f"{_value_text(where.low, field)} {above} {text}"


def _part(where: Filter, joined: type[And | Or] | UnionType) -> str:
    return f"({_text(where)})" if isinstance(where, joined) else _text(where)


def _name(field: str) -> str:
    return field if _BARE.fullmatch(field) and field.lower() not in _KEYWORDS else f'"{field}"'


def _set_text(values: tuple[Value, ...], field: str) -> str:
    return f"({', '.join(_value_text(value, field) for value in values)})"


def _value_text(value: Value | None, field: str) -> str:
    if isinstance(value, str):
        return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    if isinstance(value, bool):
        return str(value).lower()
    if field == "time" and value is not None:
        with suppress(ValueError, OverflowError, OSError):
            moment = datetime.fromtimestamp(value, timezone.utc)
            if moment.timestamp() == value:
                return moment.isoformat().replace("+00:00", "Z")
    return repr(value)
