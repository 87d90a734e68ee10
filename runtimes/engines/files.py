"""Files of the engine cache: entries are read, written and removed as a whole.

An entry is two files in one folder, `DIGEST.json`, the record, and `DIGEST.HASH.plan`, the engine,
with DIGEST of the key and HASH of the plan. The plan is written first: an entry is there
once its record is, so a kill at any moment leaves the old entry or the new one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mmedge.errors import StorageError
from mmedge.files import storage_errors, write_atomic
from mmedge.files.private import UnsafeFileError, read_private, stat_private
from mmedge.runtimes.engines.misses import Miss
from mmedge.runtimes.engines.record import (
    MAX_RECORD_BYTES,
    EngineRecord,
    RecordError,
    key_digest,
    parse_record,
    sha256_of,
)

__all__ = [
    "CachedEngine",
    "LoadedEngine",
    "find_entry",
    "grouped_files",
    "load_entry",
    "lock_path",
    "records",
    "remove_entry",
    "write_entry",
]

# DIGEST.json, DIGEST.lock, DIGEST.HASH.plan, and leftovers of killed writers.
_OF_ENTRY = re.compile(r"\.?([0-9a-f]{32})\..+")


@dataclass(frozen=True, slots=True)
class CachedEngine:
    """An engine on disk with a valid record; its plan is hashed on loading.

    Attributes:
        path: Of the plan. Load it with EngineCache.load, which looks at its hash.
        record: What is known of it.
    """

    path: Path
    record: EngineRecord


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """A plan in memory that matches its record.

    Attributes:
        plan: The serialized engine.
        record: What is known of it.
        path: Where it lies, None if the cache could not be written and it is in memory alone.
        miss: Why it was built just now, None if it was found.
    """

    plan: bytes
    record: EngineRecord
    path: Path | None
    miss: Miss | None = None


def lock_path(folder: Path, digest: str) -> Path:
    """Return the lock file of an entry."""
    return folder / f"{digest}.lock"


def find_entry(folder: Path, digest: str) -> CachedEngine | Miss:
    """Return an entry with a valid record and a plan of the right size."""
    missing = ""
    while True:
        try:
            record = _record(folder, digest)
        except FileNotFoundError:
            return Miss("absent", "no engine of this model has been built yet")
        except RecordError as error:
            return Miss("damaged", str(error))
        except UnsafeFileError as error:
            return Miss("damaged", f"its record {error}")
        path = _plan_path(folder, record)
        try:
            size_bytes = stat_private(path).st_size
        except FileNotFoundError:
            if missing == path.name:
                return Miss("damaged", "its plan is missing", record)
            missing = path.name  # or the entry was replaced since its record was read
            continue
        except UnsafeFileError as error:
            return Miss("damaged", f"its plan {error}", record)
        if size_bytes != record.plan_size_bytes:
            return Miss("damaged", _wrong_size(size_bytes, record), record)
        return CachedEngine(path, record)


def load_entry(found: CachedEngine, *, used: bool = True) -> LoadedEngine | Miss:
    """Return an entry with its plan, read once and hashed.

    Args:
        found: The entry.
        used: Whether it counts as used now, which prune looks at.
    """
    record = found.record
    try:
        plan = read_private(found.path, record.plan_size_bytes)
    except FileNotFoundError:
        return Miss("absent", "it was removed just now", record)
    except UnsafeFileError as error:
        return Miss("damaged", f"its plan {error}", record)
    if len(plan) != record.plan_size_bytes:
        return Miss("damaged", _wrong_size(len(plan), record), record)
    if sha256_of(plan) != record.plan_sha256:
        return Miss("damaged", "its plan was changed: its hash differs", record)
    if used:
        with suppress(OSError):  # the cache may be read-only
            os.utime(_record_path(found.path.parent, key_digest(record.key)))
    return LoadedEngine(plan, record, found.path)


def write_entry(folder: Path, record: EngineRecord, plan: bytes) -> Path:
    """Write an entry whose lock is held, and return the path of its plan.

    Raises:
        StorageError: If the disk is full, or the folder cannot be written.
    """
    digest = key_digest(record.key)
    path, document = _plan_path(folder, record), _record_path(folder, digest)
    for place in (path, document):
        if place.is_symlink():  # a link would be followed
            with storage_errors(place):
                place.unlink(missing_ok=True)
    write_atomic(path, plan, private=True)
    write_atomic(document, record.model_dump_json().encode(), private=True)
    for left in grouped_files(folder).get(digest, ()):
        if left.suffix in (".plan", ".partial") and left != path:
            with suppress(OSError):  # harmless, and prune removes it
                left.unlink()
    return path


def remove_entry(folder: Path, digest: str) -> None:
    """Remove an entry whose lock is held, its record first; the lock file stays.

    Raises:
        StorageError: If the folder cannot be written.
    """
    record = _record_path(folder, digest)
    files = [path for path in grouped_files(folder).get(digest, ()) if path.suffix != ".lock"]
    for path in sorted(files, key=lambda path: path != record):
        with storage_errors(path):
            path.unlink(missing_ok=True)


def grouped_files(folder: Path) -> dict[str, list[Path]]:
    """Return the files of every entry by digest, including leftovers of killed writers.

    Raises:
        StorageError: If the folder cannot be read.
    """
    groups: dict[str, list[Path]] = {}
    try:
        paths = sorted(folder.iterdir())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageError(
            f"Cannot read the engine cache {folder}: {error.strerror}. Change the permissions, or "
            "set MMEDGE_CACHE_DIR to another folder."
        ) from error
    for path in paths:
        if match := _OF_ENTRY.fullmatch(path.name):
            groups.setdefault(match[1], []).append(path)
    return groups


def records(folder: Path) -> Iterator[EngineRecord]:
    """Yield every valid record, even if its plan is missing.

    Raises:
        StorageError: If the folder cannot be read.
    """
    for digest in grouped_files(folder):
        with suppress(FileNotFoundError, UnsafeFileError, RecordError):
            yield _record(folder, digest)


def _record(folder: Path, digest: str) -> EngineRecord:
    return parse_record(read_private(_record_path(folder, digest), MAX_RECORD_BYTES), digest)


def _record_path(folder: Path, digest: str) -> Path:
    return folder / f"{digest}.json"


def _plan_path(folder: Path, record: EngineRecord) -> Path:
    return folder / f"{key_digest(record.key)}.{record.plan_sha256[:16]}.plan"


def _wrong_size(size_bytes: int, record: EngineRecord) -> str:
    return f"its plan has {size_bytes} bytes, expected {record.plan_size_bytes}"
