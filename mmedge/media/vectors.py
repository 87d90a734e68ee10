"""Files of ready vectors: numpy (.npy, .npz), Parquet and Arrow. Nothing is unpickled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mmedge.errors import DTypeError, InputError, ShapeError
from mmedge.files.json_file import parse_json
from mmedge.files.npz_file import NPY_ERRORS, NpzArray, open_npz
from mmedge.media.frames import require
from mmedge.specs import Array, Float32Array

__all__ = ["VECTOR_SUFFIXES", "VectorRow", "VectorRows", "open_vectors"]

VECTOR_SUFFIXES = frozenset({".arrow", ".feather", ".npy", ".npz", ".parquet"})

_ROWS = 4096  # rows read at once
_BLOCK_BYTES = 64 << 20  # of numpy columns read at once
_NAMES = ("vector", "vectors", "embedding", "embeddings")
_FIELDS = ("time", "source", "text", "content_hash", "revision", "origin")

Cell: TypeAlias = str | int | float | bool | list[str] | None


@dataclass(frozen=True, slots=True, eq=False)
class VectorRow:
    """One vector with what its file says of it.

    Attributes:
        id: The item's; rows of one id that follow each other are one item.
        vector: (D,) float32, as it is in the file.
        time: Seconds since 1970 (UTC).
        source: Where the item comes from.
        text: Its text.
        content_hash: Hash of the source's content.
        revision: Microseconds since 1970 of the last change; 0 if the file has none.
        origin: The index in which that was made.
        metadata: Every other column.
    """

    id: str
    vector: Float32Array = field(repr=False)
    time: float | None = None
    source: str | None = None
    text: str | None = None
    content_hash: str | None = None
    revision: int = 0
    origin: str = ""
    metadata: Mapping[str, Cell] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VectorRows:
    """An opened file of vectors.

    Attributes:
        path: The file.
        dim: D, the length of its vectors.
        count: Number of its rows.
        space: Embedding-space fingerprint that it names; None if it names none.
        read: Yields the rows, some thousand in memory at a time.
    """

    path: Path
    dim: int
    count: int
    space: str | None
    read: Callable[[], Iterator[VectorRow]]

    def __iter__(self) -> Iterator[VectorRow]:
        """Yield the rows.

        Raises:
            InputError: If a row cannot be used; its number is named.
        """
        return self.read()


def open_vectors(path: Path) -> VectorRows:
    """Open a file of vectors and check its columns.

    The vectors are the array or column `vector`, `vectors`, `embedding` or `embeddings`, or the
    only one of two dimensions: float16, float32 or float64. `id` names the items; without it, rows
    are numbered from 0. `time`, `source`, `text`, `content_hash`, `revision` and `origin` have
    their meaning (a plural s is accepted), a column `metadata` of JSON objects is unpacked, and any
    other column is metadata.

    Args:
        path: A .npy, .npz, .parquet, .arrow or .feather file.

    Raises:
        InputError: If the file cannot be read, holds pickled objects, has no vectors, or columns
            of unequal length (ShapeError) or of another type (DTypeError).
    """
    suffix = path.suffix.lower()
    if suffix not in VECTOR_SUFFIXES:
        known = ", ".join(sorted(VECTOR_SUFFIXES))
        raise InputError(f"{path}: got {suffix or 'no suffix'}, expected one of {known}.")
    if not path.is_file():
        raise InputError(f"{path}: no such file. Check the path.")
    if suffix in (".npy", ".npz"):
        return _numpy_rows(path)
    return _arrow_rows(path, suffix)


def _numpy_rows(path: Path) -> VectorRows:
    def error(reason: str) -> InputError:
        pickled = "allow_pickle" in reason or "Python objects" in reason
        what = "holds pickled objects" if pickled else f"cannot be read ({reason})"
        return InputError(
            f"{path}: {what}. Write it with numpy.savez from arrays of numbers and of text."
        )

    columns: dict[str, Array | NpzArray] = {}
    space: Array | None = None
    if path.suffix.lower() == ".npy":
        try:
            columns["vectors"] = np.lib.format.open_memmap(path, mode="r")
        except NPY_ERRORS as failure:
            raise error(str(failure)) from failure
    else:
        members = open_npz(path, error=error)
        if "space" in members and not members["space"].shape:
            space = members["space"].read()
        columns |= {name: array for name, array in members.items() if array.shape}
    key = _vector_column(path, {name: len(array.shape) == 2 for name, array in columns.items()})
    vectors = columns.pop(key)
    count = vectors.shape[0]
    if len(vectors.shape) != 2 or 0 in vectors.shape:
        raise ShapeError(f"{path}: '{key}' has the shape {vectors.shape}, expected (rows, width).")
    if vectors.dtype.kind != "f":
        raise DTypeError(
            f"{path}: '{key}' has dtype {vectors.dtype.name}, expected float16, float32 or float64."
        )
    for name, array in columns.items():
        if array.shape != (count,):
            raise ShapeError(
                f"{path}: '{name}' has the shape {array.shape}, expected ({count},): one value a "
                f"row of '{key}'."
            )
        if array.dtype.kind not in "Uiufb":
            raise DTypeError(
                f"{path}: '{name}' has dtype {array.dtype.name}, expected text or numbers."
            )

    row_bytes = vectors.shape[1] * 8 + sum(array.dtype.itemsize for array in columns.values())
    rows = min(_ROWS, max(1, _BLOCK_BYTES // row_bytes))  # a long text makes its column wide

    def read() -> Iterator[VectorRow]:
        arrays = (vectors, *columns.values())
        parts = zip(*(_blocks(array, rows) for array in arrays), strict=True)
        for number, (part, *values) in enumerate(parts):
            cells = {name: each.tolist() for name, each in zip(columns, values, strict=True)}
            yield from _rows(path, number * rows, np.asarray(part, np.float32), cells)

    named = None if space is None or space.dtype.kind != "U" else str(space) or None
    return VectorRows(path, vectors.shape[1], count, named, read)


def _blocks(column: Array | NpzArray, rows: int) -> Iterator[Array]:
    """Yield a column some rows at a time."""
    if isinstance(column, NpzArray):
        yield from column.blocks(rows)
    else:
        yield from (column[start : start + rows] for start in range(0, len(column), rows))


def _arrow_rows(path: Path, suffix: str) -> VectorRows:
    what = f"{path}: Parquet and Arrow files"
    arrow = require("pyarrow", what)
    try:
        if suffix == ".parquet":
            parquet = require("pyarrow.parquet", what)
            file = parquet.ParquetFile(path)
            schema, count = file.schema_arrow, file.metadata.num_rows
        else:
            with require("pyarrow.ipc", what).open_file(arrow.memory_map(str(path))) as reader:
                schema = reader.schema
                count = sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Write it again.") from error
    lists = {entry.name: _is_vector(arrow, entry.type) for entry in schema}
    key = _vector_column(path, lists)
    if not lists[key]:
        raise DTypeError(
            f"{path}: '{key}' has the type {schema.field(key).type}, expected lists of float16, "
            "float32 or float64."
        )
    dim = getattr(schema.field(key).type, "list_size", None)

    def batches() -> Iterator[Any]:
        if suffix == ".parquet":
            with require("pyarrow.parquet", what).ParquetFile(path) as opened:
                yield from opened.iter_batches(_ROWS)
        else:
            with require("pyarrow.ipc", what).open_file(arrow.memory_map(str(path))) as opened:
                for index in range(opened.num_record_batches):
                    batch = opened.get_batch(index)
                    for start in range(0, batch.num_rows, _ROWS):
                        yield batch.slice(start, _ROWS)

    def read() -> Iterator[VectorRow]:
        start = 0
        try:
            for batch in batches():
                vectors = _matrix(path, key, start, batch.column(key), found)
                values = {n: batch.column(n).to_pylist() for n in batch.schema.names if n != key}
                yield from _rows(path, start, vectors, values)
                start += batch.num_rows
        except arrow.ArrowException as error:
            raise InputError(f"{path}: damaged after row {start} ({error}).") from error

    found = dim or _first_width(path, key, batches)
    recorded = (schema.metadata or {}).get(b"mmedge.space")
    space = None if recorded is None else recorded.decode("utf-8", "replace") or None
    return VectorRows(path, found, count, space, read)


def _is_vector(arrow: Any, kind: Any) -> bool:  # noqa: ANN401, pyarrow and its type
    types = arrow.types
    listed = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(listed and types.is_floating(kind.value_type))


def _first_width(path: Path, key: str, batches: Callable[[], Iterator[Any]]) -> int:
    for batch in batches():
        if batch.num_rows and batch.column(key)[0].is_valid:
            return len(batch.column(key)[0])
    raise InputError(f"{path}: '{key}' has no vectors in its first row.")


def _matrix(path: Path, key: str, start: int, column: Any, dim: int) -> Float32Array:  # noqa: ANN401
    """Return a column of lists as (rows, dim) float32."""
    sizes = column.value_lengths().to_pylist()
    for row, size in enumerate(sizes):
        if size != dim:
            got = "nothing" if size is None else f"{size} values"
            raise ShapeError(f"{path}: row {start + row} of '{key}' has {got}, expected {dim}.")
    flat = column.flatten()
    if flat.null_count:
        raise InputError(f"{path}: '{key}' has missing values near row {start}. Fill or drop them.")
    return np.asarray(flat.to_numpy(zero_copy_only=False), np.float32).reshape(-1, dim)


def _vector_column(path: Path, columns: Mapping[str, bool]) -> str:
    """Return the name of the vectors.

    Args:
        path: The file, for messages.
        columns: Whether a column has two dimensions, by name.
    """
    named = [name for name in columns if name.lower() in _NAMES]
    wide = named or [name for name, matrix in columns.items() if matrix]
    if len(wide) != 1:
        raise InputError(
            f"{path}: expected one column of vectors named 'vector', got {sorted(columns)}."
        )
    return wide[0]


def _rows(
    path: Path, start: int, vectors: Array, values: Mapping[str, Sequence[Any]]
) -> Iterator[VectorRow]:
    known = {"id", *_FIELDS, "metadata"}
    singular = {name: name.removesuffix("s") for name in values}
    columns = {one if one in known else name: values[name] for name, one in singular.items()}
    ids = columns.pop("id", None)
    for row, vector in enumerate(vectors):
        place = f"{path}: row {start + row}"
        cells = {name: column[row] for name, column in columns.items()}
        given = {name: cells.pop(name, None) for name in _FIELDS}
        metadata = _metadata(place, cells)
        yield VectorRow(
            str(start + row) if ids is None else _identity(place, ids[row]),
            vector,
            time=_time(place, given["time"]),
            source=_text(given["source"]),
            text=_text(given["text"]),
            content_hash=_text(given["content_hash"]),
            revision=_revision(place, given["revision"]),
            origin=_text(given["origin"]) or "",
            metadata=metadata,
        )


def _identity(place: str, value: object) -> str:
    if value is None or value == "" or not isinstance(value, str | int):
        raise InputError(f"{place}: got the id {value!r}, expected a text or a whole number.")
    return str(value)


def _time(place: str, value: object) -> float | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    stamp = getattr(value, "timestamp", None)  # datetime, as Parquet's timestamps are read
    if stamp is not None:
        return float(stamp())
    if isinstance(value, int | float):
        return float(value)
    raise InputError(f"{place}: got the time {value!r}, expected seconds since 1970.")


def _revision(place: str, value: object) -> int:
    if value is None or value == "":
        return 0
    try:
        return int(value)  # type: ignore[call-overload, no-any-return]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{place}: got the revision {value!r}, expected a whole number."
        ) from error


def _text(value: object) -> str | None:
    return None if value is None or value == "" else str(value)


def _metadata(place: str, cells: dict[str, Any]) -> dict[str, Cell]:
    packed = cells.pop("metadata", None)
    if isinstance(packed, str) and packed:
        unpacked = parse_json(packed.encode("utf-8", "replace"), place, error=InputError)
        if not isinstance(unpacked, dict):
            raise InputError(f"{place}: its metadata is not a JSON object.")
        cells |= unpacked
    elif isinstance(packed, dict):
        cells |= packed
    elif packed is not None and packed != "":
        raise InputError(f"{place}: its metadata is {packed!r}, expected a JSON object.")
    for name, value in cells.items():
        tags = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        if not (value is None or tags or isinstance(value, str | int | float | bool)):
            raise InputError(
                f"{place}: '{name}' is a {type(value).__name__}, expected a text, a number, "
                "true or false, or a list of texts."
            )
    return cells
