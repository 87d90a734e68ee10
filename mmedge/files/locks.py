"""Lock files with one holder at a time, across threads and processes.

Not by `filelock`: where a file system has no locks it falls back to a soft lock, which outlives a
killed holder, and it cannot name the holder to those who wait.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmedge.files import storage_errors

__all__ = ["is_locked", "key_lock", "key_lock_if_free", "key_lock_in_time"]

_LOG = logging.getLogger("mmedge.engines")
_POLL_S = (0.05, 0.5)  # first and longest pause between two tries
_FIRST_POLL_S = 0.001  # where holders keep a lock for moments
_REMIND_S = 60.0
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextmanager
def key_lock(
    path: Path, report: Callable[[str], None], *, doing: str = "is building this engine"
) -> Iterator[None]:
    """Hold the lock file `path` while the block runs, waiting for another holder.

    The kernel drops the lock when its holder dies, however it dies; the children of a holder that
    forked count as the holder. The file is removed at the end.

    Args:
        path: Of the lock file, in a folder that exists.
        report: Called with "process 123 ..." when there is something to wait for, and every minute.
        doing: What a holder does, for those who wait.

    Raises:
        StorageError: If the file cannot be made.
    """
    began = reminded = time.monotonic()
    pause_s = 0.0
    while True:
        with _held_if_free(path) as holder:
            if holder is None:
                yield
                return
        now = time.monotonic()
        if not pause_s or now - reminded >= _REMIND_S:
            reminded = now
            so_far = f"still waiting after {now - began:.0f} s" if pause_s else "waiting for it"
            report(f"{holder} {doing}: {so_far}")
        pause_s = min(2 * pause_s, _POLL_S[1]) or _POLL_S[0]
        time.sleep(pause_s)


@contextmanager
def key_lock_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock file `path` while the block runs if it is free; yield whether it is held.

    Raises:
        StorageError: If the file cannot be made.
    """
    with _held_if_free(path) as holder:
        yield holder is None


@contextmanager
def key_lock_in_time(path: Path, wait_s: float) -> Iterator[str | None]:
    """Hold the lock file `path` while the block runs if it becomes free within `wait_s`.

    Yields:
        None if it is held, otherwise who holds it: "process 123".

    Raises:
        StorageError: If the file cannot be made.
    """
    until = time.monotonic() + wait_s
    pause_s = _FIRST_POLL_S
    while True:
        with _held_if_free(path) as holder:
            if holder is None or time.monotonic() >= until:
                yield holder
                return
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _POLL_S[0])


def is_locked(path: Path) -> bool:
    """Return whether a lock file is held."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _BUSY
    finally:
        os.close(descriptor)
    return False


@contextmanager
def _held_if_free(path: Path) -> Iterator[str | None]:
    """Hold a lock file if it is free; yield None, or its holder."""
    with storage_errors(path):
        descriptor, held = _open_and_try(path)
    try:
        if not held:
            yield _holder(descriptor)
            return
        try:
            with suppress(OSError):  # for waiting processes; a full disk does not matter
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield None
        finally:
            # Removed while held, so that no other process can hold a file of this name.
            with suppress(OSError):
                path.unlink()
            with suppress(OSError):  # a forked child may have the file open still
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _open_and_try(path: Path) -> tuple[int, bool]:
    """Open a lock file and try to lock it.

    Returns:
        Its descriptor, and whether it is locked.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            held = _try_lock(descriptor, path)
            if not held or os.path.samestat(os.fstat(descriptor), path.lstat()):
                return descriptor, held
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder removed it before it was locked


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        # Without locks two processes may do the same; each still writes whole files.
        _LOG.warning("%s cannot be locked (%s): work may be done twice", path, error.strerror)
    return True


def _holder(descriptor: int) -> str:
    digits = os.pread(descriptor, 20, 0)
    if not digits.isdigit():
        return "another process"
    pid = int(digits)
    return "another thread of this process" if pid == os.getpid() else f"process {pid}"
