"""Export folder: overwrite rules, and a writer confined to the folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mmedge.bundle.manifest import Variant
from mmedge.bundle.opening import Bundle
from mmedge.bundle.paths import check_relative_path
from mmedge.bundle.verifying import external_files, verify_files
from mmedge.errors import BundleError, IntegrityError, StorageError
from mmedge.files import atomic_directory, sha256_file
from mmedge.preprocess.registry import open_processor
from mmedge.runtimes.onnx_file import check_external_data, read_onnx_file

__all__ = ["ExportFolder", "fresh_folder"]

_DATA_SUFFIX = ".data"


@dataclass(frozen=True, slots=True)
class ExportFolder:
    """The output folder of an export; see fresh_folder.

    Every path is checked before it is used and no file is written twice, so that nothing in a
    bundle can leave the folder or take the place of a file that mmedge writes.

    Attributes:
        path: The folder.
        bundle: The bundle that is exported, its files verified.
    """

    path: Path
    bundle: Bundle
    _written: dict[str, str] = field(default_factory=dict)  # sha256 by path

    def write(self, relative: str, data: bytes) -> None:
        """Write a file.

        Args:
            relative: POSIX path from the folder; missing folders are made.
            data: Its content.

        Raises:
            BundleError: If the path leaves the folder, or another file was written there.
        """
        target = self._target(relative, hashlib.sha256(data).hexdigest())
        if target is not None:
            with target.open("xb") as file:
                file.write(data)

    def copy(self, source: str, relative: str) -> None:
        """Copy a file of the bundle and check the copy against the manifest.

        Args:
            source: POSIX path in the bundle.
            relative: POSIX path from the folder; missing folders are made.

        Raises:
            BundleError: As for write.
            IntegrityError: If the file is missing or changed.
        """
        expected = self.bundle.manifest.files[source].sha256
        target = self._target(relative, expected)
        if target is None:
            return
        with self.bundle.file(source).open("rb") as read, target.open("xb") as written:
            shutil.copyfileobj(read, written, 1 << 20)
        sha256 = sha256_file(target)
        if sha256 != expected:
            raise IntegrityError(
                f"{self.bundle.path}: file '{source}' has sha256 {sha256}, expected {expected}. "
                "It changed during the copy: copy the bundle again."
            )

    def copy_model(self, variant: Variant, model: str, relative: str) -> tuple[str, ...]:
        """Copy an ONNX file and its external data.

        Args:
            variant: The variant that the model belongs to.
            model: POSIX path of the model in the bundle.
            relative: POSIX path from the folder.

        Returns:
            Paths of the external data from the folder. The model contains their names, so they
            are kept.

        Raises:
            BundleError: As for write, or if external data is not a `.data` file beside the model.
            IntegrityError: As for copy.
            BackendError: If it is not an ONNX file, or its external data is cut short.
        """
        path = self.bundle.file(model)
        check_external_data(path, read_onnx_file(path))
        self.copy(model, relative)
        copied = []
        for location, source in external_files(self.bundle, variant, model).items():
            if "/" in location or not location.endswith(_DATA_SUFFIX):
                raise BundleError(
                    f"{self.bundle.path}: model '{model}' keeps weights in {location!r}, expected "
                    f"a file beside it whose name ends in '{_DATA_SUFFIX}'. Convert again."
                )
            copied.append("/".join((*relative.split("/")[:-1], location)))
            self.copy(source, copied[-1])
        return tuple(copied)

    def _target(self, relative: str, sha256: str) -> Path | None:
        """Return the path of a new file, making its folder; None if the file exists."""
        try:
            check_relative_path(relative)
        except ValueError as error:
            raise BundleError(f"{self.bundle.path}: cannot be exported: {error}.") from error
        known = self._written.setdefault(relative.casefold(), sha256)
        target = self.path / relative
        if known != sha256:
            raise BundleError(
                f"{self.bundle.path}: cannot be exported: two different files would be written to "
                f"{relative!r}. Leave one of the roles out with --role, or convert again."
            )
        if target.exists():
            return None
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


@contextmanager
def fresh_folder(
    bundle: Bundle, out: Path, marker: str, *, overwrite: bool
) -> Iterator[ExportFolder]:
    """Verify a bundle and yield an empty folder that becomes `out` if the block succeeds.

    Args:
        bundle: The bundle that is exported.
        out: Where the export is to stand.
        marker: Name of the file by which an older export is known.
        overwrite: Whether an older export may be replaced.

    Raises:
        IntegrityError: If a file of the bundle is missing, changed or not listed: see verify_files.
        BundleError: If a processor cannot be opened.
        StorageError: If an export exists there and may not be replaced, if something else is
            there, or if the disk is full or the place cannot be written.
    """
    if os.path.lexists(out):
        empty = out.is_dir() and not out.is_symlink() and not any(out.iterdir())
        if not empty and (out.is_symlink() or not (out / marker).is_file()):
            raise StorageError(
                f"Cannot export to {out}: mmedge export did not write what is there, "
                "and is left alone. Remove it, or choose another folder."
            )
        if not empty and not overwrite:
            raise StorageError(
                f"Cannot export to {out}: an export exists there. Pass --overwrite to replace it, "
                "or choose another folder."
            )
    verify_files(bundle)
    for config in bundle.manifest.processors.values():
        open_processor(config, bundle.path)
    with atomic_directory(out) as folder:
        yield ExportFolder(folder, bundle)
