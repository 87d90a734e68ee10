"""Folders that only their owner may write, since files loaded from them can run code.

TensorRT executes plans, so anyone who can write a plan can run code as the user who loads it.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from mmedge.errors import StorageError
from mmedge.files import storage_errors

__all__ = [
    "UnsafeFileError",
    "UnsafeFolderError",
    "check_private",
    "make_private",
    "read_private",
    "stat_private",
]

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


class UnsafeFolderError(StorageError):
    """Other users may write the folder, so nothing is loaded from it."""


class UnsafeFileError(Exception):
    """A file of the folder is unsafe: a link, no file, or writable by others."""


def make_private(folder: Path) -> None:
    """Make a folder that only its owner may enter, and check one that exists already.

    Raises:
        UnsafeFolderError: If others may write it.
        StorageError: If it cannot be made or looked at.
    """
    with storage_errors(folder):
        for above in reversed(folder.parents):
            if not above.exists():  # mkdir(parents=True) would use the umask
                above.mkdir(mode=0o755, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    check_private(folder)


def check_private(folder: Path) -> bool:
    """Check that only its owner, this user or root, may write a folder.

    The modes of the folder are looked at, its owner, and whether a folder above lets everybody
    exchange it; access control lists are not.

    Returns:
        False if there is no such folder.

    Raises:
        UnsafeFolderError: If others may write it.
        StorageError: If it cannot be looked at.
    """
    place = Path(os.path.realpath(folder))
    try:
        status = place.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(
            f"Cannot read the engine cache {folder}: {error.strerror}. Change the permissions, or "
            "set MMEDGE_CACHE_DIR to another folder."
        ) from error
    if not stat.S_ISDIR(status.st_mode):
        raise StorageError(
            f"Cannot use the engine cache {folder}: a file is where a folder is needed. Remove "
            "it, or set MMEDGE_CACHE_DIR to another folder."
        )
    if not _trusted(status.st_uid):
        raise UnsafeFolderError(
            f"The engine cache {folder} belongs to user {status.st_uid}, and this process runs as "
            f"user {os.geteuid()}: engines run code, so only your own are loaded. Run "
            f"'chown -R {os.geteuid()} {folder}', or set MMEDGE_CACHE_DIR to a folder of your own."
        )
    if status.st_mode & _OTHERS_MAY_WRITE:
        raise UnsafeFolderError(
            f"The engine cache {folder} can be written by others (mode "
            f"{stat.S_IMODE(status.st_mode):04o}): engines run code, so other users could run "
            f"code here. If its content is your own, run 'chmod -R go-w {folder}'; otherwise "
            "remove it, or set MMEDGE_CACHE_DIR to a folder of your own."
        )
    for above in place.parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise UnsafeFolderError(
                f"The engine cache {folder} is in {above}, where everybody can put another "
                f"folder in its place (mode {stat.S_IMODE(mode):04o}): engines run code. Run "
                f"'chmod o-w {above}', or set MMEDGE_CACHE_DIR to a folder of your own."
            )
    return True


def stat_private(path: Path) -> os.stat_result:
    """Return the status of a regular file that is no link and that only its owner may write.

    Raises:
        FileNotFoundError: If there is none.
        UnsafeFileError: If it is anything else.
    """
    descriptor = _open(path)
    try:
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)


def read_private(path: Path, max_bytes: int) -> bytes:
    """Return the content of a file that passes stat_private.

    Raises:
        FileNotFoundError: If there is none.
        UnsafeFileError: If it is not such a file, is larger than `max_bytes`, or cannot be read.
    """
    descriptor = _open(path)
    try:
        with os.fdopen(descriptor, "rb") as file:
            size_bytes = os.fstat(descriptor).st_size
            if size_bytes > max_bytes:
                raise UnsafeFileError(f"has {size_bytes} bytes, expected at most {max_bytes}")
            return file.read(max_bytes + 1)
    except OSError as error:
        raise UnsafeFileError(f"cannot be read: {error.strerror}") from error


def _open(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        what = "is a link" if error.errno == errno.ELOOP else f"cannot be read: {error.strerror}"
        raise UnsafeFileError(what) from error
    try:
        _check_file(os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _trusted(user: int) -> bool:
    return user in (os.geteuid(), 0)


def _check_file(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeFileError("is no regular file")
    if not _trusted(status.st_uid):
        raise UnsafeFileError(f"belongs to user {status.st_uid}")
    if status.st_mode & _OTHERS_MAY_WRITE:
        raise UnsafeFileError(f"can be written by others (mode {stat.S_IMODE(status.st_mode):04o})")
