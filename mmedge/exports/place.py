"""Where an export is written, and what may be replaced there."""

from __future__ import annotations

import os
import posixpath
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmedge.bundle.external_data import external_locations
from mmedge.bundle.manifest import Variant
from mmedge.bundle.opening import Bundle
from mmedge.errors import IntegrityError, StorageError
from mmedge.files import atomic_directory, sha256_file

__all__ = ["copied", "external_files", "fresh_folder"]


@contextmanager
def fresh_folder(out: Path, marker: str, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` when the block ends well.

    Args:
        out: Where the export is to stand.
        marker: Name of the file by which an older export is known.
        overwrite: Whether an older export may be replaced.

    Raises:
        StorageError: If an export stands there and may not be replaced, if something else stands
            there, or if the disk is full or the place cannot be written.
    """
    if os.path.lexists(out):
        empty = out.is_dir() and not out.is_symlink() and not any(out.iterdir())
        if not empty and (out.is_symlink() or not (out / marker).is_file()):
            raise StorageError(
                f"Cannot export to {out}: something that mmedge export did not write stands there, "
                "and is left alone. Remove it, or choose another folder."
            )
        if not empty and not overwrite:
            raise StorageError(
                f"Cannot export to {out}: an export stands there. Pass --overwrite to replace it, "
                "or choose another folder."
            )
    with atomic_directory(out) as folder:
        yield folder


def external_files(bundle: Bundle, variant: Variant, model: str) -> dict[str, str]:
    """Return the files that a model reads besides itself: as it names them, and in the bundle.

    Args:
        bundle: An opened bundle.
        variant: Whose model it is.
        model: POSIX path of the model in the bundle.

    Raises:
        IntegrityError: If the model cannot be read, or reads what is not its variant's.
    """
    files: dict[str, str] = {}
    for location in sorted(external_locations(bundle.file(model))):
        relative = posixpath.normpath(posixpath.join(posixpath.dirname(model), location))
        if relative not in variant.files:
            raise IntegrityError(
                f"{bundle.path}: model '{model}' keeps weights in {location!r}, which is not among "
                f"the files of variant '{variant.name}'. Copy the bundle again, or convert again."
            )
        files[location] = relative
    return files


def copied(bundle: Bundle, relative: str, target: Path) -> None:
    """Copy a file of a bundle, and see that the copy is what the manifest says.

    Args:
        bundle: An opened bundle.
        relative: POSIX path of the file in the bundle.
        target: Where the copy is to lie; its folders are made if they are missing.

    Raises:
        IntegrityError: If the file is missing or changed.
    """
    source = bundle.file(relative)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    sha256, expected = sha256_file(target), bundle.manifest.files[relative].sha256
    if sha256 != expected:
        raise IntegrityError(
            f"{bundle.path}: file '{relative}' has sha256 {sha256}, expected {expected}. "
            "Its content is changed: copy the bundle again."
        )
