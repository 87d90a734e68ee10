"""One builder at a time for each engine, across threads and processes."""

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

__all__ = ["is_locked", "key_lock"]

_LOG = logging.getLogger("mmedge.engines")
_POLL_S = (0.05, 0.5)  # first and longest pause between two tries
_REMIND_S = 60.0
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextmanager
def key_lock(path: Path, told: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; wait for whoever holds it.

    The kernel drops the lock when its holder dies, however it dies. The file is removed at the end.
    A holder that forks keeps it locked until its children are gone as well, or it ends the block.

    Args:
        path: Of the lock file, in a folder that exists.
        told: Called with "process 123 ..." when there is something to wait for, and every minute.

    Raises:
        StorageError: If the file cannot be made.
    """
    with storage_errors(path):
        descriptor = _acquire(path, told)
    try:
        yield
    finally:
        # Removed while it is held, so nobody can hold the name that is removed.
        with suppress(OSError):
            path.unlink()
        _unlock(descriptor)


def is_locked(path: Path) -> bool:
    """Tell whether somebody holds a lock file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _BUSY
    finally:
        os.close(descriptor)
    return False


def _acquire(path: Path, told: Callable[[str], None]) -> int:
    began = reminded = time.monotonic()
    pause_s = _POLL_S[0]
    waiting = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if _try_lock(descriptor, path):
                if _is_at(descriptor, path):
                    with suppress(OSError):  # for those who wait; a full disk does not matter
                        os.ftruncate(descriptor, 0)
                        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                    return descriptor
                _unlock(descriptor)
                continue  # its last holder removed it before we had it
            now = time.monotonic()
            if not waiting or now - reminded >= _REMIND_S:
                reminded = now
                told(
                    f"{_holder(descriptor)} is building this engine: "
                    + (f"still waiting after {now - began:.0f} s" if waiting else "waiting for it")
                )
                waiting = True
            os.close(descriptor)
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _POLL_S[1])


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        # Without locks two processes may both build; each still writes whole files.
        _LOG.warning("%s cannot be locked (%s): an engine may be built twice", path, error.strerror)
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    digits = os.pread(descriptor, 20, 0)
    if not digits.isdigit():
        return "another process"
    pid = int(digits)
    return "another thread of this process" if pid == os.getpid() else f"process {pid}"


def _unlock(descriptor: int) -> None:
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
