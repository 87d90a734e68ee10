"""Paths in a manifest: relative, POSIX, and confined to the bundle."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema

from mmedge.errors import IntegrityError

__all__ = ["MANIFEST_NAME", "BundlePath", "check_relative_path", "confined_path"]

MANIFEST_NAME = "manifest.json"

_MAX_SEGMENT_BYTES = 255  # NAME_MAX of common file systems
_MAX_PATH_BYTES = 1024


def check_relative_path(path: str) -> str:
    """Return `path` if it can name a file inside a bundle on any system.

    Raises:
        ValueError: If it is empty, absolute, too long, or has a backslash, a drive, a control
            character, or an empty, "." or ".." segment.
    """
    fault = _fault(path)
    if fault is not None:
        raise ValueError(f"path {path!r} {fault}; expected a relative POSIX path inside the bundle")
    return path


def _fault(path: str) -> str | None:
    segments = path.split("/")
    faults = {
        "is empty": not path,
        "is absolute": path.startswith("/"),
        "contains a backslash": "\\" in path,
        "starts with a drive": len(path) > 1 and path[1] == ":" and path[0].isalpha(),
        "contains a control character": not path.isprintable(),
        "leaves its folder": ".." in segments,
        "has an empty or '.' segment": "" in segments or "." in segments,
        "is too long": len(path.encode()) > _MAX_PATH_BYTES
        or any(len(segment.encode()) > _MAX_SEGMENT_BYTES for segment in segments),
    }
    return next((fault for fault, holds in faults.items() if holds), None)


# The part of check_relative_path that a JSON Schema can express.
_SCHEMA = WithJsonSchema(
    {
        "type": "string",
        "maxLength": _MAX_PATH_BYTES,
        "pattern": r"^(?![A-Za-z]:)(?!\.{1,2}(/|$))[^/\\]+(/(?!\.{1,2}(/|$))[^/\\]+)*$",
    }
)

BundlePath = Annotated[str, AfterValidator(check_relative_path), _SCHEMA]


def confined_path(root: Path, relative: str) -> Path:
    """Return the resolved path of `relative`, after checking that it is inside `root`.

    Args:
        root: The bundle's folder.
        relative: POSIX path from there.

    Returns:
        The absolute path of an existing regular file inside `root`.

    Raises:
        IntegrityError: If the file is missing, is no regular file, or lies outside `root`.
    """
    try:
        check_relative_path(relative)
    except ValueError as error:
        raise IntegrityError(f"{root}: {error}.") from error
    try:
        top = os.path.realpath(root, strict=True)
        target = Path(os.path.realpath(Path(top, relative), strict=True))
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IntegrityError(
            f"{root}: file '{relative}' is missing. Copy the bundle again, or convert again."
        ) from error
    except OSError as error:
        raise IntegrityError(
            f"{root}: file '{relative}' cannot be read: {error.strerror}."
        ) from error
    if not target.is_relative_to(top):
        raise IntegrityError(
            f"{root}: '{relative}' is a link that leaves the bundle (to {target}). A bundle holds "
            "its own files: copy the file in place of the link."
        )
    if not stat.S_ISREG(mode):
        raise IntegrityError(f"{root}: '{relative}' is not a regular file. Copy the bundle again.")
    return target
