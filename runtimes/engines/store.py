"""Engine cache: engines are keyed by everything they depend on, and built once.

A plan is loaded only if its hash matches its record and the record belongs to the key that
was requested. A plan can run code in TensorRT, so the folder must be writable by its owner only; it
is made so, and refused otherwise.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from mmedge.errors import EngineMismatchError, InputError, StorageError
from mmedge.files.cache_folder import cache_folder
from mmedge.files.locks import key_lock
from mmedge.files.private import UnsafeFolderError, check_private, make_private
from mmedge.runtimes.engines.files import (
    CachedEngine,
    LoadedEngine,
    find_entry,
    load_entry,
    lock_path,
    records,
    write_entry,
)
from mmedge.runtimes.engines.misses import Miss, explain
from mmedge.runtimes.engines.model_hash import model_sha256
from mmedge.runtimes.engines.pruning import (
    SIDE_FOLDERS,
    CacheEntry,
    Pruned,
    PruneRule,
    entries,
    prune,
)
from mmedge.runtimes.engines.record import EngineRecord, key_digest, record_of
from mmedge.runtimes.engines.spec import ANY, BuildHost, BuiltEngine, EngineKey, EngineRequest

__all__ = [
    "CacheEntry",
    "CachedEngine",
    "EngineCache",
    "EngineRecord",
    "LoadedEngine",
    "Miss",
    "PruneRule",
    "Pruned",
]

_LOG = logging.getLogger("mmedge.engines")
_TRIES = 5


class EngineCache:
    """Engines on disk, by key.

    Args:
        folder: Where they lie; None takes `engines` in mmedge's cache folder (MMEDGE_CACHE_DIR).
            It need not exist.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_folder() / "engines" if folder is None else Path(folder)

    def key_for(self, model: Path, request: EngineRequest, host: BuildHost) -> EngineKey:
        """Return everything that an engine of a model depends on.

        An engine for named compute capabilities is built without a GPU and finished by the driver
        when it is loaded, so it depends on neither CUDA nor driver.

        Args:
            model: The ONNX file; its external data is hashed with it.
            request: What is requested.
            host: What builds; its GPU is not looked at where the request names targets.

        Raises:
            BackendError: If the model is missing or damaged; see model_sha256.
            InputError: If neither the request nor the caller names a compute capability.
        """
        capabilities = tuple(sorted(set(request.compute_capabilities)))
        if not capabilities and not host.compute_capability:
            raise InputError(
                "An engine needs a compute capability to be known by: got none in the request and "
                "none of a GPU. Name the targets, such as '8.9'."
            )
        return EngineKey(
            model_sha256=model_sha256(model, self._hashes()),
            request=replace(request, compute_capabilities=capabilities),
            version=host.version,
            cuda="" if capabilities else host.cuda,
            driver="" if capabilities else host.driver,
            compute_capability="+".join(capabilities) or host.compute_capability,
        )

    def find(self, key: EngineKey) -> CachedEngine | Miss:
        """Return the engine of a key, or the miss, without reading the plan.

        An engine that was built for several compute capabilities serves a key that asks for one of
        them.

        Raises:
            StorageError: If others may write the folder, or it cannot be read.
        """
        if not check_private(self.folder):
            return Miss("absent", "no engine of this model has been built yet")
        found = find_entry(self.folder, key_digest(key))
        if isinstance(found, CachedEngine) or found.kind == "damaged":
            return found
        known = list(records(self.folder))
        covering = [record for record in known if _covers(record.key, key)]
        covering.sort(
            key=lambda record: (record.key.compute_capability == ANY, record.built_unix_s)
        )
        for record in covering:
            found = find_entry(self.folder, key_digest(record.key))
            if isinstance(found, CachedEngine):
                return found
        return explain(key, known)

    def load(self, key: EngineKey) -> LoadedEngine:
        """Return the engine of a key with its checked plan.

        Raises:
            EngineMismatchError: If there is none, or it is damaged; the message has the reason.
            StorageError: If others may write the folder, or it cannot be read.
        """
        found = self._load(key)
        if isinstance(found, Miss):
            what = "is damaged and not loaded" if found.kind == "damaged" else "is not there"
            raise EngineMismatchError(
                f"The engine that is needed {what}: {found.reason}. Build it with 'mmedge build'. "
                f"(Cache: {self.folder})"
            )
        return found

    def get_or_build(
        self,
        key: EngineKey,
        build: Callable[[], BuiltEngine],
        *,
        label: str = "",
        or_in_memory: bool = True,
        on_wait: Callable[[str], None] | None = None,
    ) -> LoadedEngine:
        """Return the engine of a key, building it on a miss, in one process at a time.

        Whoever comes while another builds the same engine waits and takes that one. Misses and
        waits are logged to "mmedge.engines". If the folder cannot be written
        there is a RuntimeWarning and the engine stays in memory; a damaged entry is replaced, with
        a RuntimeWarning.

        Args:
            key: What is needed.
            build: Makes it; called at most once. It must not ask for the same key.
            label: The model's name for people, see model_label.
            or_in_memory: Whether an engine that cannot be written may stay in memory; if not, a
                folder that cannot be written is an error before anything is built.
            on_wait: Also called with what there is to wait for, once and then every minute.

        Raises:
            StorageError: If others may write the folder; without `or_in_memory`, if it cannot be
                written or the disk is full.
            Whatever `build` raises.
        """
        what = label or f"model {key.model_sha256[:12]}"

        def report(message: str) -> None:
            _LOG.info("%s: %s", what, message)
            if on_wait is not None:
                on_wait(message)

        with ExitStack() as stack:
            writable = True
            try:
                found = self._load(key)
                if isinstance(found, Miss):
                    stack.enter_context(self._locked(key, report))
                    found = self._load(key)  # another process may have built it meanwhile
            except StorageError as error:
                if isinstance(error, UnsafeFolderError) or not or_in_memory:
                    raise
                self._warn_unwritable(error)
                found, writable = Miss("absent", "the engine cache cannot be used"), False
            if isinstance(found, LoadedEngine):
                return found
            if found.kind == "damaged":
                warnings.warn(
                    f"{what}: the engine in the cache {self.folder} is not loaded: {found.reason}. "
                    "It is rebuilt.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            _LOG.info("%s: %s: building", what, found.reason)
            built = build()
            record = record_of(key, built, label)
            path = None
            if writable:
                try:
                    path = write_entry(self.folder, record, built.plan)
                except StorageError as error:
                    if not or_in_memory:
                        raise
                    self._warn_unwritable(error)
            return LoadedEngine(built.plan, record, path, found)

    def store(self, key: EngineKey, built: BuiltEngine, *, label: str = "") -> CachedEngine:
        """Write a built engine, replacing an older one of the same key.

        Raises:
            InputError: If its plan is empty.
            StorageError: If the folder cannot be written, the disk is full, or others may write
                the folder.
        """
        record = record_of(key, built, label)
        with self._locked(key, lambda message: _LOG.info("%s: %s", label, message)):
            return CachedEngine(write_entry(self.folder, record, built.plan), record)

    def entries(self, *, verify: bool = False) -> tuple[CacheEntry, ...]:
        """Return the entries of the cache, most recently used first.

        Args:
            verify: Also read every plan and look at its hash.

        Raises:
            StorageError: If others may write the folder, or it cannot be read.
        """
        return entries(self.folder, verify=verify)

    def prune(self, rule: PruneRule | None = None, *, dry_run: bool = False) -> Pruned:
        """Remove engines, and leftovers of killed builds.

        Engines that are being built are left alone.

        Args:
            rule: Which; None removes what is damaged or left behind.
            dry_run: Only report what would be removed.

        Raises:
            StorageError: If the folder cannot be written, or others may write it.
        """
        return prune(self.folder, rule or PruneRule(), dry_run=dry_run)

    def timing_cache(self, backend: str, version: str, compute_capability: str) -> Path:
        """Return the timing cache of one backend, version and kind of GPU.

        The folder is made, if it can be.
        """
        return self._side_file(SIDE_FOLDERS[0], backend, version, compute_capability)

    def runtime_cache(self, backend: str, version: str, gpu: str) -> Path:
        """Return the runtime cache of compiled kernels for one version and GPU.

        The folder is made, if it can be.

        Args:
            backend: By its name in BACKENDS.
            version: Of its library.
            gpu: Identity of the GPU: name, compute capability, driver.
        """
        return self._side_file(SIDE_FOLDERS[1], backend, version, gpu)

    def _hashes(self) -> Path | None:
        """Return the file of model hashes, None if its folder does not exist yet."""
        try:
            return self.folder / SIDE_FOLDERS[2] if check_private(self.folder) else None
        except StorageError:
            return None

    def _side_file(self, kind: str, *parts: str) -> Path:
        folder = self.folder / kind
        with suppress(StorageError):  # the next write reports it
            make_private(self.folder)
            make_private(folder)
        return folder / f"{re.sub(r'[^A-Za-z0-9.+-]+', '_', '-'.join(parts))[:200]}.cache"

    def _load(self, key: EngineKey) -> LoadedEngine | Miss:
        for _ in range(_TRIES):
            found = self.find(key)
            if isinstance(found, Miss):
                return found
            loaded = load_entry(found)
            if isinstance(loaded, LoadedEngine) or loaded.kind == "damaged":
                break  # replaced or removed meanwhile
        return loaded

    @contextmanager
    def _locked(self, key: EngineKey, report: Callable[[str], None]) -> Iterator[None]:
        make_private(self.folder)
        with key_lock(lock_path(self.folder, key_digest(key)), report):
            yield

    def _warn_unwritable(self, error: StorageError) -> None:
        warnings.warn(
            f"The engine cache {self.folder} cannot be written, so this engine is kept in memory "
            f"and built again by the next process: {error} Point MMEDGE_CACHE_DIR at a folder that "
            "can be written.",
            RuntimeWarning,
            stacklevel=3,
        )


def _covers(built: EngineKey, wanted: EngineKey) -> bool:
    """Return whether a portable engine serves a key for this machine's GPU."""
    classes = built.request.compute_capabilities
    if not classes:
        return False
    named = wanted.compute_capability in classes
    if not named and not (ANY in classes and _is_among_any(wanted.compute_capability)):
        return False
    request = replace(wanted.request, compute_capabilities=classes)
    return built == replace(
        wanted,
        request=request,
        cuda="",
        driver="",
        compute_capability=built.compute_capability,
    )


def _is_among_any(compute_capability: str) -> bool:
    return tuple(map(int, compute_capability.split("."))) >= (8, 0)
