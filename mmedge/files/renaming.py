"""Renaming a folder to a free name, or exchanging two, atomically if the system can."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

__all__ = ["exchange", "lock", "remove", "rename_new"]

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2


def rename_new(source: Path, target: Path) -> None:
    """Rename a folder to a name that must be free.

    Raises:
        FileExistsError: If something bears the name.
    """
    if _renameat2(source, target, _RENAME_NOREPLACE):
        return
    if os.path.lexists(target):
        raise _exists(target)
    _rename(source, target)


def exchange(source: Path, target: Path) -> None:
    """Exchange the names of two folders.

    Raises:
        FileNotFoundError: If there is no `target`.
        FileExistsError: If another writer took the name while the two changed places.
    """
    if _renameat2(source, target, _RENAME_EXCHANGE):
        return
    # Two renames: the older folder steps aside first, locked, so that no other writer takes it
    # for a leftover and puts it back.
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    descriptor = os.open(target, os.O_RDONLY)
    try:
        lock(descriptor, wait=True)
        target.rename(aside)
        try:
            _rename(source, target)
        except BaseException:
            if os.path.lexists(target):
                remove(aside)
            else:
                aside.rename(target)
            raise
        aside.rename(source)
    finally:
        os.close(descriptor)


def _rename(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise _exists(target) from error


def _exists(target: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Rename with Linux's renameat2(2); False if system or file system lacks it."""
    function = _libc_renameat2()
    if function is None:
        return False
    code = function(os.fsencode(source), os.fsencode(target), flags)
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    if code:
        raise OSError(code, os.strerror(code), str(source), None, str(target))
    return True


@functools.cache
def _libc_renameat2() -> Callable[[bytes, bytes, int], int] | None:
    import ctypes  # not needed for reading

    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return None

    def renameat2(source: bytes, target: bytes, flags: int) -> int:
        if function(_AT_FDCWD, source, _AT_FDCWD, target, ctypes.c_uint(flags)) == 0:
            return 0
        return ctypes.get_errno()

    return renameat2


def lock(descriptor: int, *, wait: bool) -> bool:
    """Lock an open file or folder; False if it is locked already, or cannot be locked here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        # A file system without locks: the writer goes on without one, and nobody who fails to
        # lock a leftover removes it.
        return False
    return True


def remove(path: Path) -> None:
    """Remove a file or a folder as far as possible, without raising."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
