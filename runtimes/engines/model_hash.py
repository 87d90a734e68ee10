"""Model hash over the ONNX file and its external data.

Hashing costs about a second a gigabyte, at every start. So a hash is remembered together with what
the file system says of the files: as long as device, inode, size and both times are the same, it
holds. A program cannot set the time of change, so a replaced file of the same size and
time of modification is detected.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from mmedge.errors import BackendError, StorageError
from mmedge.files import sha256_file, write_atomic
from mmedge.files.json_file import parse_json
from mmedge.files.private import UnsafeFileError, make_private, read_private
from mmedge.runtimes.onnx_file import check_external_data, read_onnx_file

__all__ = ["model_label", "model_sha256"]

_Mark: TypeAlias = tuple[str, int, int, int, int, int]
"""Location in the model's folder; device, inode, size, times of modification and change in ns."""

_MAX_BYTES = 1 << 20
# A file just written may be rewritten within one clock tick.
_SETTLED_NS = 5_000_000_000


def model_sha256(model: Path, memory: Path | None = None) -> str:
    """Return one hash over an ONNX file and its external data files.

    Args:
        model: The ONNX file.
        memory: Folder in which hashes are remembered, writable by its owner alone; None for
            nowhere. One that cannot be used costs the hashing, no more.

    Raises:
        BackendError: If the file is missing or damaged, or its external data is missing, cut short
            or outside the model's folder.
    """
    described = read_onnx_file(model)
    check_external_data(model, described)
    locations = ["", *sorted({entry.location for entry in described.external_data})]
    paths = {name: model.parent / name if name else model for name in locations}
    try:
        marks = _marks(paths)
        if memory is not None and (known := _recall(memory, model, marks)):
            return known
        hashes = [(name, sha256_file(path)) for name, path in paths.items()]
        unchanged = _marks(paths) == marks
    except OSError as error:
        raise BackendError(f"{model}: cannot be read: {error.strerror}.") from error
    found = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    newest_ns = max(max(mark[4:]) for mark in marks)
    if memory is not None and unchanged and time.time_ns() - newest_ns > _SETTLED_NS:
        _remember(memory, model, marks, found)
    return found


def model_label(model: Path) -> str:
    """Return a model's display name: its file with the two folders above it."""
    return "/".join(model.absolute().parts[-3:])


def _marks(paths: dict[str, Path]) -> list[_Mark]:
    found = []
    for name, path in paths.items():
        status = path.stat()
        times = (status.st_mtime_ns, status.st_ctime_ns)
        found.append((name, status.st_dev, status.st_ino, status.st_size, *times))
    return found


def _recall(memory: Path, model: Path, marks: list[_Mark]) -> str | None:
    try:
        data = read_private(_place(memory, model), _MAX_BYTES)
        document = parse_json(data, model, error=StorageError)
    except (FileNotFoundError, UnsafeFileError, StorageError):
        return None
    if not isinstance(document, dict) or document.get("files") != [list(mark) for mark in marks]:
        return None
    found = document.get("sha256")
    return found if isinstance(found, str) and len(found) == 64 else None


def _remember(memory: Path, model: Path, marks: list[_Mark], found: str) -> None:
    document = {"model": str(model.absolute()), "files": marks, "sha256": found}
    with suppress(StorageError):
        make_private(memory)
        write_atomic(_place(memory, model), json.dumps(document).encode(), private=True)


def _place(memory: Path, model: Path) -> Path:
    name = hashlib.sha256(str(model.absolute()).encode(errors="surrogateescape")).hexdigest()
    return memory / f"{name[:32]}.json"
