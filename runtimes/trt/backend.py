"""The two TensorRT backends. Detecting an installation loads almost nothing.

SessionOptions for engines:

- `device`: "cuda" or "cuda:N". The whole engine runs on the GPU.
- `axes`: the engine is built for these sizes of the dynamic axes, which must be given. Loading a
  bundle takes them from its manifest.
- `engine`: see EngineOptions.
- `spin`: off, a waiting caller sleeps instead of polling the GPU.
- `threads`: no effect.
- `arena`, `prepack`, `graph_optimization`, `profile_to`: not supported; only defaults pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmedge.errors import BackendError, BackendUnavailableError, EngineBuildError
from mmedge.runtimes.backends import (
    PORTABLE_TARGET,
    Backend,
    EngineFacts,
    Hardware,
    Obstacle,
    VariantFacts,
)
from mmedge.runtimes.cuda.runtime import (
    FOR_CUDA_12,
    Device,
    bindings_installed,
    device_count,
    device_index,
)
from mmedge.runtimes.engines.spec import ANY, BuildHost, EngineKey
from mmedge.runtimes.session import BuildProgress, SessionOptions
from mmedge.runtimes.trt.flavours import TITLES, Flavour, installed_version, load_flavour
from mmedge.runtimes.trt.targets import check_dtypes, check_targets, missing_dtype, resolve_targets

if TYPE_CHECKING:
    from mmedge.runtimes.engines.files import LoadedEngine
    from mmedge.runtimes.trt.session import TrtSession

__all__ = ["TENSORRT", "TENSORRT_RTX", "TrtBackend"]

# Compute capabilities of TensorRT-RTX 1.7: desktop GPUs, and GB10. An installed one lists its own.
_RTX = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


class TrtBackend(Backend):
    """One flavour of TensorRT: a Backend and EngineBuilder.

    Args:
        flavour: "tensorrt" or "tensorrt-rtx".
        system_packages: See Backend.
    """

    runs_on = "cuda"

    def __init__(self, flavour: Flavour, system_packages: tuple[str, ...] = ()) -> None:
        self.name = flavour
        self.title = TITLES[flavour]
        self.system_packages = system_packages
        self.builder = self

    def engine_version(self) -> str | None:
        """Return the version of the installed TensorRT, without loading it; None if none is."""
        return installed_version(self.name)

    def layouts(self, device: str) -> tuple[str, ...]:
        """Return ("portable",) for a GPU: the other layout has operators of ONNX Runtime."""
        return () if device_index(device) is None else ("portable",)

    def available_devices(self) -> tuple[str, ...]:
        """Return "cuda", "cuda:1", ... for every GPU. Neither raises nor prints."""
        if self.engine_version() is None or not bindings_installed():
            return ()
        try:
            count = device_count()
        except BackendError:
            return ()
        return tuple("cuda" if index == 0 else f"cuda:{index}" for index in range(count))

    def unsupported(self, variant: VariantFacts, device: str) -> Obstacle | None:
        """Return why no machine can build an engine of a variant; None if one can."""
        recipe = variant.recipe
        reason = ""
        if "portable" not in variant.layouts and recipe.get("method") == "DynamicInt8":
            reason = "it computes scales in each call, with ONNX Runtime's operators"
        elif recipe.get("activations") == "uint8":
            reason = "its activations are unsigned; TensorRT needs signed, symmetric ones"
        elif recipe.get("method") == "WeightOnly" and recipe.get("symmetric") is False:
            reason = "its weights have zero points; TensorRT needs symmetric ones"
        elif recipe.get("method") == "WeightOnly" and recipe.get("bits") == 8:
            reason = "TensorRT folds blocked 8-bit weights to float"
        if reason:
            return Obstacle("no", reason, convert_to=PORTABLE_TARGET)
        return super().unsupported(variant, device)

    def devices_on(self, hardware: Hardware, engine: EngineFacts) -> tuple[str, ...]:
        """Return ("cuda",) if there is a GPU; TensorRT-RTX serves desktop GPUs only."""
        if not hardware.gpu:
            return ()
        known = ("", *(engine.offers or _RTX))
        if self is TENSORRT_RTX and (hardware.jetson or hardware.compute_capability not in known):
            return ()
        return ("cuda",)

    def explain(
        self, variant: VariantFacts, device: str, hardware: Hardware, engine: EngineFacts
    ) -> Obstacle | None:
        """Return what keeps a variant from running on a machine; see Backend.explain."""
        capability, precision = hardware.compute_capability, variant.precision.value
        if capability and missing_dtype(capability, {precision}) is not None:
            where = f"{hardware.gpu} (compute capability {capability})"
            lacking = Obstacle("no", f"{where} has no {precision}")
            return self.unsupported(variant, device) or lacking
        return super().explain(variant, device, hardware, engine)

    def unusable(self, hardware: Hardware, engine: EngineFacts) -> Obstacle | None:
        """Return why TensorRT does not start on a machine, None if it does."""
        for_12 = hardware.cuda_major == 12
        bindings = FOR_CUDA_12 if for_12 else '"mmedge[cuda]"'
        if engine.version is None:
            return self._not_installed(hardware, engine, bindings)
        found = super().unusable(hardware, engine)
        if found is None and hardware.cuda_fault:
            return Obstacle("needs", f"CUDA does not start: {hardware.cuda_fault}")
        if found is None and not hardware.cuda_bindings:
            reason = "CUDA's Python bindings are not installed"
            return Obstacle("needs", reason, f"pip install {bindings}")
        return found

    def _not_installed(
        self, hardware: Hardware, engine: EngineFacts, bindings: str
    ) -> Obstacle | None:
        major, reason = hardware.cuda_major, f"{self.title} is not installed"
        wheels = "" if hardware.cuda_bindings else f" {bindings}"
        if engine.elsewhere:
            reason = f"{self.title} {engine.elsewhere} is on the system, not visible to this Python"
            command = (
                "python3 -m venv --system-site-packages .venv && .venv/bin/pip install "
                f"{'mmedge ' if major == 12 else ''}{bindings}  # with the system's python3"
            )
        elif self is TENSORRT_RTX:
            command = 'pip install "mmedge[tensorrt-rtx]"'
            if major == 12:
                command = f"pip install tensorrt-rtx-cu12-bindings tensorrt-rtx-cu12-libs{wheels}"
        elif hardware.jetson:
            command = "sudo apt install nvidia-jetpack"
        else:
            command = f"pip install tensorrt-cu{major}{wheels}"
        return Obstacle("needs", reason, command)

    def probe(self) -> Mapping[str, object]:
        """Load TensorRT and return the compute capabilities that it builds for without a GPU."""
        return {"offers": list(load_flavour(self.name).capabilities)}

    def host(self, targets: Sequence[str] = (), device: int = 0) -> BuildHost:
        """Return the build host; see EngineBuilder.host."""
        from mmedge.runtimes.trt.opening import host_of

        library = load_flavour(self.name)
        check_targets(library, targets)
        if targets:
            return BuildHost(library.version)
        try:
            return host_of(library, Device(device))
        except BackendUnavailableError as error:
            fix = (
                f"Name compute capabilities: {', '.join(library.capabilities)} or {ANY}."
                if library.capabilities
                else "Build on the machine that runs it, or for desktop GPUs with "
                f"{TENSORRT_RTX.name}."
            )
            raise BackendUnavailableError(
                f"Engines are built for the GPU of this machine by default: {error} {fix}"
            ) from error

    def targets(self, named: Sequence[str], precision: str) -> tuple[str, ...]:
        """Return the target compute capabilities; see EngineBuilder.targets."""
        try:
            library = load_flavour(self.name)
        except BackendUnavailableError:
            return tuple(named)  # a remote builder checks them there
        found = resolve_targets(library, named, {precision})
        if tuple(named) == (ANY,) and not found:
            raise EngineBuildError(f"No known GPU computes {precision}.")
        check_dtypes(library, found, {precision})
        return found

    def build(
        self,
        model: Path,
        key: EngineKey,
        *,
        device: int = 0,
        progress: BuildProgress | None = None,
        on_wait: Callable[[str], None] | None = None,
    ) -> LoadedEngine:
        """Return the engine of a key, building it on a cache miss; see EngineBuilder.build."""
        from mmedge.runtimes.trt.opening import find_or_build

        return find_or_build(
            load_flavour(self.name),
            model,
            key,
            device=device,
            progress=progress,
            on_wait=on_wait,
            or_in_memory=False,
        )

    def is_prepared(self, model: Path, options: SessionOptions) -> bool:
        """Return whether the engine of a graph is cached; see Backend.is_prepared."""
        if self.engine_version() is None:
            return False
        from mmedge.runtimes.trt.opening import is_prepared

        return is_prepared(self.name, model, options)

    def prepare(
        self, model: Path, options: SessionOptions, progress: BuildProgress | None = None
    ) -> None:
        """Build the engine of a graph on a cache miss; see Backend.prepare."""
        from mmedge.runtimes.trt.opening import prepare_engine

        prepare_engine(self.name, model, options, progress)

    def open_session(self, model: Path, options: SessionOptions) -> TrtSession:
        """Open an ONNX file: load its engine, building it on a cache miss.

        A build takes minutes; its progress goes to the logger "mmedge.engines".

        Raises:
            EngineMismatchError: If the engine in the cache does not load here.
            EngineBuildError: If there is no engine and it cannot be built.
            InputError: If a dynamic axis has no bounds.
            BackendError, StorageError: See Backend.open_session; also if memory runs out, or other
                users can write the cache's folder.
        """
        from mmedge.runtimes.trt.opening import open_engine

        return open_engine(self.name, model, options)


TENSORRT = TrtBackend("tensorrt", ("libnvinfer11", "libnvinfer10", "libnvinfer8"))
TENSORRT_RTX = TrtBackend("tensorrt-rtx")
