"""Finding, building and opening the engine of a graph."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mmedge.errors import BackendError, BackendUnavailableError, InputError, StorageError
from mmedge.runtimes.backends import require_defaults
from mmedge.runtimes.cuda.runtime import Device, cuda_version, device_index, driver_version
from mmedge.runtimes.engines.compatible import compatible_key
from mmedge.runtimes.engines.model_hash import model_label
from mmedge.runtimes.engines.profiles import shape_profile
from mmedge.runtimes.engines.spec import (
    BuildHost,
    BuildSettings,
    BuiltEngine,
    EngineKey,
    EngineRequest,
)
from mmedge.runtimes.engines.store import CachedEngine, EngineCache, LoadedEngine
from mmedge.runtimes.onnx_file import OnnxFile, check_external_data, read_onnx_file
from mmedge.runtimes.session import BuildProgress, Placement, SessionOptions
from mmedge.runtimes.trt.build import build_engine
from mmedge.runtimes.trt.device_engine import DeviceEngine
from mmedge.runtimes.trt.flavours import TITLES, LoadedFlavour, load_flavour
from mmedge.runtimes.trt.session import TrtSession

__all__ = [
    "NeededEngine",
    "engine_request",
    "find_or_build",
    "host_of",
    "is_prepared",
    "needed_engine",
    "open_engine",
    "prepare_engine",
]

_LOG = logging.getLogger("mmedge.engines")
_ONLY_DEFAULT = ("arena", "prepack", "graph_optimization", "profile_to")
_LOG_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class NeededEngine:
    """The engine that a graph needs on this machine, built or not.

    Attributes:
        library: The TensorRT that runs it.
        device: Its device.
        model: The ONNX file.
        graph: Contents of the ONNX file.
        request: For building it.
        key: Its key in the cache.
    """

    library: LoadedFlavour
    device: Device
    model: Path
    graph: OnnxFile
    request: EngineRequest
    key: EngineKey


def engine_request(flavour: str, graph: OnnxFile, options: SessionOptions) -> EngineRequest:
    """Return the engine request of a graph for this machine's GPU.

    Args:
        flavour: "tensorrt" or "tensorrt-rtx".
        graph: Contents of the ONNX file.
        options: Their `axes` bound its dynamic axes.

    Raises:
        InputError: If a dynamic axis has no bounds.
    """
    streams = options.engine.weight_streaming_bytes is not None
    return EngineRequest(
        flavour,
        profiles=(shape_profile(graph.inputs, options.axes or {}),),
        settings=BuildSettings(weight_streaming=streams),
    )


def needed_engine(flavour: str, model: Path, options: SessionOptions) -> NeededEngine:
    """Return the engine that a graph needs on this machine.

    Raises:
        BackendUnavailableError: If TensorRT, CUDA's bindings, the driver or the GPU is missing, or
            an option is not supported.
        BackendError: If the model is missing or damaged, or its external data is.
        InputError: If a dynamic axis has no bounds.
    """
    index = device_index(options.device)
    if index is None:
        raise BackendUnavailableError(
            f"The {flavour} backend has no device '{options.device}': engines run on GPUs, "
            "expected 'cuda' or 'cuda:N'."
        )
    require_defaults(flavour, options, _ONLY_DEFAULT)
    library = load_flavour(flavour)
    device = Device(index)
    graph = read_onnx_file(model)
    check_external_data(model, graph)
    request = engine_request(flavour, graph, options)
    key = EngineCache().key_for(model, request, host_of(library, device))
    return NeededEngine(library, device, model, graph, request, key)


def host_of(library: LoadedFlavour, device: Device) -> BuildHost:
    """Return the build host for a GPU of this machine.

    Raises:
        BackendUnavailableError: If CUDA's bindings, the driver or the GPU is missing.
    """
    capability = device.properties.compute_capability
    return BuildHost(library.version, cuda_version(), driver_version(), capability)


def is_prepared(flavour: str, model: Path, options: SessionOptions) -> bool:
    """Return whether the engine of a graph is cached. Does not raise."""
    try:
        cache = EngineCache()
        key = compatible_key(cache, needed_engine(flavour, model, options).key)
        return isinstance(cache.find(key), CachedEngine)
    except (BackendError, InputError, StorageError) as error:
        _LOG.debug("%s: no engine: %s", model, str(error))
        return False


def prepare_engine(
    flavour: str, model: Path, options: SessionOptions, progress: BuildProgress | None
) -> None:
    """Build the engine of a graph on a cache miss; see TrtBackend.prepare."""
    _engine_of(needed_engine(flavour, model, options), progress, or_in_memory=False)


def open_engine(flavour: str, model: Path, options: SessionOptions) -> TrtSession:
    """Load the engine of a graph, building it on a cache miss; see TrtBackend.open_session."""
    needed = needed_engine(flavour, model, options)
    found = _engine_of(needed, None)
    device = needed.device
    with device.current():
        engine = DeviceEngine(
            needed.library,
            found.plan,
            device,
            model=model,
            graph=needed.graph,
            options=options.engine,
            stripped=found.record.key.request.settings.stripped,
            runtime_cache=_runtime_cache(needed, found),
        )
    layers = Counter(layer.precision for layer in found.record.layers)
    placement = Placement(
        backend=flavour,
        device=options.device,
        engine=f"{flavour} {needed.library.version}",
        providers={name: layers[name] for name in sorted(layers) if name},
    )
    return TrtSession(engine, options, placement)


def _engine_of(
    needed: NeededEngine, progress: BuildProgress | None, *, or_in_memory: bool = True
) -> LoadedEngine:
    """Return an engine from the cache, building it on a miss."""
    key = needed.key
    with suppress(StorageError):  # get_or_build warns if the cache is unusable
        key = compatible_key(EngineCache(), key)
    return find_or_build(
        needed.library,
        needed.model,
        key,
        device=needed.device.index,
        progress=_BuildLog(needed, progress),
        on_wait=_as_phase(progress),
        or_in_memory=or_in_memory,
    )


def find_or_build(
    library: LoadedFlavour,
    model: Path,
    key: EngineKey,
    *,
    device: int,
    progress: BuildProgress | None = None,
    on_wait: Callable[[str], None] | None = None,
    or_in_memory: bool = True,
) -> LoadedEngine:
    """Return the engine of a key from the cache, building it on a miss.

    See EngineBuilder.build; with `or_in_memory`, an unwritable cache is no error.
    """
    cache = EngineCache()

    def build() -> BuiltEngine:
        timing = None
        if library.has_timing_cache:
            timing = cache.timing_cache(library.flavour, library.version, key.compute_capability)
        return build_engine(
            model, key.request, progress=progress, timing_cache=timing, device=device
        )

    return cache.get_or_build(
        key,
        build,
        label=model_label(model),
        or_in_memory=or_in_memory,
        on_wait=on_wait or _as_phase(progress),
    )


def _as_phase(progress: BuildProgress | None) -> Callable[[str], None]:
    """Return a callback that reports a message as a build phase."""

    def report(message: str) -> None:
        if progress is not None:
            progress(message, 0, 1)

    return report


def _runtime_cache(needed: NeededEngine, found: LoadedEngine) -> Path | None:
    """Return TensorRT-RTX's runtime cache of one engine for one GPU and driver."""
    flavour = needed.library.flavour
    if flavour != "tensorrt-rtx":
        return None
    gpu = needed.device.properties
    parts = (gpu.name, gpu.compute_capability, driver_version(), found.record.plan_sha256[:16])
    return EngineCache().runtime_cache(flavour, needed.library.version, "-".join(parts))


class _BuildLog:
    """Reports build progress to the log and to a callback."""

    def __init__(self, needed: NeededEngine, also: BuildProgress | None) -> None:
        self._what = f"{needed.model}: building for {TITLES[needed.library.flavour]}"
        self._also = also
        self._phase = ""
        self._logged_s = -_LOG_EVERY_S

    def __call__(self, phase: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if phase != self._phase or now_s - self._logged_s >= _LOG_EVERY_S:
            self._phase, self._logged_s = phase, now_s
            _LOG.info("%s: %s, %d of %d", self._what, phase, done, total)
        if self._also is not None:
            self._also(phase, done, total)
