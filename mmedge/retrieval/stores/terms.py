"""Filters for Milvus: what is stored of an item's fields, and the expression of a filter over it.

An item's fields become a list of tokens, hashes of (name, type, value), and for each numeric field
a text of hexadecimal digits that sorts as the number does. Expressions hold nothing else, so that
nothing of a filter or of an item's metadata, however hostile, can be part of an expression; and no
two servers can differ in how they read a number or a quote.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Sequence
from typing import TypeAlias

from mmedge.retrieval.filters import (
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
from mmedge.retrieval.items import Item, MetadataValue

__all__ = ["TERMS", "Terms", "filter_expression", "hash_text", "terms_of"]

TERMS = "terms"
"""The JSON field of a row that holds its Terms."""

Terms: TypeAlias = dict[str, list[str] | str]
"""Key "t": the tokens of an item; key "n" and a name's hash: a numeric field's sortable text."""


def hash_text(*parts: str, size: int = 12) -> str:
    """Return a hash of some texts, `size` bytes as 4/3 characters of [A-Za-z0-9_-]."""
    hashed = hashlib.blake2b(digest_size=size)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        hashed.update(len(data).to_bytes(8, "little") + data)
    return base64.urlsafe_b64encode(hashed.digest()).decode("ascii")


def terms_of(item: Item) -> Terms:
    """Return what a filter can ask of an item; fields that are None are left out."""
    fields: dict[str, MetadataValue] = {
        **item.metadata,
        "id": item.id,
        "time": item.time,
        "source": item.source,
    }
    tokens: set[str] = set()
    terms: Terms = {}
    for name, value in fields.items():
        if value is None:
            continue
        tokens.add(_exists(name))
        if isinstance(value, list):
            tokens.update(_token(name, tag) for tag in value)
            continue
        tokens.add(_token(name, value))
        if isinstance(value, int | float) and not isinstance(value, bool):
            tokens.add(_numeric(name))
            terms[_number(name)] = _sortable(value)
    terms["t"] = sorted(tokens)
    return terms


def filter_expression(where: Filter) -> str:
    """Return a filter as a Milvus expression, with the meaning of mmedge.retrieval.matches.

    Raises:
        InputError: As check_filter.
    """
    check_filter(where)
    return _known(where, holds=True)


def _known(where: Filter, *, holds: bool) -> str:
    """Return the expression of "the filter is known to hold", or "known not to hold"."""
    match where:
        case Not():
            return _known(where.condition, holds=not holds)
        case And() | Or():
            word = " and " if isinstance(where, And) is holds else " or "
            return f"({word.join(_known(part, holds=holds) for part in where.conditions)})"
        case Eq():
            return _one_of(where.field, (where.value,), holds=holds)
        case In():
            return _one_of(where.field, where.values, holds=holds)
        case Range():
            return _between(where, holds=holds)


def _one_of(name: str, values: Sequence[Value], *, holds: bool) -> str:
    among = _contains(sorted({_token(name, value) for value in values}))
    return among if holds else f"({_contains([_exists(name)])} and not {among})"


def _between(where: Range, *, holds: bool) -> str:
    number = f'{TERMS}["{_number(where.field)}"]'
    numeric = _contains([_numeric(where.field)])
    low, high = (">" if where.low_open else ">="), ("<" if where.high_open else "<=")
    opposite = {">": "<=", ">=": "<", "<": ">=", "<=": ">"}
    sides = [(low, where.low), (high, where.high)]
    if holds:
        parts = [f'{number} {sign} "{_sortable(end)}"' for sign, end in sides if end is not None]
        return f"({numeric} and {' and '.join(parts)})"
    # Not "not (...)": comparing what is not there is false or unknown, by the server's version.
    parts = [
        f'{number} {opposite[sign]} "{_sortable(end)}"' for sign, end in sides if end is not None
    ]
    return (
        f"(({_contains([_exists(where.field)])} and not {numeric})"
        f" or ({numeric} and ({' or '.join(parts)})))"
    )


def _contains(tokens: Sequence[str]) -> str:
    if len(tokens) == 1:
        return f'json_contains({TERMS}["t"], "{tokens[0]}")'
    listed = ", ".join(f'"{token}"' for token in tokens)
    return f'json_contains_any({TERMS}["t"], [{listed}])'


def _token(name: str, value: Value) -> str:
    if isinstance(value, bool):
        return hash_text("bool", name, str(value))
    if isinstance(value, str):
        return hash_text("text", name, value)
    # 1 and 1.0 are one value, and so are 2**60 and 2.0**60; 2**60 + 1 is another.
    whole = isinstance(value, int) or value.is_integer()
    return hash_text("number", name, str(int(value)) if whole else repr(value))


def _sortable(value: float) -> str:
    """Return 20 digits for a number of at most 64 bits; they sort as the numbers do, exactly."""
    nearest = float(value) + 0.0  # -0.0 is 0.0
    bits = int.from_bytes(struct.pack(">d", nearest), "big")
    bits = bits ^ (2**64 - 1) if bits >> 63 else bits | 1 << 63
    rest = value - int(nearest) if isinstance(value, int) else 0  # -1024 to 1024
    return f"{bits:016x}{rest + 2048:04x}"


def _exists(name: str) -> str:
    return hash_text("exists", name)


def _numeric(name: str) -> str:
    return hash_text("numeric", name)


def _number(name: str) -> str:
    return "n" + hash_text("name", name)
