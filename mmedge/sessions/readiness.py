"""Which variants of a bundle can run on a machine, which need what, and the command that mends it.

Decided from what is known of the machine and from the manifest alone; no graph is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mmedge.bundle.manifest import Variant
from mmedge.bundle.opening import Bundle
from mmedge.errors import MmedgeError
from mmedge.machine.report import Engine, Machine
from mmedge.runtimes.cuda.runtime import FOR_CUDA_12
from mmedge.runtimes.session import SessionOptions, backend
from mmedge.runtimes.trt.targets import takes as lacking_dtype
from mmedge.sessions.opening import graph_of, takes, with_axes
from mmedge.sessions.preparation import why_not
from mmedge.specs import Precision

__all__ = ["State", "Way", "columns", "judge", "runs_here"]

State: TypeAlias = Literal["ready", "build", "needs", "no"]
"""ready: runs now. build: runs once its engine is built, which takes minutes. needs: something has
to be installed. no: not on this machine, or not with this variant."""

IsPrepared: TypeAlias = Callable[[Bundle, Variant, str], bool]

# Compute capabilities that TensorRT-RTX 1.7 names: desktop GPUs, and GB10. Where it is installed it
# tells itself.
_RTX = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_ARM = ("aarch64", "arm64")
_CUDA = "CUDAExecutionProvider"


@dataclass(frozen=True, slots=True)
class Way:
    """One variant in one backend on one device.

    Attributes:
        role: Role name.
        variant: Variant name.
        backend: Name in mmedge.runtimes.BACKENDS.
        device: "cpu" or "cuda".
        state: Whether it runs.
        reason: Why it does not, or not yet; "" if it is ready.
        command: What mends it, "" where nothing to type does.
    """

    role: str
    variant: str
    backend: str
    device: str
    state: State
    reason: str = ""
    command: str = ""


@dataclass(frozen=True, slots=True)
class _Need:
    state: State
    reason: str
    command: str = ""


def columns(machine: Machine) -> tuple[tuple[str, str], ...]:
    """Return the backends and devices that are worth a column on a machine.

    What its hardware can never have is left out: GPU backends without an NVIDIA GPU, TensorRT-RTX
    on a Jetson or a data centre's GPU, OpenVINO on Arm; unless it is installed.
    """
    found = [("onnxruntime", "cpu")]
    if machine.gpus:
        found.append(("onnxruntime", "cuda"))
    if machine.processor.architecture not in _ARM or machine.engine("openvino").usable:
        found.append(("openvino", "cpu"))
    if machine.gpus:
        found.append(("tensorrt", "cuda"))
        known = machine.engine("tensorrt-rtx").offers or _RTX
        if machine.jetson is None and machine.gpus[0].compute_capability in ("", *known):
            found.append(("tensorrt-rtx", "cuda"))
    return tuple(found)


def judge(
    bundle: Bundle, machine: Machine, *, is_prepared: IsPrepared | None = None
) -> tuple[Way, ...]:
    """Say of every variant, in every backend of `columns`, whether it runs on a machine.

    Args:
        bundle: An opened bundle.
        machine: From look_at_machine.
        is_prepared: Tells whether the engine of a variant is in the cache of a backend, by the
            backend's name; None asks the backends of this process.
    """
    asked = is_prepared or _is_prepared
    ways = []
    for role, entry in bundle.manifest.roles.items():
        for variant in entry.variants:
            for name, device in columns(machine):
                need = _need(bundle, variant, machine, name, device, asked)
                ways.append(
                    Way(role, variant.name, name, device, "ready")
                    if need is None
                    else Way(
                        role, variant.name, name, device, need.state, need.reason, need.command
                    )
                )
    return tuple(ways)


def runs_here(ways: tuple[Way, ...]) -> bool:
    """Tell whether every role has a variant that runs, an engine that has to be built included."""
    roles = {way.role for way in ways}
    return roles == {way.role for way in ways if way.state in ("ready", "build")}


def _is_prepared(bundle: Bundle, variant: Variant, name: str) -> bool:
    options = with_axes(bundle, variant, SessionOptions(device="cuda"))
    try:
        return backend(name).is_prepared(graph_of(bundle, variant, name, "cuda"), options)
    except MmedgeError:
        return False


def _need(
    bundle: Bundle,
    variant: Variant,
    machine: Machine,
    name: str,
    device: str,
    is_prepared: IsPrepared,
) -> _Need | None:
    """Return what keeps a variant from running, the most stubborn obstacle first; None for none."""
    need = (
        _of_variant(bundle, variant, name, device)
        or _of_hardware(variant, machine, name)
        or _of_engine(machine, name, device)
    )
    if need is not None:
        return need
    if name.startswith("tensorrt") and not is_prepared(bundle, variant, name):
        target = "rtx" if name == "tensorrt-rtx" else "tensorrt"
        return _Need(
            "build",
            "its engine has to be built first, minutes on a small machine",
            f"mmedge build {bundle.path} --target {target}",
        )
    return None


def _of_variant(bundle: Bundle, variant: Variant, name: str, device: str) -> _Need | None:
    """What the variant lacks, on any machine."""
    convert = (
        f"mmedge convert {bundle.manifest.provenance.source} --target tensorrt -o NAME.mmedge"
        "  # on the workstation"
    )
    if variant.precision is Precision.BF16 and (name, device) == ("onnxruntime", "cpu"):
        return _Need("no", "ONNX Runtime has no bfloat16 kernels for CPUs")
    portable_only = name != "onnxruntime" or device == "cuda"
    if portable_only and "portable" not in variant.models:
        return _Need(
            "no", "its graph is in operators that ONNX Runtime has for CPUs alone", convert
        )
    if not takes(variant, name, device):
        return _Need("no", f"it has no graph in a layout that {name} takes", convert)
    if name.startswith("tensorrt") and why_not(variant) is not None:
        return _Need("no", _first_clause(why_not(variant) or ""), convert)
    return None


def _first_clause(reason: str) -> str:
    """Return a reason without the advice behind its colon, which stands in the command."""
    return reason.partition(": ")[0]


def _of_hardware(variant: Variant, machine: Machine, name: str) -> _Need | None:
    """What the GPU cannot compute."""
    gpu = machine.gpus[0] if machine.gpus else None
    if gpu is None or not gpu.compute_capability:
        return None
    dtype = lacking_dtype(gpu.compute_capability, {variant.precision.value})
    if dtype is not None and name.startswith("tensorrt"):
        return _Need(
            "no", f"{gpu.name} (compute capability {gpu.compute_capability}) has no {dtype}"
        )
    return None


def _of_engine(machine: Machine, name: str, device: str) -> _Need | None:
    """What has to be installed."""
    engine = machine.engine(name)
    if engine.fault:
        return _Need("needs", f"{name} {engine.version} does not start: {engine.fault}")
    if engine.version is None:
        return _missing(machine, engine)
    if (name, device) == ("onnxruntime", "cuda") and _CUDA not in engine.offers:
        return _onnxruntime_without_cuda(machine)
    if name.startswith("tensorrt"):
        return _cuda_bindings(machine)
    return None


def _missing(machine: Machine, engine: Engine) -> _Need:
    cuda, bindings = _cuda_major(machine), _bindings(machine)
    wheels = "" if machine.cuda.bindings else f" {bindings}"
    if engine.name == "tensorrt" and engine.elsewhere:
        return _Need(
            "needs",
            f"TensorRT {engine.elsewhere} is on the system, and this Python does not see it",
            "python3 -m venv --system-site-packages .venv && .venv/bin/pip install "
            f"{'mmedge ' if cuda == 12 else ''}{bindings}  # with the system's python3",
        )
    if engine.name == "tensorrt" and machine.jetson is not None:
        return _Need("needs", "TensorRT is not installed", "sudo apt install nvidia-jetpack")
    if engine.name == "tensorrt":
        return _Need("needs", "TensorRT is not installed", f"pip install tensorrt-cu{cuda}{wheels}")
    if engine.name == "tensorrt-rtx":
        command = 'pip install "mmedge[tensorrt-rtx]"'
        if cuda == 12:
            command = f"pip install tensorrt-rtx-cu12-bindings tensorrt-rtx-cu12-libs{wheels}"
        return _Need("needs", "TensorRT for RTX is not installed", command)
    command = 'pip install "mmedge[cpu]"'
    if engine.name == "onnxruntime" and machine.gpus and machine.jetson is None:
        command = 'pip install "mmedge[gpu]"'
    if engine.name == "openvino":
        return _Need("needs", "OpenVINO is not installed", 'pip install "mmedge[openvino]"')
    return _Need("needs", "ONNX Runtime is not installed", command)


def _onnxruntime_without_cuda(machine: Machine) -> _Need:
    if machine.jetson is not None:
        return _Need(
            "needs",
            "this ONNX Runtime has no CUDA: the wheels for Arm are for CPUs, so take NVIDIA's "
            "onnxruntime-gpu for this JetPack",
        )
    return _Need(
        "needs",
        "this ONNX Runtime has no CUDA",
        'pip uninstall -y onnxruntime && pip install "mmedge[gpu]"',
    )


def _cuda_bindings(machine: Machine) -> _Need | None:
    if machine.cuda.fault:
        return _Need("needs", f"CUDA does not start: {machine.cuda.fault}")
    if machine.cuda.bindings:
        return None
    command = f"pip install {_bindings(machine)}"
    return _Need("needs", "CUDA's Python bindings are not installed", command)


def _bindings(machine: Machine) -> str:
    """Return what brings CUDA's Python bindings for the driver that is there, for a shell."""
    return FOR_CUDA_12 if _cuda_major(machine) == 12 else '"mmedge[cuda]"'


def _cuda_major(machine: Machine) -> int:
    """Return the major version of CUDA that the driver serves; 13 where nothing tells."""
    jetson = machine.jetson
    told = machine.cuda.serves or machine.cuda.toolkit
    if not told and jetson is not None and jetson.jetpack.startswith(("5.", "6.")):
        return 12
    major = told.partition(".")[0]
    return 12 if major.isdecimal() and int(major) < 13 else 13
