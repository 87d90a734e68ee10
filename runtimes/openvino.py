"""OpenVINO backend for the CPU. Needs OpenVINO 2025.4 or newer: `pip install mmedge[openvino]`.

How it uses SessionOptions:

- `device`: "cpu" alone. OpenVINO's GPU and NPU plug-ins compute float32 graphs in half precision
  and are untested.
- `threads`: INFERENCE_NUM_THREADS, hyper-threads counted; the engine takes no more than there are
  processors. Threads are not pinned, so that several sessions and processes share the processors.
- `spin`: no effect; workers sleep soon after the work ends.
- `arena`, `prepack`, `graph_optimization`, `profile_to`: only the defaults; the engine has no such
  settings.

Float32 stays float32 where the processor has bfloat16, and only what the graph quantizes is
quantized. Float16 graphs are computed in float32. The engine computes 64-bit integers in 32 bits,
so larger input values are refused. Concurrent runs wait for one another inside the engine.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mmedge.errors import BackendError, BackendUnavailableError, InputError, PlacementError
from mmedge.runtimes.backends import Backend, EngineFacts, Hardware, require_defaults
from mmedge.runtimes.base import SessionBase
from mmedge.runtimes.onnx_file import OnnxFile, check_external_data, read_onnx_file
from mmedge.runtimes.processor import allowed_processors
from mmedge.runtimes.session import Placement, SessionOptions
from mmedge.specs import Array, Axis

__all__ = ["BACKEND", "OpenVinoBackend", "OpenVinoSession"]

_ARM = ("aarch64", "arm64")
_ONLY_DEFAULT = ("arena", "prepack", "graph_optimization", "profile_to")
# Older versions overwrite the caller's bound input if a graph passes it through as an output.
_OLDEST = (2025, 4)
_import_lock = threading.Lock()


class OpenVinoSession(SessionBase[Any]):  # an openvino.CompiledModel
    """A Session on OpenVINO. Made by `OpenVinoBackend.open_session`.

    Until the next run, it may keep the arrays of a feed alive. A binding reads and writes the
    arrays themselves.
    """

    def __init__(
        self,
        library: ModuleType,
        compiled: Any,  # noqa: ANN401
        model: Path,
        graph: OnnxFile,
        placement: Placement,
        axes: Mapping[str, Axis] | None = None,
    ) -> None:
        super().__init__(compiled, model, graph.inputs, graph.outputs, placement, axes)
        self._library = library
        self._ports = _ports(compiled, model, graph)
        self._idle: list[Any] = []  # infer requests; each serves one call at a time

    def _run(self, engine: Any, feed: Mapping[str, Array]) -> dict[str, Array]:  # noqa: ANN401
        _check_narrow(feed)
        with self._mapped("the run failed"):
            try:
                request = self._idle.pop()
            except IndexError:
                request = engine.create_infer_request()
            for name, array in feed.items():
                request.set_input_tensor(self._ports[name], _tensor(self._library, array))
            results = request.infer(share_outputs=False)
            outputs = {
                spec.name: results[index].reshape(request.get_output_tensor(index).get_shape())
                for index, spec in enumerate(self._outputs)
            }
        with self._lock:
            if self._engine is not None:
                self._idle.append(request)
        return outputs

    def _bound(
        self,
        engine: Any,  # noqa: ANN401
        inputs: dict[str, Array],
        outputs: dict[str, Array],
    ) -> Callable[[], None]:
        with self._mapped("the buffers cannot be bound"):
            request = engine.create_infer_request()
            for name, array in inputs.items():
                request.set_input_tensor(self._ports[name], _tensor(self._library, array))
            for index, array in enumerate(outputs.values()):
                request.set_output_tensor(index, _tensor(self._library, array))

        def call() -> None:
            _check_narrow(inputs)
            with self._mapped("the run failed"):
                request.infer(share_outputs=True)

        return call

    def _free(self, _: object) -> None:
        self._idle.clear()

    @contextmanager
    def _mapped(self, what: str) -> Iterator[None]:
        try:
            yield
        except _engine_exceptions() as error:
            raise _mapped(error, f"{self._model}: {what}") from error


class OpenVinoBackend(Backend):
    """OpenVINO."""

    name = "openvino"
    title = "OpenVINO"
    install = 'pip install "mmedge[openvino]"'
    parallel_runs = False

    def engine_version(self) -> str | None:
        """Return the version of the installed OpenVINO, without loading it; None if none is."""
        try:
            return version("openvino") if find_spec("openvino") else None
        except (PackageNotFoundError, ValueError):  # no metadata; hidden from imports
            return None

    def available_devices(self) -> tuple[str, ...]:
        """Return ("cpu",), or nothing if openvino is not installed. Neither raises nor prints."""
        try:
            return self._devices()
        except BackendUnavailableError:
            return ()

    def devices_on(self, hardware: Hardware, engine: EngineFacts) -> tuple[str, ...]:
        """Return ("cpu",), on Arm only where it is installed."""
        return () if hardware.architecture in _ARM and not engine.usable else ("cpu",)

    def probe(self) -> Mapping[str, object]:
        """Load OpenVINO and return its devices."""
        return {"offers": list(self._devices())}

    def _devices(self) -> tuple[str, ...]:
        return ("cpu",) if "CPU" in _load_engine().Core().available_devices else ()

    def open_session(self, model: Path, options: SessionOptions) -> OpenVinoSession:
        """Compile an ONNX file with OpenVINO.

        Args:
            model: The ONNX file; its external data must lie beside or below it.
            options: How to run it; see this module for what each comes to.

        Raises:
            BackendUnavailableError: If openvino or the device is missing, or an option is not to be
                had here.
            PlacementError: If the engine would run the graph elsewhere.
            BackendError: If the file is missing, damaged, or refused by the engine.
        """
        engine = _load_engine()
        _check_version(_short_version(engine))
        if options.device != "cpu":
            raise BackendUnavailableError(
                f"The openvino backend has no device '{options.device}': expected 'cpu'."
            )
        require_defaults(self.name, options, _ONLY_DEFAULT)
        graph = read_onnx_file(model)
        check_external_data(model, graph)
        try:
            core = _core()
            compiled = core.compile_model(core.read_model(str(model)), "CPU", _settings(options))
            devices = [str(name) for name in compiled.get_property("EXECUTION_DEVICES")]
        except _engine_exceptions() as error:
            raise _mapped(
                error, f"{model}: OpenVINO {_short_version(engine)} rejects it"
            ) from error
        if devices != ["CPU"]:
            raise PlacementError(f"{model}: OpenVINO would run it on {devices}, expected ['CPU'].")
        placement = Placement("openvino", "cpu", f"openvino {_short_version(engine)}")
        return OpenVinoSession(engine, compiled, model, graph, placement, options.axes)


BACKEND = OpenVinoBackend()


def _load_engine() -> ModuleType:
    """Import openvino with telemetry off.

    Importing openvino sends an event over the network unless its telemetry package is missing, so
    it is hidden meanwhile. Who imports openvino before us has chosen otherwise.

    Raises:
        BackendUnavailableError: If it is not installed or cannot start.
    """
    loaded = sys.modules.get("openvino")
    if loaded is not None and hasattr(loaded, "Core"):
        return loaded
    hidden = "openvino_telemetry"
    with _import_lock:
        hide = hidden not in sys.modules
        if hide:
            sys.modules[hidden] = None  # type: ignore[assignment]
        try:
            return importlib.import_module("openvino")
        except ImportError as error:
            raise BackendUnavailableError(
                f"openvino cannot be imported ({error}). Install mmedge[openvino]."
            ) from error
        finally:
            if hide:
                del sys.modules[hidden]


@cache
def _core() -> Any:  # noqa: ANN401
    """Return the process-wide Core, which holds the plug-ins."""
    return _load_engine().Core()


@cache
def _engine_exceptions() -> tuple[type[Exception], ...]:
    """Return the exception classes of the engine: its own, and pybind11's for C++ errors."""
    places = [importlib.import_module(f"openvino.{name}") for name in ("exceptions", "frontend")]
    own = {
        found
        for place in places
        for found in vars(place).values()
        if isinstance(found, type) and issubclass(found, Exception)
    }
    return (*own, RuntimeError, ValueError, TypeError, MemoryError)


def _settings(options: SessionOptions) -> dict[str, object]:
    """Return the properties of a compiled model."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": options.threads or len(allowed_processors()),
        "ENABLE_HYPER_THREADING": True,  # else at most one thread per core
        "ENABLE_CPU_PINNING": False,
        # Their defaults may compute below the graph's precision.
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "KV_CACHE_PRECISION": "f32",
    }


def _short_version(engine: ModuleType) -> str:
    """Return "2026.4.1" of "2026.4.1-22982-e213a147257-releases/2026/4"."""
    return str(engine.__version__).partition("-")[0]


def _check_version(found: str) -> None:
    """Reject an OpenVINO that is too old.

    Raises:
        BackendUnavailableError: If it is.
    """
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if numbers < _OLDEST:
        raise BackendUnavailableError(
            f"openvino {found} is too old: expected {'.'.join(map(str, _OLDEST))} or newer. "
            "Upgrade it: pip install --upgrade openvino."
        )


def _ports(compiled: Any, model: Path, graph: OnnxFile) -> dict[str, int]:  # noqa: ANN401
    """Return the engine's index of every input, by name.

    Raises:
        BackendError: If inputs or outputs are not those of the file, in name, number or dtype.
    """
    ports = {
        spec.name: index
        for spec in graph.inputs
        for index, port in enumerate(compiled.inputs)
        if spec.name in port.get_names() and port.get_element_type().to_dtype() == spec.dtype
    }
    outputs = [port.get_element_type().to_dtype() for port in compiled.outputs]
    if len(ports) != len(graph.inputs) or outputs != [spec.dtype for spec in graph.outputs]:
        got = f"{list(map(str, compiled.inputs))} to {list(map(str, compiled.outputs))}"
        expected = f"{list(map(str, graph.inputs))} to {list(map(str, graph.outputs))}"
        raise BackendError(
            f"{model}: OpenVINO changed its inputs or outputs: got {got}, expected {expected}. "
            "Use the backend 'onnxruntime'."
        )
    return ports


def _tensor(engine: ModuleType, array: Array) -> Any:  # noqa: ANN401
    """Return a tensor that shares an array's memory; the caller keeps the array alive."""
    if not array.flags.writeable:
        # The engine rejects such an array, although it only reads it.
        memory = (ctypes.c_char * array.nbytes).from_address(array.ctypes.data)
        array = np.frombuffer(memoryview(memory), array.dtype).reshape(array.shape)
    return engine.Tensor(array, shared_memory=True)


def _check_narrow(feed: Mapping[str, Array]) -> None:
    """Reject integers that the engine would silently truncate to 32 bits."""
    limits = np.iinfo(np.int32)
    for name, array in feed.items():
        if array.dtype.kind in "iu" and array.dtype.itemsize > 4:
            low, high = array.min(initial=0), array.max(initial=0)
            if low < limits.min or high > limits.max:
                raise InputError(
                    f"Input '{name}': got values from {low} to {high}, expected 32-bit integers, "
                    "which is what OpenVINO computes in. Use the backend 'onnxruntime'."
                )


# Pattern in the engine's message -> cause and fix; the first match counts.
_REASONS = (
    (
        r"bad_alloc|out of memory|cannot allocate|failed to allocate|MemoryError",
        "out of memory. Use a smaller batch or a smaller variant, or free memory",
    ),
    (
        r"No conversion rule|OpConversionFailure|not support the following ONNX operations",
        "it has an operator that OpenVINO lacks. Use the backend 'onnxruntime'",
    ),
    (
        r"Unable to read the model|model format",
        "the file is cut short, damaged or not ONNX. Copy it again, or `mmedge verify` the bundle",
    ),
)


def _mapped(error: Exception, what: str) -> BackendError:
    """Return the error for an engine's exception, with cause and fix if known."""
    # Lines naming the engine's source files are dropped.
    lines = [line.strip() for line in str(error).splitlines()]
    said = "; ".join(line for line in lines if line and not re.search(r"\.[ch]pp:\d+", line))
    said = said if len(said) <= 400 else f"{said[:400]}..."
    text = f"{type(error).__name__} {error}"
    for pattern, meaning in _REASONS:
        if re.search(pattern, text, re.IGNORECASE):
            return BackendError(f"{what}: {meaning}. ({type(error).__name__}: {said})")
    return BackendError(f"{what}: {type(error).__name__}: {said}")
