"""Files of arrays, .npz: numbers and text, never pickled objects.

Headers of a file are read first, and an archive that unpacks to far more than its own size is
refused before anything is unpacked. Large arrays are read in blocks.
"""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mmedge.errors import MmedgeError
from mmedge.files.atomic import atomic_file

__all__ = ["NPY_ERRORS", "NpzArray", "open_npz", "read_npz", "write_npz"]

NPY_ERRORS = (
    *(OSError, ValueError, EOFError, KeyError, TypeError, SyntaxError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, OverflowError, MemoryError),
    tokenize.TokenError,
)
"""What numpy raises for files that are damaged or made to do harm."""

_MOST_TIMES = 100  # that an archive may unpack to, of its own size
_HARMLESS_BYTES = 1 << 30  # that any archive may unpack to
_READ_BYTES = 4 << 20  # unpacked at a time
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True, slots=True)
class NpzArray:
    """An array of an archive, of which only the header was read.

    Attributes:
        path: The archive.
        member: Name in it.
        shape: Of the array.
        dtype: Numbers or text, never objects.
        fortran: Whether it lies there in Fortran order.
        start: Size of its header in bytes.
        error: Makes the error from the reason why it cannot be read.
    """

    path: Path
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    start: int
    error: Callable[[str], MmedgeError]

    def read(self) -> NDArray[Any]:
        """Return the array.

        Raises:
            MmedgeError: `error`.
        """
        (whole,) = self._blocks(None)
        return whole

    def blocks(self, rows: int) -> Iterator[NDArray[Any]]:
        """Yield the array, of one axis or more, some rows of the first axis at a time.

        An array in Fortran order is read whole at first.

        Raises:
            MmedgeError: `error`.
        """
        if self.fortran:
            whole = self.read()
            yield from (whole[start : start + rows] for start in range(0, len(whole), rows))
        else:
            yield from self._blocks(rows)

    def _blocks(self, rows: int | None) -> Iterator[NDArray[Any]]:
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
                file.read(self.start)
                if rows is None:
                    shape = self.shape[::-1] if self.fortran else self.shape
                    whole = _array(file, shape, self.dtype)
                    yield whole.T if self.fortran else whole
                    return
                for start in range(0, self.shape[0], rows):
                    count = min(rows, self.shape[0] - start)
                    yield _array(file, (count, *self.shape[1:]), self.dtype)
        except NPY_ERRORS as failure:
            raise self.error(str(failure)) from failure


def open_npz(path: Path, *, error: Callable[[str], MmedgeError]) -> dict[str, NpzArray]:
    """Read the headers of an .npz file's arrays, by name.

    Args:
        path: The file.
        error: Makes the error from the reason why it cannot be read.

    Raises:
        MmedgeError: `error`, also if it unpacks to more than a GiB and 100 times its size.
    """
    try:
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                raise ValueError("it is not a zip archive")
            size = file.seek(0, 2)
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                unpacked = sum(member.file_size for member in members)
                if unpacked > max(_HARMLESS_BYTES, _MOST_TIMES * size):
                    raise ValueError(
                        f"it has {size:,} bytes and unpacks to {unpacked:,}, more than "
                        f"{_MOST_TIMES} times as many"
                    )
                arrays = [_header(archive, member, path, error) for member in members]
        found = {array.member.removesuffix(".npy"): array for array in arrays}
        if len(found) < len(arrays):
            raise ValueError("two of its arrays have one name")
    except NPY_ERRORS as failure:
        raise error(str(failure)) from failure
    return found


def read_npz(path: Path, *, error: Callable[[str], MmedgeError]) -> dict[str, NDArray[Any]]:
    """Return the arrays of an .npz file by name.

    Args:
        path: The file.
        error: Makes the error from the reason why it cannot be read.

    Raises:
        MmedgeError: `error`, as open_npz.
    """
    return {name: array.read() for name, array in open_npz(path, error=error).items()}


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays to an .npz file, whole or not at all.

    Unlike numpy.savez, which takes names as keywords, it writes arrays of any name.

    Args:
        path: The file.
        arrays: By name.

    Raises:
        StorageError: If the disk is full or the place cannot be written.
    """
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _header(
    archive: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    path: Path,
    error: Callable[[str], MmedgeError],
) -> NpzArray:
    name = member.filename
    if not name.endswith(".npy"):
        raise TypeError(f"'{name}' is no array")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in _READERS:
            raise ValueError(f"'{name}' has the format {version}, expected one of plain arrays")
        shape, fortran, dtype = _READERS[version](file)
        start = file.tell()
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded when allow_pickle=False")
    declared = start + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or declared != member.file_size:
        raise ValueError(f"'{name}' has {member.file_size:,} bytes, and {declared:,} by its header")
    return NpzArray(path, name, shape, dtype, fortran, start, error)


def _array(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    count = math.prod(shape) * dtype.itemsize
    if not count:
        return np.empty(shape, dtype)
    data = bytearray()
    while len(data) < count:
        read = file.read(min(_READ_BYTES, count - len(data)))
        if not read:
            raise EOFError(f"it ends after {len(data):,} of {count:,} bytes")
        data += read
    return np.frombuffer(data, dtype).reshape(shape)
