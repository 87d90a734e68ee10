"""Reader of untrusted JSON: bounded in size, depth and numbers, without repeated keys."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mmedge.errors import MmedgeError

__all__ = ["parse_json", "read_file", "read_json"]

_MAX_DEPTH = 64
_MAX_VALUES = 1 << 21  # each takes some 50 bytes of memory, even if shorter in the file
_MAX_DIGITS = 400
_DIGITS = bytes.maketrans(b"123456789", b"0" * 9)

_NumberT = TypeVar("_NumberT", int, float)
_Error = Callable[[str], MmedgeError]


def read_json(path: Path, *, max_bytes: int, error: _Error) -> object:
    """Read a JSON file; see read_file and parse_json.

    Args:
        path: The file.
        max_bytes: A larger file is refused before it is read.
        error: Makes the error from its message: a class of MmedgeError.

    Raises:
        MmedgeError: `error`.
    """
    return parse_json(read_file(path, max_bytes=max_bytes, error=error), path, error=error)


def read_file(path: Path, *, max_bytes: int, error: _Error) -> bytes:
    """Return the content of a regular file of bounded size; a pipe or a device is not opened.

    Raises:
        MmedgeError: `error`.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{path} is not a regular file. Copy it again.")
            if status.st_size > max_bytes:
                raise error(
                    f"{path} has {status.st_size} bytes, expected at most {max_bytes >> 10} KiB."
                )
            return file.read(status.st_size)
    except (OSError, ValueError) as failure:  # ValueError: a null byte in the path
        reason = getattr(failure, "strerror", None) or failure
        raise error(f"Cannot read {path}: {reason}.") from failure


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for a writer


def parse_json(data: bytes, place: object, *, error: _Error) -> object:
    """Parse JSON.

    Args:
        data: UTF-8.
        place: Where it came from, for messages.
        error: Makes the error from its message: a class of MmedgeError.

    Raises:
        MmedgeError: `error`, if it is not UTF-8 JSON, repeats a key in one object, is nested
            deeper than 64 levels, has more than two million values, or holds NaN, an infinity, a
            number beyond a float's range or of more than 400 digits.
    """
    if data.count(b",") + data.count(b"[") + data.count(b"{") > _MAX_VALUES:
        raise error(f"{place} has more than {_MAX_VALUES} JSON values. It is damaged.")
    try:
        text = data.decode("utf-8")
        document: object = json.loads(
            text,
            object_pairs_hook=_without_repeats,
            parse_constant=_refuse_constant,
            parse_float=lambda digits: _number(digits, float),
            # A vocabulary has some 100,000 integers, so they are checked only if one is long.
            parse_int=(lambda digits: _number(digits, int)) if _is_long(data) else int,
        )
        _check_depth(document)
    except UnicodeDecodeError as failure:
        raise error(f"{place} is not UTF-8 (byte {failure.start}). It is damaged.") from failure
    except json.JSONDecodeError as failure:
        raise error(
            f"{place} is not JSON: {failure.msg} at line {failure.lineno}, column {failure.colno}. "
            "It is damaged or cut off."
        ) from failure
    except ValueError as failure:
        raise error(f"{place} is not valid JSON: {failure}.") from failure
    except RecursionError:
        raise error(f"{place} is not valid JSON: {_TOO_DEEP}.") from None
    return document


_TOO_DEEP = f"nested deeper than {_MAX_DEPTH} levels"


def _is_long(data: bytes) -> bool:
    return data.translate(_DIGITS).find(b"0" * _MAX_DIGITS) >= 0


def _check_depth(document: object) -> None:
    level: list[Any] = [document]
    for _ in range(_MAX_DEPTH + 1):
        level = [node for node in level if isinstance(node, (dict, list))]
        if not level:
            return
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
    raise ValueError(_TOO_DEEP)


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # Readers may differ in which of two equal keys they use, so both are rejected.
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} appears twice in one object")
            seen.add(key)
    return made


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON number")


def _number(digits: str, kind: Callable[[str], _NumberT]) -> _NumberT:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    value = kind(digits)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{digits} is beyond the range of a float")
    return value
