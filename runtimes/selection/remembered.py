"""Cache of measured backend choices, on disk.

One small JSON file a choice, so that processes that write at once do not lose each other's. It is
found again by everything that a choice depends on: the files of the graph, the options, the
processor and how much of it is allowed, and the versions of the engines and of mmedge. Nothing here
is needed: a memory that is lost, damaged or cannot be written costs a measurement, no more.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from mmedge.errors import StorageError
from mmedge.files import write_atomic
from mmedge.files.cache_folder import cache_folder
from mmedge.files.json_file import read_json
from mmedge.runtimes.backends import BACKENDS, backend
from mmedge.runtimes.processor import allowed_processors, processor_name
from mmedge.runtimes.session import SessionOptions

__all__ = ["Choice", "choice_files", "recall_choice", "remember_choice"]

_FORMAT = 1
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend of a graph, and the reason for it.

    Attributes:
        backend: Name in mmedge.runtimes.BACKENDS.
        reason: In words.
        latencies_ms: Median latency of each backend that was measured, by its name; empty where
            nothing was measured.
    """

    backend: str
    reason: str
    latencies_ms: Mapping[str, float] = field(default_factory=dict)


def choice_files() -> tuple[Path, ...]:
    """Return the files of all cached choices; removing one costs a measurement."""
    return tuple(sorted((cache_folder() / "backends").glob("*.json")))


def recall_choice(files_sha256: Sequence[str], options: SessionOptions) -> Choice | None:
    """Return the cached choice for a graph on this machine, None if there is none.

    Args:
        files_sha256: Hash of every file of the graph's variant, in any order.
        options: How the graph is to be run, its device included.
    """
    path = _path(_key(files_sha256, options))
    try:
        return _choice(read_json(path, max_bytes=_MAX_BYTES, error=StorageError))
    except StorageError:
        return None  # missing, damaged or unreadable


def remember_choice(files_sha256: Sequence[str], options: SessionOptions, choice: Choice) -> None:
    """Cache the backend measured as the fastest for a graph on this machine.

    Where it cannot be written there is a RuntimeWarning, and the next load measures again.

    Args:
        files_sha256: Hash of every file of the graph's variant, in any order.
        options: How the graph was run, its device included.
        choice: What was found; `mmedge.load` takes its backend from now on.
    """
    key = _key(files_sha256, options)
    document = {
        "format": _FORMAT,
        "backend": choice.backend,
        "reason": choice.reason,
        "latencies_ms": {name: float(ms) for name, ms in choice.latencies_ms.items()},
        "for": key,
    }
    path = _path(key)
    try:
        write_atomic(path, (json.dumps(document, indent=2, sort_keys=True) + "\n").encode())
    except StorageError as error:
        warnings.warn(
            f"The choice of a backend cannot be remembered, so every load measures again: {error} "
            "Point MMEDGE_CACHE_DIR at a folder that can be written, or name the backend.",
            RuntimeWarning,
            stacklevel=2,
        )


def _key(files_sha256: Sequence[str], options: SessionOptions) -> dict[str, object]:
    engines = {
        name: backend(name).engine_version()
        for name in BACKENDS
        if backend(name).layouts(options.device)  # others were not measured
    }
    settings = asdict(options) | {"profile_to": options.profile_to is not None}
    return {
        "files": sorted(files_sha256),
        "options": settings,
        "processor": processor_name(),
        "processors": len(allowed_processors()),
        "engines": {name: found for name, found in engines.items() if found is not None},
        "mmedge": version("mmedge"),
    }


def _path(key: Mapping[str, object]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "backends" / f"{digest[:32]}.json"


def _choice(document: object) -> Choice | None:
    """Return the choice in a document, None if it is invalid."""
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        return None
    name, reason = document.get("backend"), document.get("reason")
    latencies = document.get("latencies_ms")
    if not isinstance(name, str) or name not in BACKENDS or not isinstance(reason, str):
        return None
    if not isinstance(latencies, dict):
        return None
    if not all(isinstance(ms, float) and math.isfinite(ms) for ms in latencies.values()):
        return None
    return Choice(name, reason, latencies)
