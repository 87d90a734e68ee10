"""The engine cache: engines found again by everything that they depend on, built once.

An entry is two files in one folder, `DIGEST.json`, the record, and `DIGEST.HASH.plan`, the engine,
where DIGEST stands for the key and HASH for the plan. The plan is written first: an entry is there
once its record is, so a kill at any moment leaves the old entry or the new one. A plan is loaded
only if it hashes to what the record says and the record is of the very key that was asked for.

TensorRT runs what a plan says, so the folder must be writable by its owner alone; it is made so,
and refused otherwise.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from mmedge.errors import EngineMismatchError, InputError, StorageError
from mmedge.files import write_atomic
from mmedge.runtimes.choices import cache_folder
from mmedge.runtimes.trt.engine_record import (
    MAX_RECORD_BYTES,
    EngineRecord,
    RecordError,
    key_digest,
    parse_record,
    record_of,
    sha256_of,
)
from mmedge.runtimes.trt.engines import BuiltEngine, EngineKey, EngineRequest, Flavour
from mmedge.runtimes.trt.key_lock import key_lock
from mmedge.runtimes.trt.misses import Miss, explain
from mmedge.runtimes.trt.model_hash import model_sha256
from mmedge.runtimes.trt.private_folder import (
    UnsafeFileError,
    check_private,
    make_private,
    read_private,
    stat_private,
)

__all__ = ["CachedEngine", "EngineCache", "EngineRecord", "LoadedEngine", "Miss"]

_LOG = logging.getLogger("mmedge.engines")
_DIGEST = re.compile(r"([0-9a-f]{32})\.json")


@dataclass(frozen=True, slots=True)
class CachedEngine:
    """An engine on disk whose record holds; its plan is hashed when it is loaded.

    Attributes:
        path: Of the plan. Load it with EngineCache.load, which looks at its hash.
        record: What is known of it.
    """

    path: Path
    record: EngineRecord


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """A plan in memory that is what its record says.

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


class EngineCache:
    """Engines on disk, by what they depend on.

    Args:
        folder: Where they lie; None takes `engines` in mmedge's cache folder (MMEDGE_CACHE_DIR).
            It need not exist.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_folder() / "engines" if folder is None else Path(folder)

    def key_for(
        self,
        model: Path,
        request: EngineRequest,
        *,
        version: str,
        cuda: str,
        driver: str,
        compute_capability: str = "",
    ) -> EngineKey:
        """Return everything that an engine of a model depends on.

        An engine of TensorRT-RTX that is built for named compute capabilities is built without a
        GPU and finished by the driver when it is loaded, so it depends on neither CUDA nor driver.

        Args:
            model: The ONNX file; its external data is hashed with it.
            request: What is asked for.
            version: Of the TensorRT library.
            cuda: Version of the CUDA runtime, "" where the engine does not depend on it.
            driver: Version of the driver, "" where there is none.
            compute_capability: Of the GPU of this machine, such as "8.9"; not looked at where the
                request names its own.

        Raises:
            BackendError: If the model is missing or damaged; see model_sha256.
            InputError: If neither the request nor the caller names a compute capability.
        """
        capabilities = tuple(sorted(set(request.compute_capabilities)))
        if not capabilities and not compute_capability:
            raise InputError(
                "An engine needs a compute capability to be known by: got none in the request and "
                "none of a GPU. Name the targets, such as '8.9'."
            )
        portable = request.flavour == "tensorrt-rtx" and bool(capabilities)
        return EngineKey(
            model_sha256=model_sha256(model),
            request=replace(request, compute_capabilities=capabilities),
            version=version,
            cuda="" if portable else cuda,
            driver="" if portable else driver,
            compute_capability="+".join(capabilities) or compute_capability,
        )

    def find(self, key: EngineKey) -> CachedEngine | Miss:
        """Return the engine of a key, or why there is none. The plan is not read.

        An engine of TensorRT-RTX that was built for several compute capabilities serves a key that
        asks for one of them.

        Raises:
            StorageError: If others may write the folder, or it cannot be read.
        """
        if not check_private(self.folder):
            return Miss("absent", "no engine has been built yet")
        found = self._find_exact(key)
        if isinstance(found, Miss) and found.kind == "absent":
            records = list(self._records())
            for record in sorted(
                (record for record in records if _covers(record.key, key)),
                key=lambda record: (record.key.compute_capability == "any", -record.built_unix_s),
            ):
                covering = self._find_exact(record.key)
                if isinstance(covering, CachedEngine):
                    return covering
            return explain(key, records)
        return found

    def load(self, key: EngineKey) -> LoadedEngine:
        """Return the engine of a key, its plan read and checked.

        Raises:
            EngineMismatchError: If there is none, or it is damaged; the message says why.
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
        wait_told: Callable[[str], None] | None = None,
    ) -> LoadedEngine:
        """Return the engine of a key, built if need be, by one process at a time.

        Whoever comes while another builds the same engine waits and takes that one. What is told
        of misses and waits goes to the logger "mmedge.engines". If the folder cannot be written
        there is a RuntimeWarning and the engine stays in memory; a damaged entry is replaced, with
        a RuntimeWarning.

        Args:
            key: What is needed.
            build: Makes it; called at most once. It must not ask for the same key.
            label: The model's name for people, see model_label.
            wait_told: Also called with what there is to wait for, once and then every minute.

        Raises:
            StorageError: If others may write the folder.
            Whatever `build` raises.
        """
        check_private(self.folder)
        what = label or f"model {key.model_sha256[:12]}"

        def told(message: str) -> None:
            _LOG.info("%s: %s", what, message)
            if wait_told is not None:
                wait_told(message)

        with ExitStack() as stack:
            writable = True
            try:
                found = self._load(key)
                if isinstance(found, Miss):
                    stack.enter_context(self._locked(key_digest(key), told))
                    found = self._load(key)  # another may have built it meanwhile
            except StorageError as error:
                self._warn_unwritable(error)
                found, writable = Miss("absent", "the engine cache cannot be used"), False
            if isinstance(found, LoadedEngine):
                return found
            if found.kind == "damaged":
                warnings.warn(
                    f"{what}: the engine in the cache {self.folder} is not loaded: {found.reason}. "
                    "It is built anew.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            _LOG.info("%s: %s: building", what, found.reason)
            built = build()
            record = record_of(key, built, label)
            path = None
            if writable:
                try:
                    path = self._write(record, built.plan)
                except StorageError as error:
                    self._warn_unwritable(error)
            return LoadedEngine(built.plan, record, path, found)

    def store(self, key: EngineKey, built: BuiltEngine, *, label: str = "") -> CachedEngine:
        """Write an engine that was built, over an older one of the same key.

        Raises:
            InputError: If its plan is empty.
            StorageError: If the folder cannot be written, the disk is full, or others may write
                the folder.
        """
        record = record_of(key, built, label)
        with self._locked(key_digest(key), lambda message: _LOG.info("%s: %s", label, message)):
            return CachedEngine(self._write(record, built.plan), record)

    def timing_cache(self, flavour: Flavour, version: str, compute_capability: str) -> Path:
        """Return where builds of one flavour, version and kind of GPU keep their timings.

        The folder is made, if it can be.
        """
        return self._side_file("timing", flavour, version, compute_capability)

    def runtime_cache(self, version: str, gpu: str) -> Path:
        """Return where TensorRT-RTX keeps the kernels it compiled for one version and GPU.

        The folder is made, if it can be.

        Args:
            version: Of TensorRT-RTX.
            gpu: Whatever tells GPUs apart: name, compute capability, driver.
        """
        return self._side_file("runtime", "tensorrt-rtx", version, gpu)

    def _side_file(self, kind: str, *parts: str) -> Path:
        folder = self.folder / kind
        with suppress(StorageError):  # whoever writes there will be told
            make_private(self.folder)
            make_private(folder)
        return folder / f"{re.sub(r'[^A-Za-z0-9.+-]+', '_', '-'.join(parts))[:200]}.cache"

    @contextmanager
    def _locked(self, digest: str, told: Callable[[str], None]) -> Iterator[None]:
        make_private(self.folder)
        with key_lock(self.folder / f"{digest}.lock", told):
            yield

    def _records(self) -> Iterator[EngineRecord]:
        """Yield every record that can be trusted."""
        try:
            names = sorted(path.name for path in self.folder.iterdir())
        except OSError as error:
            raise StorageError(
                f"Cannot read the engine cache {self.folder}: {error.strerror}. Change the "
                "permissions, or set MMEDGE_CACHE_DIR to another folder."
            ) from error
        for name in names:
            if match := _DIGEST.fullmatch(name):
                with suppress(FileNotFoundError, UnsafeFileError, RecordError):
                    yield self._record(match[1])

    def _record(self, digest: str) -> EngineRecord:
        data = read_private(self.folder / f"{digest}.json", MAX_RECORD_BYTES)
        return parse_record(data, digest)

    def _find_exact(self, key: EngineKey) -> CachedEngine | Miss:
        digest = key_digest(key)
        missing = ""
        while True:
            try:
                record = self._record(digest)
            except FileNotFoundError:
                return Miss("absent", "no engine has been built yet")
            except RecordError as error:
                return Miss("damaged", str(error))
            except UnsafeFileError as error:
                return Miss("damaged", f"its record {error}")
            path = self._plan_path(digest, record)
            try:
                size_bytes = stat_private(path).st_size
            except FileNotFoundError:
                if missing == path.name:
                    return Miss("damaged", "its plan is missing", record)
                missing = path.name  # replaced since its record was read?
                continue
            except UnsafeFileError as error:
                return Miss("damaged", f"its plan {error}", record)
            if size_bytes != record.plan_size_bytes:
                return Miss("damaged", _wrong_size(size_bytes, record), record)
            return CachedEngine(path, record)

    def _load(self, key: EngineKey) -> LoadedEngine | Miss:
        found = self.find(key)
        if isinstance(found, Miss):
            return found
        record = found.record
        try:
            plan = read_private(found.path, record.plan_size_bytes)
        except (FileNotFoundError, UnsafeFileError) as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else str(error)
            return Miss("damaged", f"its plan {reason}", record)
        if len(plan) != record.plan_size_bytes:
            return Miss("damaged", _wrong_size(len(plan), record), record)
        if sha256_of(plan) != record.plan_sha256:
            return Miss("damaged", "its plan was changed: its hash is another", record)
        with suppress(OSError):  # for prune; a cache that is only read stays as it is
            os.utime(self.folder / f"{key_digest(record.key)}.json")
        return LoadedEngine(plan, record, found.path)

    def _plan_path(self, digest: str, record: EngineRecord) -> Path:
        return self.folder / f"{digest}.{record.plan_sha256[:16]}.plan"

    def _write(self, record: EngineRecord, plan: bytes) -> Path:
        """Write an entry whose lock is held; what else bears its name is left from before."""
        digest = key_digest(record.key)
        path = self._plan_path(digest, record)
        document = self.folder / f"{digest}.json"
        for place in (path, document):
            if place.is_symlink():  # or it would be followed
                place.unlink(missing_ok=True)
        write_atomic(path, plan, private=True)
        write_atomic(document, record.model_dump_json().encode(), private=True)
        for other in self.folder.glob(f"*{digest}.*"):
            if other.suffix in (".plan", ".partial") and other != path:
                with suppress(OSError):
                    other.unlink()
        return path

    def _warn_unwritable(self, error: StorageError) -> None:
        warnings.warn(
            f"The engine cache {self.folder} cannot be written, so this engine is kept in memory "
            f"and built again by the next process: {error} Point MMEDGE_CACHE_DIR at a folder that "
            "can be written.",
            RuntimeWarning,
            stacklevel=3,
        )


def _wrong_size(size_bytes: int, record: EngineRecord) -> str:
    return f"its plan has {size_bytes} bytes, expected {record.plan_size_bytes}"


def _covers(built: EngineKey, wanted: EngineKey) -> bool:
    """Tell whether a portable engine serves a key that asks for one GPU."""
    classes = built.request.compute_capabilities
    if built.request.flavour != "tensorrt-rtx" or not classes:
        return False
    if "any" not in classes and wanted.compute_capability not in classes:
        return False
    request = replace(wanted.request, compute_capabilities=classes)
    return built == replace(
        wanted,
        request=request,
        cuda="",
        driver="",
        compute_capability=built.compute_capability,
    )
