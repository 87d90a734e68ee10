"""Bundle creation: written to a temporary folder, checked, then moved in one step."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmedge.bundle.manifest import FileEntry, Manifest
from mmedge.bundle.opening import open_bundle
from mmedge.bundle.paths import MANIFEST_NAME
from mmedge.errors import BundleError
from mmedge.files import atomic_directory, sha256_file, storage_errors

__all__ = ["SUFFIX", "check_target", "create_bundle", "describe_files", "write_manifest"]

SUFFIX = ".mmedge"


@contextmanager
def create_bundle(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes the bundle at `path` if the block succeeds.

    The block fills the folder and writes the manifest last (describe_files, write_manifest). If
    it raises, nothing is left; if it is killed, an older bundle at `path` is whole.

    Args:
        path: Where the bundle is to stand; the name ends in ".mmedge".
        overwrite: Overwrite an existing bundle.

    Raises:
        BundleError: If the name does not end in ".mmedge", if something that is not a bundle
            stands at `path`, or if a bundle does and overwrite is False.
        ManifestError, IntegrityError: If what the block wrote is not a bundle that opens.
        StorageError: If the disk is full or the place cannot be written.
    """
    target = Path(path)
    check_target(target, overwrite=overwrite)
    with atomic_directory(target, replace=overwrite) as folder:
        yield folder
        open_bundle(folder)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Check that a bundle can be created at a path.

    Args:
        target: Path of the bundle; the name ends in ".mmedge".
        overwrite: Whether an existing bundle may be replaced.

    Raises:
        BundleError: If it cannot.
    """
    if target.suffix != SUFFIX:
        raise BundleError(
            f"Cannot create bundle {target}: its name must end in '{SUFFIX}'. "
            f"Use {target.name or 'NAME'}{SUFFIX}."
        )
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not (target / MANIFEST_NAME).is_file():
        raise BundleError(
            f"Cannot create bundle {target}: it exists and is not a bundle, so it is "
            "left alone. Remove it, or choose another name with -o."
        )
    if not overwrite:
        raise BundleError(
            f"Cannot create bundle {target}: it exists. Pass --overwrite to replace it, or choose "
            "another name with -o."
        )


def describe_files(folder: Path) -> dict[str, FileEntry]:
    """Return size and sha256 of every file under `folder` except the manifest, by POSIX path.

    Raises:
        BundleError: If something is neither a folder nor a regular file.
    """
    entries: dict[str, FileEntry] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise BundleError(
                f"Cannot put {path} into a bundle: it is a link or a special file. Copy its "
                "content instead."
            )
        if path.is_file() and relative != MANIFEST_NAME:
            entries[relative] = FileEntry(size_bytes=path.stat().st_size, sha256=sha256_file(path))
    return dict(sorted(entries.items()))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into `folder`: the same manifest gives the same bytes.

    Raises:
        StorageError: If the disk is full or the place cannot be written.
    """
    document = manifest.model_dump(mode="json")
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path = folder / MANIFEST_NAME
    with storage_errors(path):
        path.write_bytes(text.encode())
