"""What of a bundle runs on a described machine, what it needs, and the fix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bundles import edit_manifest
from machines import BARE, DESKTOP, ORIN, SERVER, THOR, Described

from mmedge.bundle import Bundle, open_bundle
from mmedge.machine.report import look_at_machine
from mmedge.sessions.readiness import RunOption, columns, judge, runs_here

IMAGE = ("roles", "image_encoder", "variants")


def options(
    bundle: Bundle, described: Described, tmp_path: Path, *, prepared: bool = False
) -> tuple[RunOption, ...]:
    machine = look_at_machine(described.host(tmp_path / "root"))
    return judge(bundle, machine, is_prepared=lambda *_: prepared)


def option(
    found: tuple[RunOption, ...], backend: str, device: str, variant: str = "fp32"
) -> RunOption:
    (only,) = [
        each
        for each in found
        if (each.role, each.variant, each.backend, each.device)
        == ("image_encoder", variant, backend, device)
    ]
    return only


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        (BARE, "onnxruntime/cpu openvino/cpu"),
        (ORIN, "onnxruntime/cpu onnxruntime/cuda tensorrt/cuda"),
        (THOR, "onnxruntime/cpu onnxruntime/cuda tensorrt/cuda"),
        (
            DESKTOP,
            "onnxruntime/cpu onnxruntime/cuda openvino/cpu tensorrt/cuda tensorrt-rtx/cuda",
        ),
        (SERVER, "onnxruntime/cpu onnxruntime/cuda openvino/cpu tensorrt/cuda"),
    ],
)
def test_impossible_backends_have_no_column(
    tmp_path: Path, described: Described, expected: str
) -> None:
    found = columns(look_at_machine(described.host(tmp_path)))
    assert " ".join("/".join(pair) for pair in found) == expected


def test_every_variant_has_its_word(tiny_bundle: Bundle, tmp_path: Path) -> None:
    found = options(tiny_bundle, BARE, tmp_path)
    assert [(each.role, each.variant, each.backend, each.state) for each in found] == [
        (role, variant, backend, state)
        for role in ("image_encoder", "text_encoder")
        for variant in ("fp32", "int8-dynamic")
        for backend, state in (("onnxruntime", "ready"), ("openvino", "needs"))
    ]
    assert option(found, "openvino", "cpu").command == 'pip install "mmedge[openvino]"'
    assert runs_here(found)


def test_an_orin_builds_its_engine_first(tiny_bundle: Bundle, tmp_path: Path) -> None:
    found = options(tiny_bundle, ORIN, tmp_path)
    tensorrt = option(found, "tensorrt", "cuda")
    assert tensorrt.state == "build"
    assert tensorrt.command == f"mmedge build {tiny_bundle.path} --target tensorrt"
    cuda = option(found, "onnxruntime", "cuda")
    assert (cuda.state, cuda.command) == ("needs", "")
    assert "onnxruntime-gpu for this JetPack" in cuda.reason
    found = options(tiny_bundle, ORIN, tmp_path, prepared=True)
    assert option(found, "tensorrt", "cuda").state == "ready"


def test_an_environment_on_a_jetson_without_system_packages(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    tensorrt = option(options(tiny_bundle, THOR, tmp_path), "tensorrt", "cuda")
    assert tensorrt.state == "needs"
    assert "10.13.3.9 is on the system, not visible to this Python" in tensorrt.reason
    assert "venv --system-site-packages .venv" in tensorrt.command
    assert '"mmedge[cuda]"' in tensorrt.command


def test_a_jetson_without_tensorrt(tiny_bundle: Bundle, tmp_path: Path) -> None:
    files = {k: v for k, v in THOR.files.items() if "dpkg" not in k}
    found = options(tiny_bundle, replace(THOR, files=files), tmp_path)
    assert option(found, "tensorrt", "cuda").command == "sudo apt install nvidia-jetpack"


def test_a_desktop(tiny_bundle: Bundle, tmp_path: Path) -> None:
    found = options(tiny_bundle, DESKTOP, tmp_path)
    assert option(found, "onnxruntime", "cuda").state == "ready"
    assert option(found, "tensorrt-rtx", "cuda").command.endswith("--target tensorrt-rtx")
    assert option(found, "tensorrt", "cuda").command == "pip install tensorrt-cu13"
    bare = replace(DESKTOP, engines={"onnxruntime": "onnxruntime 1.23.2"})
    rtx = option(options(tiny_bundle, bare, tmp_path), "tensorrt-rtx", "cuda")
    assert rtx.command == 'pip install "mmedge[tensorrt-rtx]"'


def test_a_driver_of_cuda_12_gets_wheels_for_it(tiny_bundle: Bundle, tmp_path: Path) -> None:
    found = options(tiny_bundle, SERVER, tmp_path)
    wheels = 'tensorrt-cu12 "cuda-bindings>=12.9,<13"'
    assert option(found, "tensorrt", "cuda").command == f"pip install {wheels}"
    assert "mmedge[gpu]" in option(found, "onnxruntime", "cuda").command
    engines = {"onnxruntime": "1", "tensorrt": "10.8"}
    found = options(tiny_bundle, replace(SERVER, engines=engines), tmp_path)
    assert option(found, "tensorrt", "cuda").command == 'pip install "cuda-bindings>=12.9,<13"'


def test_cuda_that_does_not_start(tiny_bundle: Bundle, tmp_path: Path) -> None:
    probes = dict(DESKTOP.probes) | {"cuda": {"fault": "the driver is too old"}}
    found = options(tiny_bundle, replace(DESKTOP, probes=probes), tmp_path)
    rtx = option(found, "tensorrt-rtx", "cuda")
    assert (rtx.state, rtx.reason) == ("needs", "CUDA does not start: the driver is too old")


@pytest.mark.parametrize(
    ("precision", "described", "place", "state", "message"),
    [
        ("fp8", ORIN, ("tensorrt", "cuda"), "no", "Orin (compute capability 8.7) has no fp8"),
        ("fp8", THOR, ("tensorrt", "cuda"), "needs", "TensorRT"),
        ("fp8", DESKTOP, ("tensorrt-rtx", "cuda"), "build", "engine"),
        ("bf16", ORIN, ("onnxruntime", "cpu"), "no", "no bfloat16 kernels for CPUs"),
        ("bf16", DESKTOP, ("onnxruntime", "cuda"), "ready", ""),
    ],
)
def test_precisions_that_not_everything_computes(
    tiny_bundle: Bundle,
    tmp_path: Path,
    precision: str,
    described: Described,
    place: tuple[str, str],
    state: str,
    message: str,
) -> None:
    edit_manifest(tiny_bundle.path, *IMAGE, 0, "precision", value=precision)
    found = option(options(open_bundle(tiny_bundle.path), described, tmp_path), *place)
    assert found.state == state
    assert message in found.reason


def test_a_graph_of_onnx_runtime_s_operators(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = tiny_bundle.role("image_encoder").variants[1].models["portable"]
    edit_manifest(tiny_bundle.path, *IMAGE, 1, "models", value={"onnxruntime": path})
    found = options(open_bundle(tiny_bundle.path), DESKTOP, tmp_path)
    assert option(found, "onnxruntime", "cpu", "int8-dynamic").state == "ready"
    for place in (("openvino", "cpu"), ("onnxruntime", "cuda"), ("tensorrt-rtx", "cuda")):
        other = option(found, *place, "int8-dynamic")
        assert other.state == "no"
        assert "mmedge convert tests/bundles.py --target tensorrt" in other.command


def test_a_graph_that_tensorrt_does_not_take(tiny_bundle: Bundle, tmp_path: Path) -> None:
    edit_manifest(tiny_bundle.path, *IMAGE, 1, "recipe", value={"activations": "uint8"})
    found = options(open_bundle(tiny_bundle.path), ORIN, tmp_path)
    tensorrt = option(found, "tensorrt", "cuda", "int8-dynamic")
    assert tensorrt.state == "no"
    assert tensorrt.reason.startswith("its activations are unsigned")
    assert "convert" not in tensorrt.reason
    assert "--target tensorrt" in tensorrt.command


def test_without_any_engine_nothing_runs(tiny_bundle: Bundle, tmp_path: Path) -> None:
    found = options(tiny_bundle, Described(files={}), tmp_path)
    assert not runs_here(found)
    assert option(found, "onnxruntime", "cpu").command == 'pip install "mmedge[cpu]"'


def test_an_engine_that_does_not_start_runs_nothing(tiny_bundle: Bundle, tmp_path: Path) -> None:
    broken = replace(BARE, probes={"onnxruntime": {"fault": "illegal instruction"}})
    found = options(tiny_bundle, broken, tmp_path)
    assert not runs_here(found)
    assert "does not start: illegal instruction" in option(found, "onnxruntime", "cpu").reason


def test_one_role_that_cannot_run_is_too_many(tiny_bundle: Bundle, tmp_path: Path) -> None:
    for index in (0, 1):
        edit_manifest(tiny_bundle.path, *IMAGE, index, "precision", value="bf16")
    bundle = open_bundle(tiny_bundle.path)
    found = options(bundle, BARE, tmp_path)
    assert {each.role for each in found if each.state == "ready"} == {"text_encoder"}
    assert not runs_here(found)


def test_the_cache_of_this_machine_is_read(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Without a GPU the backends report nothing as prepared, and do not raise."""
    machine = look_at_machine(DESKTOP.host(tmp_path / "root"))
    assert option(judge(tiny_bundle, machine), "tensorrt-rtx", "cuda").state == "build"
