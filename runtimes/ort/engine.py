"""ONNX Runtime devices, session settings, placement and errors."""

from __future__ import annotations

import ctypes
import io
import re
import warnings
from collections import Counter
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mmedge.errors import BackendError, BackendUnavailableError, PlacementError
from mmedge.files import storage_errors
from mmedge.runtimes.processor import allowed_processors
from mmedge.runtimes.session import Placement, SessionOptions
from mmedge.telemetry import disable_telemetry

__all__ = [
    "CUDA_PROVIDER",
    "cuda_device_count",
    "engine_exceptions",
    "load_engine",
    "mapped",
    "providers_for",
    "read_placement",
    "session_settings",
]

_CPU = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"

# Shape arithmetic. A CUDA session may run these on the CPU, where the engine puts them on
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


@cache
def load_engine() -> ModuleType:
    """Import onnxruntime with telemetry off: see disable_telemetry.

    Raises:
        BackendUnavailableError: If it is not installed or cannot start.
    """
    disable_telemetry()
    try:
        with warnings.catch_warnings():
            # A GPU build warns on import where its CUDA libraries are missing; a session that asks
            # for CUDA says so with the way out.
            warnings.simplefilter("ignore")
            import onnxruntime
    except ImportError as error:
        raise BackendUnavailableError(
            f"onnxruntime cannot be imported ({error}). Install one build of it: pip install "
            '"mmedge[cpu]", or "mmedge[gpu]" for CUDA; on a Jetson, the onnxruntime-gpu of NVIDIA '
            "for its JetPack."
        ) from error
    return onnxruntime  # type: ignore[no-any-return]


@cache
def engine_exceptions() -> tuple[type[Exception], ...]:
    """Return the exception classes of the engine: its own, and pybind11's for C++ errors."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = {
        found
        for found in vars(state).values()
        if isinstance(found, type) and issubclass(found, Exception)
    }
    return (*own, RuntimeError, ValueError, MemoryError)


# Pattern in the engine's message -> cause and fix; the first match counts.
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
        "it has an operator that this build lacks. Update onnxruntime, or convert again for it",
    ),
    (
        r"opset \d+ is under development|unsupported model ir version|opset version .* supported",
        "it is written for a newer ONNX. Update onnxruntime, or convert again at a lower opset",
    ),
)


def mapped(error: Exception, what: str) -> BackendError:
    """Return the BackendError for an exception of the engine."""
    text = " ".join(str(error).split()) or "no reason given"
    code = re.match(r"\[ONNXRuntimeError\] : \d+ : (\w+) : ", text)
    said = text[code.end() :] if code else text
    said = re.sub(r"^Load model from .+? failed:", "", said)
    said = re.sub(r"/onnxruntime_src/\S+:\d+ .*?\) (?=[A-Z'\[])", "", said)  # where in its source
    said = said if len(said) <= 400 else f"{said[:400]}..."
    if isinstance(error, MemoryError):
        text = f"bad_alloc {text}"
    for pattern, meaning in _REASONS:
        if re.search(pattern, text, re.IGNORECASE):
            return BackendError(f"{what}: {meaning}. ({type(error).__name__}: {said})")
    return BackendError(f"{what}: {type(error).__name__}: {said}")


def providers_for(engine: ModuleType, device: str) -> list[tuple[str, dict[str, str]]]:
    """Return the execution providers for a device.

    Raises:
        BackendUnavailableError: If the device is unknown or missing.
    """
    if device == "cpu":
        return [(_CPU, {})]
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise BackendUnavailableError(
            f"ONNX Runtime has no device '{device}': expected 'cpu', 'cuda' or 'cuda:N'."
        )
    count = cuda_device_count()
    if CUDA_PROVIDER not in engine.get_available_providers():
        built = f"the installed onnxruntime {engine.__version__} is built without CUDA"
        if not count:
            raise BackendUnavailableError(
                f"Device '{device}': there is no NVIDIA GPU here, or this process does not see it, "
                f"and {built}. Take device 'cpu', or see `mmedge doctor`."
            )
        raise BackendUnavailableError(
            f"Device '{device}': {built}. Replace it: pip uninstall -y onnxruntime && pip "
            'install "mmedge[gpu]".'
        )
    index = int(match.group(1) or 0)
    if index >= count:
        raise BackendUnavailableError(
            f"Device '{device}': the CUDA driver sees {count} GPU(s). Check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES."
        )
    if hasattr(engine, "preload_dlls"):  # 1.21 and newer: finds CUDA in NVIDIA's pip packages
        with redirect_stdout(io.StringIO()):  # it prints missing libraries; we raise below
            engine.preload_dlls()
    return [(CUDA_PROVIDER, {"device_id": str(index)}), (_CPU, {})]


def cuda_device_count() -> int:
    """Return the number of GPUs that the CUDA driver reports; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int(0)
        if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
            return 0
    except (OSError, AttributeError):
        return 0
    return count.value


def session_settings(
    engine: ModuleType, options: SessionOptions, level: str, *, exact: bool = False
) -> Any:  # noqa: ANN401
    """Return the engine's SessionOptions.

    Args:
        engine: The onnxruntime module.
        options: What the caller wants.
        level: Graph optimization, "auto" resolved.
        exact: Sum int8 products exactly where the fast kernel would saturate.

    Raises:
        StorageError: If `options.profile_to` cannot be made.
    """
    settings = engine.SessionOptions()
    settings.log_severity_level = 4  # fatal: errors come as exceptions, nothing on stderr
    settings.execution_mode = engine.ExecutionMode.ORT_SEQUENTIAL
    settings.intra_op_num_threads = options.threads or len(allowed_processors())
    settings.inter_op_num_threads = 1
    settings.enable_cpu_mem_arena = options.arena
    settings.enable_mem_pattern = options.arena  # a pattern is a plan of the arena
    settings.graph_optimization_level = {
        "none": engine.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": engine.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": engine.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": engine.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }[level]
    # Denormals are kept: the engine would flush them in the caller's thread too, and numpy
    # computes there.
    entries = {
        "session.intra_op.allow_spinning": options.spin,
        "session.disable_prepacking": not options.prepack,
        "session.record_ep_graph_assignment_info": True,
        "session.x64quantprecision": exact,  # up to twice as slow
    }
    for key, value in entries.items():
        settings.add_session_config_entry(key, "1" if value else "0")
    if options.profile_to is not None:
        with storage_errors(options.profile_to):
            options.profile_to.mkdir(parents=True, exist_ok=True)
        settings.enable_profiling = True
        settings.profile_file_prefix = str(options.profile_to / "onnxruntime")
    return settings


def read_placement(engine: ModuleType, native: Any, device: str, model: Path) -> Placement:  # noqa: ANN401
    """Read the placement from the engine, and reject nodes on other devices.

    Raises:
        BackendUnavailableError: If the engine dropped the provider that was requested.
        PlacementError: If a node that is not shape arithmetic would run elsewhere.
    """
    wanted = _CPU if device == "cpu" else CUDA_PROVIDER
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
    """Return the shape arithmetic nodes that run on the CPU, by name.

    Args:
        nodes: (provider, node name, operator) of every node.
        wanted: The provider that was requested.
        device: The device that was requested.
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
