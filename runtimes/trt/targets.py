"""Build targets: compute capabilities, and the dtypes they compute.

TensorRT builds for the GPU of its machine. TensorRT-RTX builds, without a GPU, for the compute
capabilities that it knows; it knows desktop GPUs, not Jetsons and not those of data centres. What
a dtype needs was found by building with TensorRT-RTX 1.7.1 and stands in its support matrix
(https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix.html).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mmedge.errors import EngineBuildError
from mmedge.runtimes.engines.spec import ANY
from mmedge.runtimes.trt.flavours import LoadedFlavour

__all__ = ["LEAST", "check_named", "check_needs", "resolve", "takes"]

LEAST: dict[str, str] = {"bf16": "8.0", "int4": "8.0", "fp8": "8.9", "fp4": "12.0"}
"""Minimum compute capability of TensorRT-RTX's kernels, for dtypes that some GPUs lack."""

_ANY_FROM = (8, 0)  # as the library itself does: an engine for 7.5 as well is slower on the others
_NO_FLOAT32_PRODUCTS = "7.5"
# For messages: GPUs whose compute capability TensorRT-RTX lacks.
_ELSEWHERE = {
    "7.2": "Jetson Xavier",
    "8.7": "Jetson Orin",
    "9.0": "H100 and H200",
    "10.0": "B200",
    "10.3": "B300",
    "11.0": "Jetson Thor",
}


def check_named(loaded: LoadedFlavour, capabilities: Sequence[str]) -> None:
    """Check that a flavour builds for the named compute capabilities.

    Args:
        loaded: The flavour.
        capabilities: As in EngineRequest.

    Raises:
        EngineBuildError: If not, with those that it builds for.
    """
    known = loaded.capabilities
    if not capabilities:
        return
    if not known:
        raise EngineBuildError(
            f"TensorRT {loaded.version} builds for the GPU of its machine alone: got the compute "
            f"capabilities {_shown(capabilities)}. Name none and build on the machine that runs "
            "it, or build for desktop GPUs with tensorrt-rtx."
        )
    if ANY in capabilities and len(capabilities) > 1:
        raise EngineBuildError(
            f"Compute capabilities: got {_shown(capabilities)}, expected '{ANY}' alone or names."
        )
    unknown = [name for name in capabilities if name not in (*known, ANY)]
    if unknown:
        what = "; ".join(f"{n} is {_ELSEWHERE[n]}" for n in unknown if n in _ELSEWHERE)
        raise EngineBuildError(
            f"TensorRT-RTX {loaded.version} does not build for compute capability "
            f"{_shown(unknown)}, but for {_shown(known)}, or '{ANY}'. "
            + (
                f"({what}: build there with TensorRT, --target tensorrt.)"
                if what
                else "Name one of these; other GPUs are served by TensorRT, --target tensorrt."
            )
        )


def resolve(
    loaded: LoadedFlavour, capabilities: Sequence[str], dtypes: Collection[str]
) -> tuple[str, ...]:
    """Return the target compute capabilities, ascending.

    Args:
        loaded: The flavour.
        capabilities: As in EngineRequest; "any" stands for all from 8.0 on that can compute every
            one of `dtypes`.
        dtypes: Of the graph: "fp8", "int4", ...; those that every GPU has are not looked at.

    Returns:
        Empty for the GPU of this machine.

    Raises:
        EngineBuildError: As check_named.
    """
    check_named(loaded, capabilities)
    if tuple(capabilities) != (ANY,):
        return tuple(sorted(set(capabilities), key=_number))
    return tuple(
        name
        for name in loaded.capabilities
        if _number(name) >= _ANY_FROM and takes(name, dtypes) is None
    )


def takes(capability: str, dtypes: Collection[str]) -> str | None:
    """Return a dtype that a compute capability lacks, None if it has all.

    Args:
        capability: Such as "8.6".
        dtypes: Of the graph.
    """
    lacking = (d for d in sorted(dtypes) if d in LEAST and _number(capability) < _number(LEAST[d]))
    return next(lacking, None)


def check_needs(
    loaded: LoadedFlavour,
    capabilities: Sequence[str],
    dtypes: Collection[str],
    float32_product: str | None = None,
) -> None:
    """Check that every compute capability supports a graph's dtypes.

    Args:
        loaded: The flavour.
        capabilities: Resolved; none for the GPU of this machine, which is not judged here.
        dtypes: Of the graph.
        float32_product: A matrix product of float32, for the message; None if there is none.

    Raises:
        EngineBuildError: If not, with those that can.
    """
    for capability in capabilities:
        dtype = takes(capability, dtypes)
        if dtype is not None:
            able = [name for name in loaded.capabilities if takes(name, dtypes) is None]
            raise EngineBuildError(
                f"{dtype} needs compute capability {LEAST[dtype]} or later: got {capability}. "
                f"Build for {_shown(able) or 'another GPU'}, or take another variant."
            )
        if capability == _NO_FLOAT32_PRODUCTS and float32_product is not None:
            able = [name for name in loaded.capabilities if name != capability]
            raise EngineBuildError(
                f"TensorRT-RTX has no float32 matrix products for compute capability {capability}: "
                f"{float32_product} is one. Take fp16 there, or build for {_shown(able)}."
            )


def _number(capability: str) -> tuple[int, int]:
    major, _, minor = capability.partition(".")
    return int(major), int(minor)


def _shown(capabilities: Sequence[str]) -> str:
    return ", ".join(capabilities)
