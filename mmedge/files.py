"""Files that are there whole or not at all: written beside their place, then moved into it."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmedge.errors import StorageError

__all__ = ["atomic_directory", "sha256_file", "storage_errors", "write_atomic"]


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError that speaks of the disk into a StorageError that names `path`.

    Raises:
        StorageError: If the disk is full, the quota is spent, or the place cannot be written.
    """
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full. Free some space, or write elsewhere",
            errno.EDQUOT: "the disk quota is spent. Free some space, or write elsewhere",
            errno.EROFS: "the file system is read-only. Write elsewhere",
            errno.EACCES: "permission denied. Change the permissions, or write elsewhere",
            errno.EFBIG: "the file would be too large for this file system or limit",
        }
        if error.errno not in reasons:
            raise
        raise StorageError(f"Cannot write {path}: {reasons[error.errno]}.") from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never half.

    Raises:
        StorageError: If the disk is full or the place cannot be written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        beside = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.chmod(0o644)
            beside.replace(path)
            _sync_directory(path.parent)
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            raise


@contextmanager
def atomic_directory(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield an empty folder beside `path` that becomes `path` when the block ends well.

    An older `path` stays in place until the new one is complete. If the block raises, KeyboardInterrupt
    included, everything written is removed and the older folder is untouched. After a kill, what
    was being written is left beside under a name that starts with a dot and ends in `.partial`; the
    next call for the same path removes it.

    Raises:
        StorageError: If the disk is full or the place cannot be written.
    """
    path = path.absolute()
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        beside = Path(
            tempfile.mkdtemp(
                dir=path.parent, prefix=f".{path.name}.{os.getpid()}.", suffix=".partial"
            )
        )
        try:
            yield beside
            for file in beside.rglob("*"):
                if file.is_file():
                    _sync_file(file)
            beside.chmod(0o755)
            _swap_in(beside, path)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise


def _swap_in(beside: Path, path: Path) -> None:
    if path.exists():
        # A directory cannot replace a non-empty one, so the old one steps aside first; a kill
        # between the two renames leaves both complete, the old one under the name below.
        aside = path.with_name(f".{path.name}.{os.getpid()}.old")
        path.rename(aside)
        try:
            beside.rename(path)
        except BaseException:
            aside.rename(path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    else:
        beside.rename(path)
    _sync_directory(path.parent)


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes left beside `path`, and put back an old folder they moved."""
    for entry in path.parent.glob(f".{path.name}.*"):
        owner = entry.name.removeprefix(f".{path.name}.").split(".")[0]
        if not owner.isdigit() or _is_running(int(owner)):
            continue
        if entry.name.endswith(".old") and not path.exists():
            entry.rename(path)
        elif entry.name.endswith((".partial", ".old")):
            shutil.rmtree(entry, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    with suppress(OSError):  # some file systems refuse to sync a directory; the rename stands
        _sync_file(path)


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's content as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
