"""Contents of the engine cache, and rules for removing engines."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mmedge.errors import InputError
from mmedge.files import storage_errors
from mmedge.files.locks import is_locked, key_lock_if_free
from mmedge.files.private import check_private
from mmedge.runtimes.engines.files import (
    CachedEngine,
    find_entry,
    grouped_files,
    load_entry,
    lock_path,
    remove_entry,
)
from mmedge.runtimes.engines.misses import Miss
from mmedge.runtimes.engines.record import EngineRecord

__all__ = ["SIDE_FOLDERS", "CacheEntry", "PruneRule", "Pruned", "entries", "prune", "side_files"]

SIDE_FOLDERS = ("timing", "runtime", "models")
"""Other files beside the engines: timing caches, runtime caches, model hashes."""


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One engine in the cache, or leftovers of one.

    Attributes:
        digest: What its files are named by.
        record: What is known of it, None where its record cannot be trusted.
        fault: Why it would not be loaded, "" if it would.
        size_bytes: Of all its files.
        used_unix_s: When it was loaded last, or built; seconds since 1970.
        busy: Whether it is being built just now.
    """

    digest: str
    record: EngineRecord | None
    fault: str
    size_bytes: int
    used_unix_s: float
    busy: bool


@dataclass(frozen=True, slots=True)
class PruneRule:
    """Which engines to remove: those that match any field.

    Attributes:
        stale: Damaged ones (every plan is read), leftovers of killed builds, and those that
            `versions` makes useless.
        versions: Installed versions by backend: engines of another version of these backends are
            stale.
        older_than_s: Those that were not loaded for longer than this, in seconds.
        model: Those of models whose label holds this, or whose hash begins with it.
        keep_bytes: As many as it takes, those first that were not loaded for the longest time, for
            the rest to fit in so many bytes.
        everything: All of them, and what SIDE_FOLDERS holds.

    Raises:
        InputError: If a number is negative or `model` is empty.
    """

    stale: bool = True
    versions: Mapping[str, str] = field(default_factory=dict)
    older_than_s: float | None = None
    model: str | None = None
    keep_bytes: int | None = None
    everything: bool = False

    def __post_init__(self) -> None:
        for name, value in (("older_than_s", self.older_than_s), ("keep_bytes", self.keep_bytes)):
            if value is not None and not value >= 0:
                raise InputError(f"Pruning: got {name} {value}, expected 0 or more.")
        if self.model == "":
            raise InputError("Pruning: got an empty model, expected a part of its name or hash.")


@dataclass(frozen=True, slots=True)
class Pruned:
    """Engines removed, or to be removed in a dry run.

    Attributes:
        removed: Each with the reason.
        freed_bytes: Their size, that of other files included.
        kept: Engines that stay.
        kept_bytes: Their size.
    """

    removed: tuple[tuple[CacheEntry, str], ...]
    freed_bytes: int
    kept: int
    kept_bytes: int


def entries(folder: Path, *, verify: bool = False) -> tuple[CacheEntry, ...]:
    """Return the entries of a cache folder; see EngineCache.entries."""
    if not check_private(folder):
        return ()
    found = [_entry(folder, *group, verify=verify) for group in grouped_files(folder).items()]
    return tuple(sorted(found, key=lambda entry: -entry.used_unix_s))


def side_files(folder: Path, kind: str) -> tuple[Path, ...]:
    """Return the files of one kind of SIDE_FOLDERS."""
    place = folder / kind
    return tuple(sorted(place.iterdir())) if place.is_dir() and not place.is_symlink() else ()


def prune(folder: Path, rule: PruneRule, *, dry_run: bool = False) -> Pruned:
    """Remove entries that match a rule from a cache folder; see EngineCache.prune."""
    found = entries(folder, verify=rule.stale and not rule.everything)
    kept = list(found)
    removed: list[tuple[CacheEntry, str]] = []
    freed_bytes = 0
    for entry, reason in _condemned(found, rule):
        if dry_run or _removed(folder, entry):
            removed.append((entry, reason))
            freed_bytes += entry.size_bytes
            kept.remove(entry)
    if rule.everything:
        for path in (path for kind in SIDE_FOLDERS for path in side_files(folder, kind)):
            freed_bytes += sum(status.st_size for status in _statuses([path]))
            if not dry_run:
                with storage_errors(path):
                    path.unlink(missing_ok=True)
    return Pruned(tuple(removed), freed_bytes, len(kept), sum(entry.size_bytes for entry in kept))


def _entry(folder: Path, digest: str, files: list[Path], *, verify: bool) -> CacheEntry:
    found: CachedEngine | Miss = find_entry(folder, digest)
    fault = ""
    if isinstance(found, CachedEngine) and verify:
        loaded = load_entry(found, used=False)
        found = loaded if isinstance(loaded, Miss) else found
    if isinstance(found, Miss):
        record = found.nearest
        absent = found.kind == "absent"
        fault = "left behind by an unfinished build" if absent else found.reason
    else:
        record = found.record
    statuses = _statuses(files)
    return CacheEntry(
        digest,
        record,
        fault,
        size_bytes=sum(status.st_size for status in statuses),
        used_unix_s=max((status.st_mtime for status in statuses), default=0.0),
        busy=is_locked(lock_path(folder, digest)),
    )


def _condemned(found: Sequence[CacheEntry], rule: PruneRule) -> Iterator[tuple[CacheEntry, str]]:
    now = time.time()
    left = []
    for entry in found:  # most recently used first
        if entry.busy:
            continue
        reason = _reason(entry, rule, now)
        if reason:
            yield entry, reason
        else:
            left.append(entry)
    if rule.keep_bytes is not None:
        total_bytes = sum(entry.size_bytes for entry in left)
        for entry in reversed(left):
            if total_bytes <= rule.keep_bytes:
                break
            total_bytes -= entry.size_bytes
            yield entry, "least recently used, over the size limit"


def _reason(entry: CacheEntry, rule: PruneRule, now: float) -> str:
    if rule.everything:
        return "everything goes"
    record = entry.record
    if rule.stale and entry.fault:
        return entry.fault
    if record is not None:
        backend, version = record.key.request.backend, record.key.version
        installed = rule.versions.get(backend, version)
        if rule.stale and installed != version:
            return f"built for {backend} {version}, this is {installed}"
        if rule.model is not None and (
            rule.model in record.label or record.key.model_sha256.startswith(rule.model)
        ):
            return f"of the model '{rule.model}'"
    if rule.older_than_s is not None and now - entry.used_unix_s > rule.older_than_s:
        return f"not used for {(now - entry.used_unix_s) / 86400:.1f} days"
    return ""


def _removed(folder: Path, entry: CacheEntry) -> bool:
    """Remove an entry, unless it is being built."""
    with key_lock_if_free(lock_path(folder, entry.digest)) as free:
        if free:
            remove_entry(folder, entry.digest)
        return free


def _statuses(paths: Iterable[Path]) -> list[os.stat_result]:
    found = []
    for path in paths:
        with suppress(FileNotFoundError):  # removed meanwhile
            found.append(path.lstat())
    return found
