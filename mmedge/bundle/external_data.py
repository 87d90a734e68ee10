"""Which files an ONNX model wants to read besides itself, found without onnx.

An engine opens whatever path a tensor names as its external data, and not every version keeps to
the model's folder. So the paths are read from the protobuf, field by field, and nothing else is.
Field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from mmedge.errors import IntegrityError

__all__ = ["external_locations"]

_MAX_DEPTH = 64

# By message: the fields that lead to tensors, and what messages they hold.
_LEADING: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse",
    },
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}  # fmt: skip
_ENTRY_KEY, _ENTRY_VALUE = 1, 2

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def external_locations(model: Path) -> frozenset[str]:
    """Return every path that a tensor of an ONNX file names as its external data.

    Args:
        model: An ONNX file. It is mapped, not read: weights are stepped over.

    Raises:
        IntegrityError: If the file cannot be read or is no ONNX model.
    """
    try:
        with (
            model.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return frozenset(_locations(data, 0, len(data), "model", 0))
    except OSError as error:
        raise IntegrityError(f"Cannot read {model}: {error.strerror}.") from error
    except ValueError as error:  # also what mmap says of an empty file
        raise IntegrityError(
            f"{model} is not an ONNX model: {error}. Copy the bundle again, or convert again."
        ) from error


def _locations(data: mmap.mmap, start: int, end: int, message: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    if message == "entry":
        fields = [(number, data[a:b]) for number, a, b in _fields(data, start, end)]
        if (_ENTRY_KEY, b"location") in fields:
            yield from (value.decode() for number, value in fields if number == _ENTRY_VALUE)
        return
    leading = _LEADING[message]
    for number, a, b in _fields(data, start, end):
        if number in leading:
            yield from _locations(data, a, b, leading[number], depth + 1)


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and end of every length-delimited field of a message."""
    position = start
    while position < end:
        tag, position = _varint(data, position, end)
        kind = tag & 7
        size = 0
        if kind == _VARINT:
            _, position = _varint(data, position, end)
        elif kind == _LENGTH:
            size, position = _varint(data, position, end)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind} at byte {position}")
        if size > end - position:
            raise ValueError(f"a field at byte {position} is cut off")
        if kind == _LENGTH:
            yield tag >> 3, position, position + size
        position += size


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise ValueError(f"a number at byte {position} is cut off")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"a number at byte {position} is too long")
