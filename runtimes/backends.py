"""Backend contract and registry."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from mmedge.errors import BackendUnavailableError
from mmedge.runtimes.session import BuildProgress, Session, SessionOptions

if TYPE_CHECKING:
    from mmedge.runtimes.engines.building import EngineBuilder
    from mmedge.specs import Precision

__all__ = [
    "BACKENDS",
    "DEFAULT_BACKEND",
    "PORTABLE_TARGET",
    "Backend",
    "EngineFacts",
    "Hardware",
    "Obstacle",
    "VariantFacts",
    "backend",
    "engine_backends",
    "open_session",
    "probe",
    "require_defaults",
]

# One line per backend, "module:ATTRIBUTE", imported on first use.
BACKENDS: dict[str, str] = {
    "onnxruntime": "mmedge.runtimes.ort.backend:BACKEND",
    "openvino": "mmedge.runtimes.openvino:BACKEND",
    "tensorrt": "mmedge.runtimes.trt.backend:TENSORRT",
    "tensorrt-rtx": "mmedge.runtimes.trt.backend:TENSORRT_RTX",
}

DEFAULT_BACKEND = next(iter(BACKENDS))
"""Computed the golden outputs; keeps its place unless another is faster."""

PORTABLE_TARGET = "tensorrt"
"""The conversion target whose graphs are in standard ONNX operators."""

# Opened by name only, never listed: for tests of code that uses mmedge.
_FOR_TESTS = {"fake": "mmedge.runtimes.fake:BACKEND"}
# Devices with a library of their own, and the function that describes them.
_DEVICE_PROBES = {"cuda": "mmedge.runtimes.cuda.runtime:probe"}


@dataclass(frozen=True, slots=True)
class VariantFacts:
    """Facts about a variant, from the manifest.

    Attributes:
        layouts: Of its graphs.
        precision: Its number format.
        recipe: How it was made: "method", "activations", ...
    """

    layouts: tuple[str, ...]
    precision: Precision
    recipe: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Hardware:
    """Machine facts that decide which backends are available.

    Attributes:
        architecture: As `uname -m` prints it.
        gpu: Name of the first NVIDIA GPU, "" for none.
        compute_capability: Of that GPU, such as "8.9"; "" if unknown.
        jetson: Whether it is a Jetson.
        cuda_major: Major version of CUDA that the driver serves.
        cuda_bindings: Whether CUDA's Python bindings are installed.
        cuda_fault: Why CUDA does not start from Python, "" if it does or was not asked.
    """

    architecture: str = ""
    gpu: str = ""
    compute_capability: str = ""
    jetson: bool = False
    cuda_major: int = 13
    cuda_bindings: bool = False
    cuda_fault: str = ""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """A backend's engine, as installed in this Python.

    Attributes:
        name: Of its backend.
        version: Distribution that is loaded and its version, None if none is installed.
        module: File of the module that is loaded, "" if unknown.
        builds: Its installed distributions; more than one contradict each other.
        offers: Execution providers, devices, or compute capabilities that it builds for.
        fault: Why it does not start, "" if it does or is not installed.
        elsewhere: Version that the system has and this Python does not see, "" for none.
    """

    name: str
    version: str | None
    module: str = ""
    builds: tuple[str, ...] = ()
    offers: tuple[str, ...] = ()
    fault: str = ""
    elsewhere: str = ""

    @property
    def usable(self) -> bool:
        """Whether the engine is installed and starts."""
        return self.version is not None and not self.fault


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Reason why a variant cannot run.

    Attributes:
        state: "needs" if something has to be installed, "no" if it never runs there.
        reason: In words.
        command: Shell command that removes it, "" if there is none.
        convert_to: Conversion target whose variants do run, "" if there is none.
    """

    state: Literal["needs", "no"]
    reason: str
    command: str = ""
    convert_to: str = ""


class Backend(Protocol):
    """Base class of backends, which override what differs.

    The defaults are those of a backend that runs graphs in standard operators on the CPU, and opens
    any of them at once. Loading the engine is left to `probe`, `available_devices` and
    `open_session`.

    Attributes:
        name: In BACKENDS.
        title: For people, such as "ONNX Runtime".
        distributions: Packages that bring the engine, where only one of them may be installed.
        system_packages: Debian packages of the engine, for a Python that does not see it.
        install: Shell command that installs the engine.
        builder: Builds engines ahead; None for a backend that needs none.
        parallel_runs: Whether runs of one session in several threads go on at the same time.
    """

    name: str
    title: str
    distributions: tuple[str, ...] = ()
    system_packages: tuple[str, ...] = ()
    install: str = ""
    builder: EngineBuilder | None = None
    parallel_runs: bool = True

    def engine_version(self) -> str | None:
        """Return the version of the installed engine, without loading it.

        None if it is not installed, or if there is no engine, as behind the fake: such a backend
        is never chosen.
        """
        ...

    def layouts(self, device: str) -> tuple[str, ...]:
        """Return the variant layouts that it runs on a device, preferred first.

        Empty for a kind of device that this backend never has.
        """
        return ("portable",) if device == "cpu" else ()

    def available_devices(self) -> tuple[str, ...]:
        """Return the devices available to this backend here, best first; empty if not installed.

        Must not raise and must not print.
        """
        ...

    def unsupported(self, variant: VariantFacts, device: str) -> Obstacle | None:
        """Return why it runs a variant on no machine's device of that kind, None if it does."""
        if set(self.layouts(device)) & set(variant.layouts):
            return None
        reason = "its graph is not in standard ONNX operators"
        return Obstacle("no", reason, convert_to=PORTABLE_TARGET)

    def devices_on(self, hardware: Hardware, engine: EngineFacts) -> tuple[str, ...]:  # noqa: ARG002
        """Return the kinds of devices that it has, or could have, on a machine."""
        return ("cpu",)

    def explain(
        self, variant: VariantFacts, device: str, hardware: Hardware, engine: EngineFacts
    ) -> Obstacle | None:
        """Return why a variant cannot run on a machine, None if it can.

        The most stubborn obstacle first: the variant, the hardware, the installation. That an
        engine may have to be built first is left out.

        Args:
            variant: What is to run.
            device: One of `devices_on`.
            hardware: Of the machine.
            engine: This backend's engine on it.
        """
        return self.unsupported(variant, device) or self.unusable(hardware, engine)

    def unusable(self, hardware: Hardware, engine: EngineFacts) -> Obstacle | None:  # noqa: ARG002
        """Return why its engine does not start on a machine, None if it does."""
        if engine.fault:
            reason = f"{self.name} {engine.version} does not start: {engine.fault}"
            return Obstacle("needs", reason)
        if engine.version is None:
            return Obstacle("needs", f"{self.title} is not installed", self.install)
        return None

    def probe(self) -> Mapping[str, object]:
        """Load the engine and describe it: `offers`, also `loaded` and `module` where known.

        Called in a process of its own. `offers` and `module`: see EngineFacts; `loaded`: the
        distribution that is loaded and its version.

        Raises:
            BackendError: If it does not start.
        """
        return {"offers": list(self.available_devices())}

    def is_prepared(self, model: Path, options: SessionOptions) -> bool:  # noqa: ARG002
        """Return whether open_session opens a graph in seconds rather than minutes.

        Must not raise; what would not open at all is not prepared.
        """
        return True

    def prepare(
        self,
        model: Path,  # noqa: ARG002
        options: SessionOptions,  # noqa: ARG002
        progress: BuildProgress | None = None,  # noqa: ARG002
    ) -> None:
        """Do slow work ahead of opening a graph, such as building its engine.

        The result is stored in the cache folder, where open_session finds it.

        Args:
            model: The ONNX file.
            options: How it will be run.
            progress: Called with the phase and its steps.

        Raises:
            EngineBuildError: If the engine cannot be built.
            BackendError, StorageError: As for open_session.
        """
        return  # an empty body would be abstract

    def open_session(self, model: Path, options: SessionOptions) -> Session:
        """Open an ONNX file.

        Raises:
            BackendUnavailableError: If the engine or the device is missing, with what to install.
            PlacementError: If the graph would not run where it was asked to.
            BackendError: If the file is missing or damaged, its external data is missing, cut
                short or outside the model's folder, or the engine refuses the graph.
            StorageError: If `options.profile_to` cannot be made.
        """
        ...


def backend(name: str) -> Backend:
    """Return a backend, its module imported.

    Raises:
        BackendUnavailableError: If there is no backend of that name.
    """
    if name not in BACKENDS and name not in _FOR_TESTS:
        raise BackendUnavailableError(
            f"Unknown backend: got '{name}', expected one of {sorted(BACKENDS)}."
        )
    return cast("Backend", _attribute((BACKENDS | _FOR_TESTS)[name]))


def engine_backends() -> tuple[str, ...]:
    """Return the names of the backends that build engines ahead."""
    return tuple(name for name in BACKENDS if backend(name).builder is not None)


def open_session(
    model: Path | str,
    *,
    backend_name: str = DEFAULT_BACKEND,
    options: SessionOptions | None = None,
) -> Session:
    """Open an ONNX file in a backend.

    Args:
        model: The ONNX file; external data is found beside it.
        backend_name: One of BACKENDS.
        options: None for the defaults.

    Raises:
        BackendUnavailableError, PlacementError, BackendError, StorageError: See
            Backend.open_session.
    """
    return backend(backend_name).open_session(Path(model), options or SessionOptions())


def require_defaults(name: str, options: SessionOptions, fields: Sequence[str]) -> None:
    """Check that options unsupported by a backend have their default values.

    Raises:
        BackendUnavailableError: If one is not.
    """
    for each, default in ((each, getattr(SessionOptions(), each)) for each in fields):
        if (got := getattr(options, each)) != default:
            raise BackendUnavailableError(
                f"The {name} backend has no option {each}: got {got!r}, expected {default!r}. "
                f"Omit it, or use the backend '{DEFAULT_BACKEND}'."
            )


def probe(name: str) -> Mapping[str, object]:
    """Load an engine, or a device's library ("cuda"), and describe it.

    Raises:
        BackendError: If it does not start.
    """
    if name in _DEVICE_PROBES:
        return cast("Mapping[str, object]", _attribute(_DEVICE_PROBES[name])())
    return backend(name).probe()


def _attribute(place: str) -> Any:  # noqa: ANN401, whatever the module holds there
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)
