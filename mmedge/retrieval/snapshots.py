"""Snapshots: immutable files of vectors that searches map into memory.

A file holds a header, the fp16 vectors, and of each the row number, the item key and the part; and
the inverted lists with their codes, if its vectors lie in the order of lists and not of rows. It is
written beside its name, synced and moved into place, and never changed. All of it can be made again
from the record.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mmedge.errors import IndexCorruptedError
from mmedge.files import atomic_file
from mmedge.retrieval.codes import MAX_FACTOR, Rotation
from mmedge.retrieval.lists import Lists
from mmedge.specs import Array

__all__ = [
    "Block",
    "Snapshot",
    "open_snapshot",
    "snapshot_header",
    "snapshot_path",
    "vectors_crc",
    "write_snapshot",
]

_MAGIC = b"mmedgef\x00"
_VERSION = 3
_HEADER = struct.Struct("<8sIIQQQQII16s")
_HEADER_BYTES = 128  # a multiple of the alignment that numpy and SIMD like
_CRC_BYTES = 8 << 20

Block: TypeAlias = tuple[
    NDArray[np.int64], NDArray[np.int64], NDArray[np.int32], NDArray[np.float16]
]
"""Row numbers (N,), item keys (N,), parts (N,) and vectors (N, D)."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """An opened snapshot.

    Attributes:
        rows: (N,) int64, ascending, or in the order of the lists.
        keys: (N,) int64.
        parts: (N,) int32.
        vectors: (N, D) float16, mapped.
        lists: In which the vectors lie, if they do.
        vectors_crc: Checksum that the vectors should have; see vectors_crc().
    """

    rows: NDArray[np.int64]
    keys: NDArray[np.int64]
    parts: NDArray[np.int32]
    vectors: NDArray[np.float16]
    lists: Lists | None
    vectors_crc: int


def snapshot_path(folder: Path, number: int) -> Path:
    """Return the path of a snapshot in the folder of snapshots."""
    return folder / f"{number:06d}.f16"


def write_snapshot(
    path: Path, uuid: str, dim: int, blocks: Iterable[Block], lists: Lists | None = None
) -> tuple[int, int]:
    """Write a snapshot durably.

    Args:
        path: Where nothing stands yet.
        uuid: Of the index, 32 hexadecimal digits.
        dim: D.
        blocks: The vectors in ascending order of their rows, or in the order of `lists`; at least
            one.
        lists: In which the vectors lie.

    Returns:
        Number of vectors, and the checksum of the header, which covers those of the rest.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    ids: tuple[list[Array], ...] = ([], [], [])
    with atomic_file(path) as file:
        file.seek(_HEADER_BYTES)
        crc = count = 0
        for rows, keys, parts, vectors in blocks:
            data = np.ascontiguousarray(vectors, np.float16).data
            file.write(data)
            crc = zlib.crc32(data, crc)
            count += len(vectors)
            ids[0].append(rows)
            ids[1].append(keys)
            ids[2].append(parts)
        ids_crc = 0
        columns = [np.concatenate(column) for column in ids]
        first, last = int(columns[0].min()), int(columns[0].max())
        if lists is not None:
            step = np.array([lists.step], np.float32)
            columns += [lists.starts, lists.rotation.left, lists.rotation.right, step]
            columns += [lists.centroids, lists.codes]
        for column in columns:
            file.write(column.data)
            ids_crc = zlib.crc32(column.data, ids_crc)
        list_count = 0 if lists is None else len(lists.centroids)
        header = _HEADER.pack(
            _MAGIC, _VERSION, dim, count, list_count, first, last, ids_crc, crc, bytes.fromhex(uuid)
        )
        header = header.ljust(_HEADER_BYTES, b"\x00")
        file.seek(0)
        file.write(header)
    return count, zlib.crc32(header)


def open_snapshot(path: Path, uuid: str, dim: int, crc: int) -> Snapshot:
    """Map a snapshot and check everything but the vectors themselves.

    Args:
        path: No link is followed.
        uuid: Of the index.
        dim: D.
        crc: Checksum of the header, as write_snapshot returned it.

    Raises:
        FileNotFoundError: If there is no such file.
        IndexCorruptedError: If it is damaged, or not of this index.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _damaged(path, f"cannot be opened ({error.strerror})") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size < _HEADER_BYTES:
            raise _damaged(path, f"has {status.st_size} bytes, or is no regular file")
        mapped = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    header = mapped[:_HEADER_BYTES]
    magic, version, width, count, list_count, first, last, ids_crc, vectors_crc_, owner = (
        _HEADER.unpack_from(header)
    )
    if (magic, version) != (_MAGIC, _VERSION) or zlib.crc32(header) != crc:
        raise _damaged(path, "has another header than the record says")
    if width != dim or owner != bytes.fromhex(uuid):
        raise _damaged(path, f"is of another index, with {width} dimensions")
    length = -(-dim // 64)  # of rotated vectors, in rows of 64
    expected = _HEADER_BYTES + count * (2 * dim + 20)
    if list_count:
        expected += 8 * (list_count + 1) + 4 * (64 * 64 + length * length + 1)
        expected += 64 * length * list_count + count * (8 + 8 * length)
    if status.st_size != expected:
        raise _damaged(path, f"has {status.st_size} bytes, expected {expected}")
    start = _HEADER_BYTES + 2 * dim * count
    if zlib.crc32(memoryview(mapped)[start:]) != ids_crc:
        raise _damaged(path, "has row numbers whose checksum differs")
    vectors = np.frombuffer(mapped, np.float16, count * dim, _HEADER_BYTES).reshape(count, dim)
    # Copied, since every search reads them, and at odd counts they are not aligned.
    rows = np.frombuffer(mapped, np.int64, count, start).copy()
    keys = np.frombuffer(mapped, np.int64, count, start + 8 * count).copy()
    parts = np.frombuffer(mapped, np.int32, count, start + 16 * count).copy()
    ordered = rows if not list_count else np.sort(rows)
    if count == 0 or (ordered[0], ordered[-1]) != (first, last) or (np.diff(ordered) <= 0).any():
        raise _damaged(path, "has row numbers out of order")
    if keys.min() < 0 or parts.min() < 0:
        raise _damaged(path, "has a negative item key or part")
    lists = _lists(path, mapped, start + 20 * count, list_count, length, count)
    return Snapshot(rows, keys, parts, vectors, lists, vectors_crc_)


def _lists(
    path: Path, mapped: mmap.mmap, start: int, lists: int, length: int, count: int
) -> Lists | None:
    if not lists:
        return None

    def read(dtype: type[np.generic], *shape: int) -> Array:
        nonlocal start
        found: NDArray[Any] = np.frombuffer(mapped, dtype, math.prod(shape), start).reshape(shape)
        start += found.nbytes
        return found

    starts = read(np.int64, lists + 1).copy()
    if starts[0] != 0 or starts[-1] != count or (np.diff(starts) < 0).any():
        raise _damaged(path, "has lists out of order")
    rotation = Rotation(read(np.float32, 64, 64).copy(), read(np.float32, length, length).copy())
    step = float(read(np.float32, 1)[0])
    centroids = read(np.int8, lists, 64 * length).copy()
    codes = read(np.uint8, count, 8 * length + 8)
    numbers = (rotation.left, rotation.right, np.array(step), codes[:, -8:].view(np.float32))
    if not all(np.abs(each).max() <= MAX_FACTOR for each in numbers):  # nor if it is NaN
        raise _damaged(path, "has codes with factors out of range")
    return Lists(starts, rotation, centroids, step, codes)


def snapshot_header(path: Path) -> tuple[str, int, int]:
    """Return the index, the width and the header's checksum that a snapshot itself states.

    Raises:
        OSError: If it cannot be read.
        IndexCorruptedError: If it is too short for a header.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        header = os.read(descriptor, _HEADER_BYTES)
    finally:
        os.close(descriptor)
    if len(header) < _HEADER_BYTES:
        raise _damaged(path, f"has {len(header)} bytes")
    _, _, dim, *_, owner = _HEADER.unpack_from(header)
    return owner.hex(), dim, zlib.crc32(header)


def vectors_crc(vectors: NDArray[np.float16]) -> int:
    """Return the checksum of vectors, read block by block."""
    crc, step = 0, max(1, _CRC_BYTES // max(1, 2 * vectors.shape[1]))
    for start in range(0, len(vectors), step):
        crc = zlib.crc32(vectors[start : start + step].data, crc)
    return crc


def _damaged(path: Path, what: str) -> IndexCorruptedError:
    return IndexCorruptedError(
        f"{path} {what}. Run 'mmedge index verify --repair', which makes it again from the record."
    )
