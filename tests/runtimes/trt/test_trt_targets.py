"""Build targets: which compute capabilities, and what they compute."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest

from mmedge.errors import EngineBuildError
from mmedge.runtimes.trt.flavours import LoadedFlavour
from mmedge.runtimes.trt.targets import check_dtypes, check_targets, resolve_targets

KNOWN = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
STANDARD = LoadedFlavour("tensorrt", "10.3.0", ModuleType("tensorrt"))
_MODULE = ModuleType("tensorrt_rtx")
_MEMBERS = {f"SM{name.replace('.', '')}": name for name in KNOWN} | {"CURRENT": "", "NONE": ""}
_MODULE.ComputeCapability = SimpleNamespace(__members__=_MEMBERS, **_MEMBERS)  # type: ignore[attr-defined]
RTX = LoadedFlavour("tensorrt-rtx", "1.7.1", _MODULE)


def test_capabilities_are_read_from_the_library() -> None:
    assert (RTX.capabilities, STANDARD.capabilities) == (KNOWN, ())


@pytest.mark.parametrize(
    ("library", "named", "message"),
    [
        (RTX, ["8.9", "8.7"], r"8\.7, but for 7\.5, 8\.0, .*Jetson Orin.*--target tensorrt"),
        (RTX, ["9.0"], "H100.*--target tensorrt"),
        (RTX, ["11.0"], "Jetson Thor.*--target tensorrt"),
        *((RTX, [name], r"but for 7\.5, 8\.0") for name in ("5.0", "sm89", "89", "")),
        (RTX, ["any", "8.9"], "'any' alone"),
        (STANDARD, ["8.7"], "only for the GPU of its machine"),
    ],
)
def test_targets_that_are_not_built_for(
    library: LoadedFlavour, named: list[str], message: str
) -> None:
    check_targets(library, [])
    with pytest.raises(EngineBuildError, match=message):
        check_targets(library, named)


@pytest.mark.parametrize(
    ("named", "dtypes", "expected"),
    [
        (["any"], ["fp32", "int8"], ("8.0", "8.6", "8.9", "12.0", "12.1")),
        (["any"], ["fp16", "fp8"], ("8.9", "12.0", "12.1")),
        (["any"], ["fp4"], ("12.0", "12.1")),
        (["12.0", "8.9", "12.0"], [], ("8.9", "12.0")),
        ([], [], ()),
    ],
)
def test_targets_are_resolved_in_order(
    named: list[str], dtypes: list[str], expected: tuple[str, ...]
) -> None:
    assert resolve_targets(RTX, named, dtypes) == expected


@pytest.mark.parametrize(
    ("capability", "dtype", "minimum"),
    [("8.6", "fp8", "8.9"), ("7.5", "int4", "8.0"), ("7.5", "bf16", "8.0"), ("8.9", "fp4", "12.0")],
)
def test_a_gpu_without_kernels_for_a_dtype(capability: str, dtype: str, minimum: str) -> None:
    with pytest.raises(EngineBuildError, match=f"{dtype} needs compute capability {minimum}"):
        check_dtypes(RTX, ["12.1", capability], ["fp32", dtype])
    check_dtypes(RTX, [minimum], ["fp32", dtype])


def test_compute_capability_7_5_has_no_float32_products() -> None:
    with pytest.raises(EngineBuildError, match=r"7\.5: 'matmul' is one.*8\.0, 8\.6"):
        check_dtypes(RTX, ["7.5", "8.9"], ["fp32"], "matmul")
    check_dtypes(RTX, ["7.5"], ["fp16"], None)
    check_dtypes(RTX, ["8.9"], ["fp32"], "matmul")
