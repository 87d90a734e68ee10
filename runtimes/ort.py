"""The ONNX Runtime backend: CPU, and CUDA where the installed build has it.

Works with onnxruntime 1.20 and newer, and with onnxruntime-gpu. From about 1.24 on the engine tells
which provider holds each node; with an older one `Placement.providers` is empty and placement is
checked by the session's providers alone.
"""

from __future__ import annotations

import ctypes
import io
import os
import re
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from mmedge.errors import (
    BackendError,
    BackendUnavailableError,
    InputError,
    PlacementError,
)
from mmedge.files import storage_errors
from mmedge.runtimes.onnx_file import axis_name, check_external_data, read_onnx_file
from mmedge.runtimes.session import Placement, SessionOptions
from mmedge.specs import Array, TensorSpec, check_feed

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["OrtBinding", "OrtSession", "available_devices", "open_session"]

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
}

# What computes shapes. A CUDA session may run these on the CPU, where the engine puts them on
# purpose because shapes live there; any other node on the CPU is a PlacementError.
_SHAPE_OPS = frozenset(
    {
        "Add", "And", "Cast", "CastLike", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div",
        "Equal", "Expand", "Flatten", "Floor", "Gather", "Greater", "GreaterOrEqual", "Identity",
        "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "NonZero", "Not", "Or", "Range",
        "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Shape", "Sign", "Size",
        "Slice", "Split", "Squeeze", "Sub", "Unsqueeze", "Where",
    }
)  # fmt: skip


def available_devices() -> tuple[str, ...]:
    """Return "cuda", "cuda:1", ... for every GPU that the installed build can use, then "cpu".

    Empty if onnxruntime is not installed. Neither raises nor prints.
    """
    try:
        engine = _engine()
    except BackendUnavailableError:
        return ()
    count = _cuda_device_count() if _CUDA in engine.get_available_providers() else 0
    return (*("cuda" if n == 0 else f"cuda:{n}" for n in range(count)), "cpu")


def open_session(model: Path, options: SessionOptions) -> OrtSession:
    """Open an ONNX file in ONNX Runtime.

    Args:
        model: The ONNX file; its external data must lie beside or below it.
        options: How to run it. "auto" graph optimization takes everything, except for a graph that
            holds float16, which stays at "extended": ONNX Runtime 1.32 crashed on some of those at
            the full level.

    Raises:
        BackendUnavailableError: If onnxruntime or the device is missing.
        PlacementError: If nodes would run elsewhere than on the device asked for.
        BackendError: If the file is missing, damaged, or refused by the engine.
        StorageError: If `options.profile_to` cannot be made.
    """
    engine = _engine()
    providers = _providers(engine, options.device)
    glance = read_onnx_file(model)
    check_external_data(model, glance)
    level = options.graph_optimization
    if level == "auto":
        level = "extended" if glance.has_fp16 else "all"
    settings = _settings(engine, options, level)
    try:
        native = engine.InferenceSession(
            str(model), sess_options=settings, providers=providers, enable_fallback=0
        )
    except _engine_exceptions() as error:
        raise _mapped(error, f"{model}: ONNX Runtime {engine.__version__} refuses it") from error
    try:
        placement = _placement(engine, native, options.device, model)
        return OrtSession(native, model, placement)
    except _engine_exceptions() as error:
        raise _mapped(error, f"{model}: ONNX Runtime {engine.__version__} refuses it") from error


class OrtSession:
    """A Session on ONNX Runtime. Made by `open_session`."""

    def __init__(self, native: Any, model: Path, placement: Placement) -> None:  # noqa: ANN401
        self._native: Any = native  # onnxruntime ships no types
        self._model = model
        self._placement = placement
        self._inputs = tuple(_spec(arg, model) for arg in native.get_inputs())
        self._outputs = tuple(_spec(arg, model) for arg in native.get_outputs())
        self._output_names = [spec.name for spec in self._outputs]
        self._lock = threading.Lock()
        self._bindings: weakref.WeakSet[OrtBinding] = weakref.WeakSet()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Input specs, in the graph's order."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Output specs, in the graph's order."""
        return self._outputs

    @property
    def placement(self) -> Placement:
        """What really runs where."""
        return self._placement

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph; see Session.run.

        May be called from several threads at once, also while another closes the session: a call
        that has begun ends with its answer, a later one is a BackendError.
        """
        native = self._opened()
        check_feed(self._inputs, feed)
        ready = {
            name: array
            if array.flags.c_contiguous and array.flags.aligned
            else np.require(array, requirements="CA")
            for name, array in feed.items()
        }
        try:
            answers = native.run(self._output_names, ready)
        except _engine_exceptions() as error:
            raise _mapped(error, f"{self._model}: the run failed") from error
        return dict(zip(self._output_names, answers, strict=True))

    def bind(self, feed: Mapping[str, Array]) -> OrtBinding:
        """Preallocate for the shapes of `feed`; see Session.bind.

        An output axis that the inputs do not name is found by running the graph once.
        """
        native = self._opened()
        sizes = check_feed(self._inputs, feed)
        for name, array in feed.items():
            if not (array.flags.c_contiguous and array.flags.aligned):
                raise InputError(
                    f"Input '{name}': cannot be bound, its memory is not C-contiguous and aligned. "
                    "Pass numpy.ascontiguousarray(array) and write to that."
                )
        outputs: dict[str, Array] = {}
        if all(isinstance(n, int) or n in sizes for spec in self._outputs for n in spec.shape):
            for spec in self._outputs:
                shape = tuple(n if isinstance(n, int) else sizes[n] for n in spec.shape)
                outputs[spec.name] = np.empty(shape, spec.dtype)
        else:
            outputs = {name: np.empty_like(array) for name, array in self.run(feed).items()}
        try:
            binding = OrtBinding(native, self._model, self._placement.device, dict(feed), outputs)
        except _engine_exceptions() as error:
            raise _mapped(error, f"{self._model}: the buffers cannot be bound") from error
        with self._lock:
            if self._native is not None:
                self._bindings.add(binding)
                return binding
        binding._release()
        return binding

    def close(self) -> None:
        """Free the engine's memory, once the runs that have begun are done."""
        with self._lock:
            native, self._native = self._native, None
            bindings = list(self._bindings)
        for binding in bindings:
            binding._release()
        if native is not None and native.get_session_options().enable_profiling:
            native.end_profiling()

    def _opened(self) -> Any:  # noqa: ANN401
        # A local reference keeps the engine alive until this call is done, whoever closes it.
        native = self._native
        if native is None:
            raise _closed(self._model)
        return native

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._native is None else self._placement.device
        return f"<OrtSession {self._model.name} ({state})>"


class OrtBinding:
    """A Binding on ONNX Runtime. Made by `OrtSession.bind`; dead once the session is closed.

    On the CPU the engine reads and writes the arrays themselves. On CUDA each run copies the inputs
    to the device and the outputs back into the same arrays.
    """

    def __init__(
        self,
        native: Any,  # noqa: ANN401
        model: Path,
        device: str,
        inputs: dict[str, Array],
        outputs: dict[str, Array],
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._outputs = outputs
        self._on_host = device == "cpu"
        bound = native.io_binding()
        for name, array in inputs.items():
            bound.bind_cpu_input(name, array)
        for name, array in outputs.items():
            bound.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self._bound: tuple[Any, Any] | None = (native, bound)

    @property
    def inputs(self) -> Mapping[str, Array]:
        """Input buffers by name, to be written in place."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, Array]:
        """Output buffers by name, overwritten by every run."""
        return self._outputs

    def run(self) -> Mapping[str, Array]:
        """Run the graph on the bound buffers and return `outputs`.

        Raises:
            BackendError: If the engine fails, or the session is closed.
        """
        pair = self._bound
        if pair is None:
            raise _closed(self._model)
        native, bound = pair
        try:
            if not self._on_host:
                # The engine copies to the device when an input is bound, not when it runs.
                for name, array in self._inputs.items():
                    bound.bind_cpu_input(name, array)
            native.run_with_iobinding(bound)
        except _engine_exceptions() as error:
            raise _mapped(error, f"{self._model}: the run failed") from error
        return self._outputs

    def _release(self) -> None:
        self._bound = None


@cache
def _engine() -> ModuleType:
    try:
        with warnings.catch_warnings():
            # A GPU build warns on import where its CUDA libraries are missing; a session that asks
            # for CUDA says so with the way out.
            warnings.simplefilter("ignore")
            import onnxruntime
    except ImportError as error:
        raise BackendUnavailableError(
            f"onnxruntime cannot be imported ({error}). Install onnxruntime, or onnxruntime-gpu "
            "for CUDA; one of them, not both."
        ) from error
    return onnxruntime  # type: ignore[no-any-return]


@cache
def _engine_exceptions() -> tuple[type[Exception], ...]:
    """Return every class that the engine raises: its own, and what pybind11 makes of C++ errors."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = {
        found
        for found in vars(state).values()
        if isinstance(found, type) and issubclass(found, Exception)
    }
    return (*own, RuntimeError, ValueError, MemoryError)


# What the engine says -> what it means and what to do; the first that is found holds.
_REASONS = (
    (
        r"failed to allocate memory|bad_alloc|out of memory|cudaErrorMemoryAllocation",
        "out of memory. Use a smaller batch or a smaller variant, or free memory",
    ),
    (
        r"INVALID_PROTOBUF|protobuf parsing failed|No graph was found",
        "the file is cut short, damaged or not ONNX. Copy it again, or `mmedge verify` the bundle",
    ),
    (r"NO_SUCHFILE", "the file is not there"),
    (
        r"external (data|initializer)",
        "its external data is missing, cut short or outside its folder. Copy it beside the model",
    ),
    (
        r"no op registered|not a registered function|NOT_IMPLEMENTED",
        "it holds an operator that this build lacks. Update onnxruntime, or convert again for it",
    ),
    (
        r"opset \d+ is under development|unsupported model ir version|opset version .* supported",
        "it is written for a newer ONNX. Update onnxruntime, or convert again at a lower opset",
    ),
)


def _mapped(error: Exception, what: str) -> BackendError:
    """Return the BackendError that says what an exception of the engine means."""
    text = " ".join(str(error).split()) or "no reason given"
    code = re.match(r"\[ONNXRuntimeError\] : \d+ : (\w+) : ", text)
    said = text[code.end() :] if code else text
    said = re.sub(r"/onnxruntime_src/\S+:\d+ .*?\) (?=[A-Z'\[])", "", said)  # where in its source
    said = said if len(said) <= 400 else f"{said[:400]}..."
    if isinstance(error, MemoryError):
        text = f"bad_alloc {text}"
    for pattern, meaning in _REASONS:
        if re.search(pattern, text, re.IGNORECASE):
            return BackendError(f"{what}: {meaning}. ({type(error).__name__}: {said})")
    return BackendError(f"{what}: {type(error).__name__}: {said}")


def _closed(model: Path) -> BackendError:
    return BackendError(f"{model}: the session is closed. Open another with open_session.")


def _providers(engine: ModuleType, device: str) -> list[tuple[str, dict[str, str]]]:
    """Return the providers for a device, in the engine's words."""
    if device == "cpu":
        return [(_CPU, {})]
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise BackendUnavailableError(
            f"ONNX Runtime has no device '{device}': expected 'cpu', 'cuda' or 'cuda:N'."
        )
    if _CUDA not in engine.get_available_providers():
        raise BackendUnavailableError(
            f"Device '{device}': the installed onnxruntime {engine.__version__} is built without "
            "CUDA. Replace it: pip uninstall onnxruntime, pip install onnxruntime-gpu."
        )
    index = int(match.group(1) or 0)
    if index >= (count := _cuda_device_count()):
        raise BackendUnavailableError(
            f"Device '{device}': the CUDA driver sees {count} GPU(s). Check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES."
        )
    if hasattr(engine, "preload_dlls"):  # 1.21 and newer: finds CUDA in NVIDIA's pip packages
        with redirect_stdout(io.StringIO()):  # it prints what it cannot find; we raise below
            engine.preload_dlls()
    return [(_CUDA, {"device_id": str(index)}), (_CPU, {})]


def _cuda_device_count() -> int:
    """Ask the CUDA driver for the number of GPUs; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int(0)
        if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
            return 0
    except (OSError, AttributeError):
        return 0
    return count.value


def _settings(engine: ModuleType, options: SessionOptions, level: str) -> Any:  # noqa: ANN401
    """Return the engine's SessionOptions."""
    settings = engine.SessionOptions()
    settings.log_severity_level = 4  # fatal: errors come as exceptions, nothing on stderr
    settings.execution_mode = engine.ExecutionMode.ORT_SEQUENTIAL
    settings.intra_op_num_threads = options.threads or _processors()
    settings.inter_op_num_threads = 1
    settings.enable_cpu_mem_arena = options.arena
    settings.enable_mem_pattern = options.arena  # a pattern is a plan of the arena
    settings.graph_optimization_level = {
        "none": engine.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": engine.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": engine.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": engine.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }[level]
    # Denormals are left alone: the engine would flush them in the caller's thread too, and numpy
    # computes there.
    entries = {
        "session.intra_op.allow_spinning": options.spin,
        "session.disable_prepacking": not options.prepack,
        "session.record_ep_graph_assignment_info": True,
    }
    for key, value in entries.items():
        settings.add_session_config_entry(key, "1" if value else "0")
    if options.profile_to is not None:
        with storage_errors(options.profile_to):
            options.profile_to.mkdir(parents=True, exist_ok=True)
        settings.enable_profiling = True
        settings.profile_file_prefix = str(options.profile_to / "onnxruntime")
    return settings


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _placement(engine: ModuleType, native: Any, device: str, model: Path) -> Placement:  # noqa: ANN401
    """Read from the engine what runs where, and refuse what was not asked for."""
    wanted = _CPU if device == "cpu" else _CUDA
    if wanted not in native.get_providers():
        raise BackendUnavailableError(
            f"{model}: ONNX Runtime {engine.__version__} could not start its CUDA provider, most "
            "often because CUDA or cuDNN libraries of the right version are missing. Install "
            "onnxruntime-gpu[cuda,cudnn], or ask for device 'cpu'."
        )
    nodes: list[tuple[str, str, str]] = []
    if hasattr(native, "get_provider_graph_assignment_info"):
        nodes = [
            (part.ep_name, node.name, node.op_type)
            for part in native.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        ]
    return Placement(
        backend="onnxruntime",
        device=device,
        engine=f"onnxruntime {engine.__version__}",
        providers=dict(Counter(provider for provider, _, _ in nodes)),
        exceptions=_exceptions(nodes, wanted, device, model),
    )


def _exceptions(
    nodes: list[tuple[str, str, str]], wanted: str, device: str, model: Path
) -> dict[str, str]:
    """Return the shape arithmetic that runs on the CPU, by node name.

    Args:
        nodes: (provider, node name, operator) of every node.
        wanted: The provider that was asked for.
        device: The device that was asked for.
        model: For the message.

    Raises:
        PlacementError: If a node of another kind is not on `wanted`.
    """
    elsewhere = [node for node in nodes if node[0] != wanted]
    stray = [node for node in elsewhere if node[0] != _CPU or node[2] not in _SHAPE_OPS]
    if stray:
        shown = ", ".join(f"'{name}' ({op}) on {provider}" for provider, name, op in stray[:5])
        raise PlacementError(
            f"{model}: {len(stray)} of {len(nodes)} nodes would not run on '{device}': {shown}"
            f"{', ...' if len(stray) > 5 else ''}. Use a variant whose operators the device has, "
            "or ask for device 'cpu'."
        )
    return {name: "cpu" for _, name, _ in elsewhere}


def _spec(arg: Any, model: Path) -> TensorSpec:  # noqa: ANN401
    """Return the spec of an onnxruntime.NodeArg."""
    if arg.type not in _DTYPES:
        raise BackendError(
            f"{model}: '{arg.name}' is a {arg.type}, which numpy has not. Convert the model with "
            "float32, float16 or integer inputs and outputs."
        )
    shape = tuple(
        size if isinstance(size, int) and size >= 0 else size or axis_name(arg.name, axis)
        for axis, size in enumerate(arg.shape)
    )
    return TensorSpec(arg.name, np.dtype(_DTYPES[arg.type]), shape)
