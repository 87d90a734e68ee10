"""Reading .npz files of others: arrays of numbers and text, never pickled objects."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmedge.errors import MmedgeError

__all__ = ["NPY_ERRORS", "read_npz"]

NPY_ERRORS = (
    *(OSError, ValueError, EOFError, KeyError, TypeError, SyntaxError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, OverflowError, MemoryError),
)
"""What numpy raises for files that are damaged or made to do harm."""


def read_npz(path: Path, *, error: Callable[[str], MmedgeError]) -> dict[str, NDArray[Any]]:
    """Return the arrays of an .npz file by name.

    Args:
        path: The file.
        error: Makes the error from the reason why it cannot be read.

    Raises:
        MmedgeError: `error`.
    """
    try:
        with path.open("rb") as archive:
            if archive.read(2) != b"PK":  # numpy.load also reads .npy
                raise ValueError("it is not a zip archive")
            archive.seek(0)
            with np.load(archive, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):  # numpy returns other members as bytes
                raise TypeError(f"'{name}' is no array")
    except NPY_ERRORS as failure:
        raise error(str(failure)) from failure
    return arrays
