"""`mmedge build`: the plan, the engines, what is printed, and wrong usage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bundles import edit_manifest

from mmedge.bundle import Bundle
from mmedge.cli import main
from mmedge.errors import EngineBuildError
from mmedge.runtimes.engines.spec import BuildSettings, BuiltEngine, EngineLayer, EngineRequest
from mmedge.runtimes.onnx_file import read_onnx_file
from mmedge.runtimes.trt import opening
from mmedge.runtimes.trt.flavours import installed_version

pytestmark = pytest.mark.skipif(
    installed_version("tensorrt-rtx") is None, reason="TensorRT-RTX is not installed"
)
LAYERS = (
    EngineLayer(
        "gemm_0", "gemm", ("int8",), ("fp16",), "stub", ("int8",), ("a", "b", "c", "d", "e")
    ),
    EngineLayer("fused", "kgen", ("fp16",), ("fp16",)),
    EngineLayer("shape", "shape_call", (), ()),
)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as done:
        main(["build", *arguments])
    captured = capsys.readouterr()
    return done.value.code, captured.out, captured.err


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMEDGE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[EngineRequest]:
    """Requests to a builder that builds at once, and fails on text encoders."""
    asked: list[EngineRequest] = []

    def build(model: Path, request: EngineRequest, **_: Any) -> BuiltEngine:
        asked.append(request)
        if model.parent.name == "text_encoder":
            raise EngineBuildError(f"{model}: the library will not.")
        graph = read_onnx_file(model)
        return BuiltEngine(
            b"plan" * 500, graph.inputs, graph.outputs, LAYERS, 61.5, ("a \x1b[2J b",)
        )

    monkeypatch.setattr(opening, "build_engine", build)
    return asked


def unsigned(bundle: Bundle) -> str:
    """Make image_encoder/int8-dynamic one that no engine is built of; return the bundle's path."""
    steps = ("roles", "image_encoder", "variants", 1, "recipe")
    edit_manifest(bundle.path, *steps, value={"method": "StaticInt8", "activations": "uint8"})
    return str(bundle.path)


ADA = ("--target", "tensorrt-rtx", "--compute-capability", "8.9")


def test_an_engine_is_really_built_and_then_found(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = (*ADA, "--role", "image_encoder", "--precision", "fp32")
    code, out, err = run(capsys, str(tiny_bundle.path), *chosen)
    assert code == 0
    assert err.startswith(
        "image_encoder/fp32, for 8.9 ...\n"
    )  # a line per engine without a terminal
    assert "TensorRT-RTX" in out.splitlines()[0]
    assert "fp32" in out
    assert " built" in out
    assert "backend='tensorrt-rtx'" in out

    code, out, _ = run(capsys, str(tiny_bundle.path), *chosen, "--json")
    assert code == 0
    (engine,) = json.loads(out)["engines"]
    assert engine["state"] == "cached"
    assert Path(engine["engine"]).is_file()
    assert engine["size_bytes"] == Path(engine["engine"]).stat().st_size
    assert engine["compute_capability"] == "8.9"
    assert engine["profiles"] == [{"batch": {"min": 1, "opt": 1, "max": 8}}]
    assert set(engine["precisions"]) == {"fp32"}


def test_progress_shows_the_phases(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    code, _, err = run(capsys, str(tiny_bundle.path), *ADA, "--precision", "fp32")
    assert code == 0
    assert "text_encoder/fp32, for 8.9" in err
    assert "Building engine" in err


def test_a_plan_builds_nothing(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str], requests: list[EngineRequest]
) -> None:
    code, out, err = run(capsys, unsigned(tiny_bundle), *ADA, "--plan")
    assert (code, err) == (0, "")
    assert out.count("to build here") == 3
    assert "batch 1/1/32, sequence 1/6/6" in out
    assert "No engine: image_encoder/int8-dynamic: its activations are unsigned" in out
    assert requests == []


def test_a_plan_without_a_target_has_every_flavour(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, str(tiny_bundle.path), "--plan", "--json", "--precision", "fp32")
    assert code == 0
    plans = {plan["target"]: plan for plan in json.loads(out)}
    assert set(plans) == {"tensorrt", "tensorrt-rtx"}
    for plan in plans.values():
        assert {engine["state"] for engine in plan["engines"]} <= {"elsewhere", "build"}
    assert plans["tensorrt-rtx"]["version"] == installed_version("tensorrt-rtx")


def test_one_that_fails_does_not_keep_the_others_back(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str], requests: list[EngineRequest]
) -> None:
    code, out, err = run(capsys, unsigned(tiny_bundle), *ADA, "--layers")
    assert code == 1
    assert len(requests) == 3
    assert "1 int8, 1 fp16" in out
    assert out.count("FAILED") == 2
    assert "Note: image_encoder/fp32: a \\x1b[2J b" in out
    assert "a, b, c, d, +1" in out
    assert "Error: text_encoder/fp32: " in err
    assert "the library will not." in err


def test_the_json_has_failed_and_refused_engines(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str], requests: list[EngineRequest]
) -> None:
    code, out, _ = run(capsys, unsigned(tiny_bundle), *ADA, "--json", "--layers", "--quiet")
    assert code == 1
    engines = {f"{e['role']}/{e['variant']}": e for e in json.loads(out)["engines"]}
    assert {label: engine["state"] for label, engine in engines.items()} == {
        "image_encoder/fp32": "built",
        "image_encoder/int8-dynamic": "refused",
        "text_encoder/fp32": "failed",
        "text_encoder/int8-dynamic": "failed",
    }
    built = engines["image_encoder/fp32"]
    assert built["duration_s"] == 61.5
    assert [layer["precision"] for layer in built["layers"]] == ["int8", "fp16", ""]
    assert built["layers"][0]["nodes"] == ["a", "b", "c", "d", "e"]
    assert "the library will not" in engines["text_encoder/fp32"]["reason"]
    assert "unsigned" in engines["image_encoder/int8-dynamic"]["reason"]


def test_options_become_the_request(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str], requests: list[EngineRequest]
) -> None:
    options = ["--compute-capability", "8.9,12.0", "--compute-capability", "8.6"]
    options += ["--batch", "1", "--batch", "2,4,16", "--sequence", "3,4,5"]
    options += ["--workspace-mib", "64", "--weight-streaming", "--refittable", "--stripped"]
    run(capsys, str(tiny_bundle.path), "--target", "tensorrt-rtx", *options, "--precision", "fp32")
    image, text = requests
    assert image.compute_capabilities == text.compute_capabilities
    assert set(image.compute_capabilities) == {"8.6", "8.9", "12.0"}
    assert image.settings == BuildSettings(64 << 20, True, True, True)
    assert [profile.ranges["pixel_values"].max[0] for profile in image.profiles] == [1, 16]
    ranges = [profile.ranges["input_ids"] for profile in text.profiles]
    assert [(r.min, r.opt, r.max) for r in ranges] == [
        ((1, 3), (1, 4), (1, 5)),
        ((2, 3), (4, 4), (16, 5)),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "cuda"], "expected tensorrt or tensorrt-rtx"),
        (["--batch", "8,1,1"], "1 <= MIN <= OPT <= MAX"),
        (["--batch", "0"], "1 <= MIN <= OPT <= MAX"),
        (["--batch", "1,2"], "or one number"),
        (["--batch", "-1,1,1"], "MIN,OPT,MAX"),
        (["--sequence", "many"], "MIN,OPT,MAX"),
        (["--batch", "1", "--sequence", "1", "--sequence", "2"], "once per --batch"),
        (["--compute-capability", "8.9,,8.6"], "values separated by commas"),
        (["--workspace-mib", "0"], "workspace-mib"),
    ],
)
def test_wrong_usage(
    options: list[str], message: str, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, str(tiny_bundle.path), *options)
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "tensorrt-rtx", "--compute-capability", "8.7"], "Jetson Orin"),
        (
            ["--target", "tensorrt-rtx", "--compute-capability", "any", "--precision", "fp17"],
            "fp17",
        ),
        (
            ["--target", "tensorrt-rtx", "--compute-capability", "any", "--role", "nose"],
            "no role 'nose'",
        ),
    ],
)
def test_bad_input(
    options: list[str], message: str, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, str(tiny_bundle.path), *options)
    assert (code, out) == (1, "")
    assert message in err


def test_an_unwritable_cache_is_reported_before_the_build(
    tiny_bundle: Bundle,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    requests: list[EngineRequest],
) -> None:
    monkeypatch.setenv("MMEDGE_CACHE_DIR", str(tiny_bundle.path / "manifest.json"))
    code, _, err = run(capsys, str(tiny_bundle.path), *ADA)
    assert code == 1
    assert "manifest.json" in err
    assert requests == []


def test_nothing_to_build_is_an_error_with_a_reason(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    path = unsigned(tiny_bundle)
    code, _, err = run(capsys, path, *ADA, "--role", "image_encoder", "--precision", "int8")
    assert code == 1
    assert "no engine can be built" in err
    assert "--target tensorrt --precision int8" in err
