"""Atomic files and folders: written beside the target, then moved onto it.

What is being written lies beside its place as `.NAME.XXXXXXXX.partial`, locked by its writer. The
kernel drops the lock when the writer dies, so the next writer of the same place can tell what was
left behind from what is in use, and removes it.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from mmedge.errors import StorageError
from mmedge.files.reasons import block_errors, storage_errors
from mmedge.files.renaming import exchange, lock, remove, rename_new

__all__ = [
    "atomic_directory",
    "atomic_file",
    "remove_if_free",
    "remove_leftovers",
    "temporary_file",
    "write_atomic",
]

_LEFTOVER = re.compile(
    r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<kind>partial|old|temporary\.(onnx|jpg))", re.DOTALL
)


def write_atomic(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a file atomically: readers and crashes see the old or the new content.

    A link is followed: the file that it leads to is replaced, and the link stays.

    Args:
        path: Where the file is to stand.
        data: Its content.
        private: Whether only its owner may read and write it, whatever the umask allows.

    Raises:
        StorageError: If the disk is full, the place cannot be written, or what is there is no
            regular file.
    """
    with atomic_file(path, private=private) as file:
        file.write(data)


@contextmanager
def atomic_file(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """Yield a file beside `path` that becomes `path` if the block succeeds; see write_atomic.

    Raises:
        StorageError: As write_atomic.
    """
    with storage_errors(path):
        place = Path(os.path.realpath(path))
        if place.exists() and not place.is_file():
            raise StorageError(
                f"Cannot write {path}: it is not a regular file. Choose another name."
            )
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(place.parent, place.name)
        with _claimed(place, _make_private_file if private else _make_file) as beside:
            with beside.open("r+b") as file:
                yield file
            _sync(beside)
            beside.replace(place)
            _sync(place.parent)


@contextmanager
def atomic_directory(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield an empty folder beside `path` that becomes `path` if the block succeeds.

    An older `path` stays in place until the new one is complete, and the two then change places in
    one step. If the block raises, KeyboardInterrupt included, everything written is removed and
    the older folder is untouched. After a kill the old folder or the new one is there, whole, and
    the next call for the same path removes what lies beside. Of several writers at once, each
    publishes a whole folder and the last one stands.

    The one step is Linux's renameat2. Where it is missing (other systems, some network file
    systems), a kill between two renames can leave the old folder aside; the next call puts it
    back.

    Args:
        path: Where the folder is to stand.
        replace: Whether an older folder may be replaced.

    Raises:
        StorageError: If the disk is full, the place cannot be written, something other than a
            folder is there, or a folder is and `replace` is False.
    """
    path = path.absolute()
    with storage_errors(path):
        _check_place(path, replace=replace)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
    with _claimed(path, _make_directory) as beside:
        with block_errors(path, beside):
            yield beside
        with storage_errors(path):
            _sync_tree(beside)
            _publish(beside, path, replace=replace)
            _sync(path.parent)


@contextmanager
def temporary_file(folder: Path, name: str, kind: Literal["onnx", "jpg"]) -> Iterator[Path]:
    """Yield a new file `.NAME.XXXXXXXX.temporary.KIND` in a folder, removed at the end.

    It is its owner's alone. After a kill, the next call for the same name removes it.

    Raises:
        StorageError: If the disk is full or the place cannot be written.
    """
    with storage_errors(folder):
        remove_leftovers(folder, name)
        with _claimed(folder / name, _make_private_file, f"temporary.{kind}") as path:
            yield path


def _check_place(path: Path, *, replace: bool) -> None:
    if path.name in ("", ".."):
        raise StorageError(f"Cannot write {path}: it has no name of its own. Name the folder.")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        what = "a link" if stat.S_ISLNK(mode) else "a file"
        raise StorageError(
            f"Cannot write {path}: {what} is where a folder is to be. Remove it, or choose "
            "another name."
        )
    if not replace:
        raise _taken(path)


def _taken(path: Path) -> StorageError:
    return StorageError(f"Cannot write {path}: it exists already. Choose another name.")


def _make_directory(path: Path) -> None:
    path.mkdir()


def _make_file(path: Path) -> None:
    path.touch(exist_ok=False)


def _make_private_file(path: Path) -> None:
    path.touch(mode=0o600, exist_ok=False)


@contextmanager
def _claimed(path: Path, make: Callable[[Path], None], kind: str = "partial") -> Iterator[Path]:
    """Make and lock an entry beside `path`; at the end, remove what has its name."""
    with storage_errors(path):
        beside, descriptor = _claim(path, make, kind)
    try:
        yield beside
    finally:
        try:
            remove(beside)
        finally:
            os.close(descriptor)


def _claim(path: Path, make: Callable[[Path], None], kind: str) -> tuple[Path, int]:
    while True:
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")
        make(beside)
        try:
            descriptor = os.open(beside, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another writer took it for a leftover before it was locked
        try:
            lock(descriptor, wait=True)
            if os.path.samestat(os.fstat(descriptor), beside.lstat()):
                return beside, descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            remove(beside)
            raise
        os.close(descriptor)


def remove_leftovers(
    folder: Path, name: str | None = None, *, dry_run: bool = False
) -> tuple[Path, ...]:
    """Remove leftovers of killed writers in a folder, and restore folders that they moved.

    What a living writer has locked stays, and so does what cannot be removed.

    Args:
        folder: Where to look; not below it.
        name: Leftovers of this file or folder alone; None for all.
        dry_run: Whether to find them only.

    Returns:
        What was removed, or would be.
    """
    removed = []
    for entry in list(folder.iterdir()):
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None or name not in (None, match["name"]):
            continue
        place = folder / match["name"]
        moved = place if match["kind"] == "old" and not os.path.lexists(place) else None
        if remove_if_free(entry, moved, dry_run=dry_run) and moved is None:
            removed.append(entry)
    return tuple(removed)


def remove_if_free(path: Path, moved: Path | None = None, *, dry_run: bool = False) -> bool:
    """Remove an unlocked file or folder, or rename it to `moved`.

    Returns:
        Whether it was removed or renamed, or with dry_run, could be.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        if not lock(descriptor, wait=False):
            return False
        if not dry_run:
            remove(path) if moved is None else path.rename(moved)
    except OSError:  # leftovers are harmless
        return False
    finally:
        os.close(descriptor)
    return True


def _publish(beside: Path, path: Path, *, replace: bool) -> None:
    """Rename the folder `beside` to `path`; an older `path` gets the name of `beside`."""
    while True:
        try:
            rename_new(beside, path)
        except FileExistsError:
            pass
        else:
            return
        _check_place(path, replace=replace)
        try:
            exchange(beside, path)
        except (FileNotFoundError, FileExistsError):
            continue  # another writer removed or replaced the older one meanwhile
        return


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
        # some file systems refuse to sync a folder; the rename stands
    finally:
        os.close(descriptor)
