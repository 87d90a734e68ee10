"""OSErrors that speak of the disk, as a person can act on them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmedge.errors import StorageError

__all__ = ["block_errors", "storage_errors"]

_NO_ROOM = {
    errno.ENOSPC: "the disk is full. Free some space, or write elsewhere",
    errno.EDQUOT: "the disk quota is spent. Free some space, or write elsewhere",
    errno.EFBIG: "the file would be too large for this file system or limit. Write elsewhere",
}
_NO_ENTRY = {
    errno.EROFS: "the file system is read-only. Write elsewhere",
    errno.EACCES: "permission denied. Change the permissions, or write elsewhere",
    errno.ENOENT: "the folder that should hold it is gone. Make it, or write elsewhere",
    errno.EPERM: "the system forbids it. Change the permissions, or write elsewhere",
    errno.EEXIST: "a file stands where a folder is needed. Remove it, or write elsewhere",
    errno.ENOTDIR: "a file stands where a folder is needed. Remove it, or write elsewhere",
    errno.EISDIR: "a folder stands there. Remove it, or choose another name",
    errno.ENAMETOOLONG: "the name is too long. Choose a shorter one",
    errno.ELOOP: "its links go in a circle. Write elsewhere",
    errno.EIO: "the disk fails. Write elsewhere",
}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError that speaks of the disk into a StorageError that names `path`.

    Raises:
        StorageError: If the disk is full, the quota is spent, or the place cannot be written.
    """
    try:
        yield
    except OSError as error:
        reason = {**_NO_ROOM, **_NO_ENTRY}.get(error.errno or 0)
        if reason is None:
            raise
        raise StorageError(f"Cannot write {path}: {reason}.") from error


@contextmanager
def block_errors(path: Path, beside: Path) -> Iterator[None]:
    """Turn a failure to write `beside`, which is to become `path`, into a StorageError.

    Other failures of the block pass as they are: a photo that cannot be read is not the disk's.

    Raises:
        StorageError: If the disk is full, or an entry of `beside` cannot be written.
    """
    try:
        yield
    except OSError as error:
        code = error.errno or 0
        ours = error.filename is not None and str(error.filename).startswith(str(beside))
        reason = _NO_ROOM.get(code) or (_NO_ENTRY.get(code) if ours else None)
        if reason is None:
            raise
        raise StorageError(f"Cannot write {path}: {reason}.") from error
