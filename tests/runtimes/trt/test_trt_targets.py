"""What engines can be built for."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest

from mmedge.errors import EngineBuildError
from mmedge.runtimes.trt.flavours import LoadedFlavour
from mmedge.runtimes.trt.targets import check_named, check_needs, resolve

KNOWN = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


def rtx() -> LoadedFlavour:
    module = ModuleType("tensorrt_rtx")
    members = {f"SM{name.replace('.', '')}": name for name in KNOWN} | {"CURRENT": "", "NONE": ""}
    module.ComputeCapability = SimpleNamespace(__members__=members, **members)  # type: ignore[attr-defined]
    return LoadedFlavour("tensorrt-rtx", "1.7.1", module)


def standard() -> LoadedFlavour:
    return LoadedFlavour("tensorrt", "10.3.0", ModuleType("tensorrt"))


def test_what_the_library_knows_is_read_off_it() -> None:
    assert rtx().capabilities == KNOWN
    assert standard().capabilities == ()


@pytest.mark.parametrize(
    ("capability", "machine"), [("8.7", "Jetson Orin"), ("9.0", "H100"), ("11.0", "Jetson Thor")]
)
def test_what_rtx_does_not_build_for_is_sent_where_it_is_built(
    capability: str, machine: str
) -> None:
    with pytest.raises(EngineBuildError, match=machine) as caught:
        check_named(rtx(), ["8.9", capability])
    message = str(caught.value)
    assert "7.5, 8.0, 8.6, 8.9, 12.0, 12.1" in message
    assert "--target tensorrt" in message


@pytest.mark.parametrize("capability", ["5.0", "sm89", "89", ""])
def test_an_unknown_name_is_refused_with_those_that_are_known(capability: str) -> None:
    with pytest.raises(EngineBuildError, match=r"but for 7\.5, 8\.0"):
        check_named(rtx(), [capability])


def test_any_stands_alone() -> None:
    with pytest.raises(EngineBuildError, match="'any' alone"):
        check_named(rtx(), ["any", "8.9"])


def test_tensorrt_builds_for_its_own_machine_alone() -> None:
    check_named(standard(), [])
    with pytest.raises(EngineBuildError, match="GPU of its machine alone"):
        check_named(standard(), ["8.7"])


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["fp32", "int8"], ("8.0", "8.6", "8.9", "12.0", "12.1")),
        (["fp16", "fp8"], ("8.9", "12.0", "12.1")),
        (["fp4"], ("12.0", "12.1")),
    ],
)
def test_any_is_what_can_compute_the_graph(dtypes: list[str], expected: tuple[str, ...]) -> None:
    assert resolve(rtx(), ["any"], dtypes) == expected


def test_names_are_sorted_by_number_and_once_each() -> None:
    assert resolve(rtx(), ["12.0", "8.9", "12.0"], []) == ("8.9", "12.0")
    assert resolve(rtx(), [], []) == ()


@pytest.mark.parametrize(
    ("capability", "dtype", "least"),
    [("8.6", "fp8", "8.9"), ("7.5", "int4", "8.0"), ("7.5", "bf16", "8.0"), ("8.9", "fp4", "12.0")],
)
def test_a_gpu_without_the_kernels_is_refused_before_the_build(
    capability: str, dtype: str, least: str
) -> None:
    with pytest.raises(EngineBuildError, match=f"{dtype} needs compute capability {least}"):
        check_needs(rtx(), ["12.1", capability], ["fp32", dtype])
    check_needs(rtx(), [least], ["fp32", dtype])


def test_turing_has_no_float32_products() -> None:
    with pytest.raises(EngineBuildError, match=r"7\.5: 'matmul' is one.*8\.0, 8\.6"):
        check_needs(rtx(), ["7.5", "8.9"], ["fp32"], "'matmul'")
    check_needs(rtx(), ["7.5"], ["fp16"], None)
    check_needs(rtx(), ["8.9"], ["fp32"], "'matmul'")
