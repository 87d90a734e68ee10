"""File check: sizes and hashes of a bundle against its manifest."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from mmedge.bundle.manifest import Variant
from mmedge.bundle.opening import Bundle
from mmedge.bundle.paths import MANIFEST_NAME, check_relative_path
from mmedge.errors import BackendError, IntegrityError
from mmedge.files import sha256_file
from mmedge.runtimes.onnx_file import read_onnx_file

__all__ = ["external_files", "verify_files"]


def verify_files(bundle: Bundle) -> None:
    """Check that a bundle holds exactly the files of its manifest, with their sizes and hashes.

    A model may keep its weights in other files; these must be among its variant's.

    Raises:
        IntegrityError: If a file is missing, changed, lies outside the bundle, or is not listed,
            or if a model reads a file that is not its variant's; the first such file is named.
    """
    listed = bundle.manifest.files
    for relative in _walk(bundle.path):
        if relative not in listed and relative != MANIFEST_NAME:
            raise IntegrityError(
                f"{bundle.path}: file '{relative}' is not listed in {MANIFEST_NAME}. Remove it, "
                "or copy the bundle again."
            )
    for relative, entry in listed.items():
        path = bundle.file(relative)
        try:
            size_bytes = path.stat().st_size
            sha256 = sha256_file(path)
        except OSError as error:
            raise IntegrityError(f"Cannot read {path}: {error.strerror}.") from error
        if size_bytes != entry.size_bytes:
            raise IntegrityError(
                f"{bundle.path}: file '{relative}' has {size_bytes} bytes, expected "
                f"{entry.size_bytes}. It is changed or cut off: copy the bundle again."
            )
        if sha256 != entry.sha256:
            raise IntegrityError(
                f"{bundle.path}: file '{relative}' has sha256 {sha256}, expected {entry.sha256}. "
                "Its content is changed: copy the bundle again."
            )
    for role in bundle.manifest.roles.values():
        for variant in role.variants:
            for model in variant.models.values():
                external_files(bundle, variant, model)


def external_files(bundle: Bundle, variant: Variant, model: str) -> dict[str, str]:
    """Return the external data files of a model: by its own name, and in the bundle.

    Args:
        bundle: An opened bundle.
        variant: The variant that the model belongs to.
        model: POSIX path of the model in the bundle.

    Raises:
        IntegrityError: If the model cannot be read, or reads a file that is not its variant's.
    """
    path = bundle.file(model)
    held = {bundle.file(relative): relative for relative in variant.files}
    files: dict[str, str] = {}
    try:
        described = read_onnx_file(path)
    except BackendError as error:
        raise IntegrityError(str(error)) from error
    for location in described.external_locations:
        relative = _held_file(path.parent, location, held)
        if relative is None:
            raise IntegrityError(
                f"{bundle.path}: model '{model}' keeps weights in {location!r}, which is not among "
                f"the files of variant '{variant.name}'. Do not load it: copy the bundle again, "
                "or convert again."
            )
        files[location] = relative
    return files


def _held_file(folder: Path, location: str, held: Mapping[Path, str]) -> str | None:
    try:
        check_relative_path(location)
    except ValueError:
        return None
    return held.get(Path(os.path.realpath(folder / location)))


def _walk(folder: Path) -> Iterator[str]:
    """Yield the POSIX paths of everything but plain folders, sorted.

    A link to a folder counts as a file: what lies behind it is not the bundle's.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            for below in _walk(Path(entry.path)):
                yield f"{entry.name}/{below}"
        else:
            yield entry.name
