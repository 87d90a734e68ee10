"""Safetensors files: named arrays of numbers and a few texts, read and written without torch.

A file is 8 bytes with the length of its header, the header in JSON, and the arrays, one after the
other. Nothing in it is executed; offsets are checked against the file before anything is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mmedge.errors import InputError, MmedgeError
from mmedge.files.atomic import write_atomic
from mmedge.files.json_file import parse_json, read_file

__all__ = ["MAX_BYTES", "pack_safetensors", "read_safetensors", "write_safetensors"]

Array: TypeAlias = NDArray[Any]

MAX_BYTES = 1 << 30
"""Largest file that is read or written."""

_HEADER_BYTES = 1 << 24
_MAX_AXES = 16
_METADATA = "__metadata__"
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items()}


def write_safetensors(
    path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays to a file, whole or not at all; the same arrays give the same bytes.

    Args:
        path: The file.
        arrays: By name.
        metadata: Texts by name.

    Raises:
        InputError: If a reader would refuse it: an array is of another dtype, of more than 16 axes
            or named "__metadata__", a text is not valid Unicode, or they are too large.
        StorageError: If the disk is full or the place cannot be written.
    """
    write_atomic(path, pack_safetensors(arrays, metadata))


def pack_safetensors(
    arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the content of a file; see write_safetensors."""
    size, room = sum(array.nbytes for array in arrays.values()), MAX_BYTES - _HEADER_BYTES - 8
    if size > room:
        raise InputError(f"Arrays: got {size} bytes, expected at most {room}. Pass fewer.")
    header: dict[str, object] = {_METADATA: dict(sorted((metadata or {}).items()))}
    blobs: list[bytes] = []
    at = 0
    for name, array in sorted(arrays.items()):
        plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        if plain.dtype not in _NAMES or array.ndim > _MAX_AXES or name == _METADATA:
            raise InputError(
                f"Array {name!r}: got {array.dtype}{array.shape}, expected a dtype of "
                f"{[str(dtype) for dtype in _NAMES]}, at most {_MAX_AXES} axes and a name other "
                f"than {_METADATA!r}."
            )
        blobs.append(plain.tobytes())
        header[name] = {
            "dtype": _NAMES[plain.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + len(blobs[-1])],
        }
        at += len(blobs[-1])
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"Names and texts: {error.object[error.start : error.end]!r} is not valid Unicode. "
            "Replace it."
        ) from error
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_BYTES:
        raise InputError(
            f"Names and texts: got {len(text)} bytes, expected at most {_HEADER_BYTES}. Shorten "
            "them."
        )
    return len(text).to_bytes(8, "little") + text + b"".join(blobs)


def read_safetensors(
    path: Path, *, error: Callable[[str], MmedgeError]
) -> tuple[dict[str, Array], dict[str, str]]:
    """Read a file: its arrays and texts by name.

    Args:
        path: The file.
        error: Makes the error from the reason why it cannot be read.

    Raises:
        MmedgeError: From `error`, if it cannot be read, is damaged, or is too large.
    """
    data = read_file(path, max_bytes=MAX_BYTES, error=error)
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(_HEADER_BYTES, len(data) - 8):
        raise error(f"{path}: is no safetensors file. Write it again.")
    header = parse_json(data[8 : 8 + length], path, error=error)
    if not isinstance(header, dict):
        raise error(f"{path}: its header is no JSON object. Write it again.")
    given = header.pop(_METADATA, {})
    if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
        raise error(f"{path}: its metadata are not texts by name. Write it again.")
    body = memoryview(data)[8 + length :]
    return {name: _array(path, name, entry, body, error) for name, entry in header.items()}, given


def _array(
    path: Path,
    name: str,
    entry: object,
    body: memoryview,
    error: Callable[[str], MmedgeError],
) -> Array:
    fields = entry if isinstance(entry, dict) else {}
    code, shape, place = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    sizes = shape if isinstance(shape, list) else [-1]
    ends = place if isinstance(place, list) and len(place) == 2 else [-1, -1]
    whole = all(type(each) is int and each >= 0 for each in (*sizes, *ends))
    if not whole or not isinstance(code, str) or code not in _DTYPES or len(sizes) > _MAX_AXES:
        raise error(f"{path}: '{name}' has a damaged header. Write it again.")
    dtype = np.dtype(_DTYPES[code])
    start, end = ends
    fits = start <= end <= len(body) and end - start == math.prod(sizes) * dtype.itemsize
    if not fits or math.prod(filter(None, sizes)) > MAX_BYTES:  # numpy bounds empty arrays too
        raise error(f"{path}: '{name}' lies outside the file or has another size. Write it again.")
    return np.frombuffer(body[start:end], dtype).reshape(sizes)
