"""Checks of what callers pass to an index."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TypeAlias, TypeVar

import numpy as np

from mmedge.errors import DTypeError, InputError, ShapeError
from mmedge.retrieval.items import Metadata
from mmedge.specs import Array, Float32Array

__all__ = [
    "Time",
    "Vectors",
    "checked_ids",
    "checked_k",
    "checked_metadata",
    "checked_recall",
    "checked_space",
    "checked_texts",
    "checked_times",
    "checked_vectors",
    "query_vectors",
]

Time: TypeAlias = float | datetime
"""Seconds since 1970 (UTC), or a datetime with a time zone."""

Vectors: TypeAlias = Array | Sequence[Array]
"""(N, D): a vector an item; or a sequence of (D,) or (V, D) arrays: an item each."""

_T = TypeVar("_T")
_NAME = re.compile(r'[^"\\\x00-\x1f]+')
_MAX_ID = 4096
_MAX_TEXT = 1 << 20
_MAX_SPACE = 1024
_MAX_METADATA = 1 << 20
_MAX_PARTS = 1 << 20
_AT_ONCE = 16_384  # vectors that are normalised together


def checked_ids(ids: str | Sequence[str], what: str = "ids") -> list[str]:
    """Return ids as a list.

    Raises:
        InputError: If one is not a usable string, or comes twice.
    """
    listed = [ids] if isinstance(ids, str) else list(ids)
    for place, name in enumerate(listed):
        _check_text(name, f"{what}[{place}]", _MAX_ID)
        if not name:
            raise InputError(f"{what}[{place}]: got an empty id, expected a name.")
    if len(set(listed)) != len(listed):
        twice = [name for name, count in Counter(listed).items() if count > 1][:3]
        raise InputError(f"{what}: {twice} come more than once. Give every item an id of its own.")
    return listed


def checked_texts(
    texts: str | Sequence[str | None] | None, count: int, what: str
) -> list[str | None]:
    """Return a text an item, or None for each; a single one is for a single item.

    Raises:
        InputError: If there are more or fewer than items, or one is not a usable string.
    """
    if texts is None:
        return [None] * count
    listed = _as_many([texts] if isinstance(texts, str) else list(texts), count, what)
    for place, text in enumerate(listed):
        if text is not None:
            _check_text(text, f"{what}[{place}]", _MAX_TEXT)
    return listed


def checked_space(space: str) -> str:
    """Return the fingerprint of an embedding space.

    Raises:
        InputError: If it is empty, longer than 1,024 characters or no usable string.
    """
    _check_text(space, "space", _MAX_SPACE)
    if not space:
        raise InputError("space: got an empty text. Leave it out if the space is unknown.")
    return space


def checked_times(times: Time | Sequence[Time | None] | None, count: int) -> list[float | None]:
    """Return seconds since 1970 for each item.

    Raises:
        InputError: If there are more or fewer than items, or one is no time.
    """
    if times is None:
        return [None] * count
    listed = [times] if isinstance(times, int | float | datetime) else list(times)
    return [_seconds(each, place) for place, each in enumerate(_as_many(listed, count, "times"))]


def _seconds(given: Time | None, place: int) -> float | None:
    if given is None:
        return None
    if isinstance(given, datetime):
        if given.tzinfo is None:
            raise InputError(
                f"times[{place}]: got {given} without a time zone. Give one, such as "
                "datetime.now(timezone.utc)."
            )
        return given.timestamp()
    if isinstance(given, bool) or not isinstance(given, int | float | np.floating | np.integer):
        kind = type(given).__name__
        raise InputError(f"times[{place}]: got {kind}, expected seconds since 1970 or a datetime.")
    if not math.isfinite(given):
        raise InputError(f"times[{place}]: got {given}, expected a finite number of seconds.")
    return float(given) + 0.0  # no negative zero


def checked_metadata(
    metadata: Metadata | Sequence[Metadata | None] | None, count: int
) -> list[Metadata]:
    """Return the metadata of each item.

    Raises:
        InputError: If there are more or fewer than items, or a field cannot be stored.
    """
    if metadata is None:
        return [{}] * count
    listed = [metadata] if isinstance(metadata, Mapping) else list(metadata)
    return [
        _fields(each, f"metadata[{place}]")
        for place, each in enumerate(_as_many(listed, count, "metadata"))
    ]


def _fields(given: Metadata | None, where: str) -> Metadata:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: got {type(given).__name__}, expected a dict of fields.")
    for name, value in given.items():
        _check_text(name, f"{where}: name", 200)
        if not _NAME.fullmatch(name):
            raise InputError(
                f"{where}: got the name {name!r}, expected one without quotes, backslashes and "
                "control characters, so that filters can name it."
            )
        if isinstance(value, list):
            for tag in value:
                _check_text(tag, f"{where}['{name}']", _MAX_TEXT)
        elif isinstance(value, str):
            _check_text(value, f"{where}['{name}']", _MAX_TEXT)
        elif isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{where}['{name}']: got {value}, expected a finite number.")
        elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise InputError(f"{where}['{name}']: got {value}, expected 64 bits at most.")
        elif value is not None and type(value) not in (bool, int, float):
            raise InputError(
                f"{where}['{name}']: got {type(value).__name__}, expected a str, int, float, "
                "bool, list of str or None."
            )
    size = len(json.dumps(dict(given), ensure_ascii=False).encode())
    if size > _MAX_METADATA:
        raise InputError(f"{where}: got {size} bytes, expected at most {_MAX_METADATA}.")
    return dict(given)


def checked_vectors(vectors: Vectors, dim: int, *, what: str = "vectors") -> list[Float32Array]:
    """Return the vectors of each item, (V, D) float32, L2-normalised.

    Args:
        vectors: (N, D): a vector an item; (D,): of a single item; or a sequence of (D,) or (V, D)
            arrays: an item each, with several vectors.
        dim: D.
        what: What they are called in errors.

    Raises:
        ShapeError: If one has another width, or an item has none.
        DTypeError: If they are no floating-point numbers.
        InputError: If one holds NaN or infinity, or is zero.
    """
    if isinstance(vectors, np.ndarray) and vectors.dtype != object:
        flat = vectors[None] if vectors.ndim == 1 else vectors
        normalised = _normalised(flat, dim, what, [])
        return list(normalised[:, None])
    listed = list(vectors)
    counts, arrays = [], []
    for place, each in enumerate(listed):
        array = np.asarray(each)
        array = array[None] if array.ndim == 1 else array
        if array.ndim != 2 or not 1 <= len(array) <= _MAX_PARTS:
            raise ShapeError(
                f"{what}[{place}]: got {np.shape(each)}, expected ({dim},), or (V, {dim}) with at "
                "least one vector."
            )
        if array.shape[1] != dim:
            raise _width_error(f"{what}[{place}]", array, dim)
        counts.append(len(array))
        arrays.append(array)
    if not arrays:
        return []
    flat = _normalised(np.concatenate(arrays), dim, what, counts)
    return np.split(flat, np.cumsum(counts)[:-1])


def query_vectors(vectors: Array, dim: int) -> Float32Array:
    """Return (Q, D) float32 queries, L2-normalised, from (Q, D) or (D,).

    Raises:
        InputError: As checked_vectors.
    """
    return _normalised(vectors[None] if vectors.ndim == 1 else vectors, dim, "query", [])


def _normalised(vectors: Array, dim: int, what: str, counts: list[int]) -> Float32Array:
    if vectors.ndim != 2:
        raise ShapeError(f"{what}: got {vectors.shape}, expected (N, {dim}) or ({dim},).")
    if vectors.shape[1] != dim:
        raise _width_error(what, vectors, dim)
    if vectors.dtype.kind != "f":
        raise DTypeError(
            f"{what}: got dtype {vectors.dtype.name}, expected float32. Pass embeddings, not "
            "quantized values."
        )
    normalised = np.empty(vectors.shape, np.float32)
    norms = np.empty(len(vectors))
    for start in range(0, len(vectors), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        wide = vectors[part].astype(np.float64)
        norms[part] = np.linalg.norm(wide, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            normalised[part] = wide / norms[part, None]
    bad = ~np.isfinite(norms) | (norms == 0)
    if bad.any():
        place = int(np.argmax(bad))
        if counts:
            place = int(np.searchsorted(np.cumsum(counts), place, side="right"))
        wrong = "is zero" if norms[bad][0] == 0 else "holds NaN or infinity"
        raise InputError(
            f"{what}[{place}] {wrong}, so it has no direction to compare. Check what made it."
        )
    return normalised


def _width_error(what: str, array: Array, dim: int) -> ShapeError:
    return ShapeError(
        f"{what}: got width {array.shape[1]}, expected {dim}, which is the index's. Use vectors "
        "of the model that the index was made for."
    )


def checked_k(k: int) -> int:
    """Return k.

    Raises:
        InputError: If it is not a positive whole number.
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise InputError(f"k: got {k!r}, expected a whole number from 1.")
    return int(k)


def checked_recall(recall: float) -> float:
    """Return a recall.

    Raises:
        InputError: If it is not above 0 and at most 1.
    """
    if isinstance(recall, bool) or not isinstance(recall, int | float) or not 0 < recall <= 1:
        raise InputError(f"recall: got {recall!r}, expected a share above 0 and at most 1.")
    return float(recall)


def _as_many(listed: Sequence[_T], count: int, what: str) -> list[_T]:
    if len(listed) != count:
        raise InputError(f"{what}: got {len(listed)} for {count} items, expected one each.")
    return list(listed)


def _check_text(text: object, where: str, limit: int) -> None:
    if not isinstance(text, str):
        raise InputError(f"{where}: got {type(text).__name__}, expected str.")
    if "\x00" in text or len(text) > limit:
        wrong = f"{len(text)} characters" if len(text) > limit else "a NUL character"
        raise InputError(f"{where}: got {wrong}, expected at most {limit} without NUL.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{where}: got {text!r}, which is not valid Unicode. Rename the file, or decode it."
        ) from None
