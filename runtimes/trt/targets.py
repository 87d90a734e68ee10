"""Build targets: compute capabilities, and the dtypes they support.

TensorRT builds for the GPU of its machine. TensorRT-RTX builds, without a GPU, for the compute
capabilities of desktop GPUs, not for those of Jetsons and data centres. The requirements of the
dtypes are those of TensorRT-RTX 1.7.1, measured and in its support matrix
(https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix.html).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mmedge.errors import EngineBuildError
from mmedge.runtimes.engines.spec import ANY
from mmedge.runtimes.trt.flavours import LoadedFlavour

__all__ = ["MIN_CAPABILITY", "check_dtypes", "check_targets", "missing_dtype", "resolve_targets"]

MIN_CAPABILITY: dict[str, str] = {"bf16": "8.0", "int4": "8.0", "fp8": "8.9", "fp4": "12.0"}
"""Minimum compute capability of TensorRT-RTX's kernels, for dtypes that some GPUs lack."""

_ANY_FROM = (8, 0)  # as the library: an engine that also runs on 7.5 is slower on the others
_NO_FLOAT32_PRODUCTS = "7.5"
# GPUs that TensorRT-RTX does not build for.
_OTHER_GPUS = {
    "7.2": "Jetson Xavier",
    "8.7": "Jetson Orin",
    "9.0": "H100 and H200",
    "10.0": "B200",
    "10.3": "B300",
    "11.0": "Jetson Thor",
}


def check_targets(loaded: LoadedFlavour, capabilities: Sequence[str]) -> None:
    """Check that a flavour builds for the named compute capabilities.

    Args:
        loaded: The flavour.
        capabilities: As in EngineRequest.

    Raises:
        EngineBuildError: If not; the message names the supported ones.
    """
    known = loaded.capabilities
    if not capabilities:
        return
    if not known:
        raise EngineBuildError(
            f"TensorRT {loaded.version} builds only for the GPU of its machine: got the compute "
            f"capabilities {_shown(capabilities)}. Name none and build on the machine that runs "
            "it, or build for desktop GPUs with tensorrt-rtx."
        )
    if ANY in capabilities and len(capabilities) > 1:
        raise EngineBuildError(
            f"Compute capabilities: got {_shown(capabilities)}, expected '{ANY}' alone or names."
        )
    unknown = [name for name in capabilities if name not in (*known, ANY)]
    if unknown:
        what = "; ".join(f"{n} is {_OTHER_GPUS[n]}" for n in unknown if n in _OTHER_GPUS)
        raise EngineBuildError(
            f"TensorRT-RTX {loaded.version} does not build for compute capability "
            f"{_shown(unknown)}, but for {_shown(known)}, or '{ANY}'. "
            + (
                f"({what}: build there with TensorRT, --target tensorrt.)"
                if what
                else "Name one of these; other GPUs are served by TensorRT, --target tensorrt."
            )
        )


def resolve_targets(
    loaded: LoadedFlavour, capabilities: Sequence[str], dtypes: Collection[str]
) -> tuple[str, ...]:
    """Return the target compute capabilities, ascending.

    Args:
        loaded: The flavour.
        capabilities: As in EngineRequest; "any" means all from 8.0 on that support `dtypes`.
        dtypes: Of the graph: "fp8", "int4", ...

    Returns:
        Empty for the GPU of this machine.

    Raises:
        EngineBuildError: As check_targets.
    """
    check_targets(loaded, capabilities)
    if tuple(capabilities) != (ANY,):
        return tuple(sorted(set(capabilities), key=_number))
    return tuple(
        name
        for name in loaded.capabilities
        if _number(name) >= _ANY_FROM and missing_dtype(name, dtypes) is None
    )


def missing_dtype(capability: str, dtypes: Collection[str]) -> str | None:
    """Return a dtype that a compute capability lacks, None if it has all.

    Args:
        capability: Such as "8.6".
        dtypes: Of the graph.
    """
    number = _number(capability)
    return next((d for d in sorted(dtypes) if number < _number(MIN_CAPABILITY.get(d, "0"))), None)


def check_dtypes(
    loaded: LoadedFlavour,
    capabilities: Sequence[str],
    dtypes: Collection[str],
    float32_product: str | None = None,
) -> None:
    """Check that every compute capability supports a graph's dtypes.

    Args:
        loaded: The flavour.
        capabilities: Resolved; none means the GPU of this machine, which is not checked.
        dtypes: Of the graph.
        float32_product: Name of a float32 matrix product; None if there is none.

    Raises:
        EngineBuildError: If not; the message names those that do.
    """
    for capability in capabilities:
        dtype = missing_dtype(capability, dtypes)
        if dtype is not None:
            supported = [n for n in loaded.capabilities if missing_dtype(n, dtypes) is None]
            raise EngineBuildError(
                f"{dtype} needs compute capability {MIN_CAPABILITY[dtype]} or later, got "
                f"{capability}. "
                f"Build for {_shown(supported) or 'another GPU'}, or choose another variant."
            )
        if capability == _NO_FLOAT32_PRODUCTS and float32_product is not None:
            supported = [name for name in loaded.capabilities if name != capability]
            raise EngineBuildError(
                f"TensorRT-RTX has no float32 matrix products for compute capability {capability}: "
                f"'{float32_product}' is one. Use fp16 there, or build for {_shown(supported)}."
            )


def _number(capability: str) -> tuple[int, int]:
    major, _, minor = capability.partition(".")
    return int(major), int(minor or 0)


def _shown(capabilities: Sequence[str]) -> str:
    return ", ".join(capabilities)
