"""Storage errors: OSErrors with cause and fix."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmedge.errors import StorageError

__all__ = ["block_errors", "storage_errors"]

_NO_ROOM = {
    errno.ENOSPC: "the disk is full. Free some space, or write elsewhere",
    errno.EDQUOT: "the disk quota is exceeded. Free some space, or write elsewhere",
    errno.EFBIG: "the file would be too large for this file system or limit. Write elsewhere",
}
_NO_ENTRY = {
    errno.EROFS: "the file system is read-only. Write elsewhere",
    errno.EACCES: "permission denied. Change the permissions, or write elsewhere",
    errno.ENOENT: "its folder does not exist. Make it, or write elsewhere",
    errno.EPERM: "the system forbids it. Change the permissions, or write elsewhere",
    errno.EEXIST: "a file is where a folder is needed. Remove it, or write elsewhere",
    errno.ENOTDIR: "a file is where a folder is needed. Remove it, or write elsewhere",
    errno.EISDIR: "it is a folder. Remove it, or choose another name",
    errno.ENAMETOOLONG: "the name is too long. Choose a shorter one",
    errno.ELOOP: "its links form a loop. Write elsewhere",
    errno.EIO: "the disk fails. Write elsewhere",
}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError about the location of `path` into a StorageError that names it.

    An OSError about another place passes as it is, unless a disk is full.

    Raises:
        StorageError: If the disk is full, the quota is spent, or the place cannot be written.
    """
    place = Path(os.path.realpath(path))
    try:
        yield
    except OSError as error:
        named = _named(error)
        about = named is None or named.is_relative_to(place.parent) or place.is_relative_to(named)
        _raise_storage_error(error, path, about=about)
        raise


@contextmanager
def block_errors(path: Path, beside: Path) -> Iterator[None]:
    """Turn a failure to write `beside`, the temporary form of `path`, into a StorageError.

    Other failures of the block pass as they are: a photo that cannot be read is not the disk's.

    Raises:
        StorageError: If the disk is full, or an entry of `beside` cannot be written.
    """
    place = Path(os.path.realpath(beside))
    try:
        yield
    except OSError as error:
        named = _named(error)
        _raise_storage_error(error, path, about=named is not None and named.is_relative_to(place))
        raise


def _named(error: OSError) -> Path | None:
    """Return the path in an OSError, None if it has none."""
    if isinstance(error.filename, str | bytes):
        return Path(os.path.realpath(os.fsdecode(error.filename)))
    return None


def _raise_storage_error(error: OSError, path: Path, *, about: bool) -> None:
    code = error.errno or 0
    reason = _NO_ROOM.get(code) or (_NO_ENTRY.get(code) if about else None)
    if reason is not None:
        raise StorageError(f"Cannot write {path}: {reason}.") from error
