"""`mmedge export` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bundles import edit_manifest

from mmedge.bundle import Bundle, open_bundle
from mmedge.cli import main
from mmedge.exports import IoDocument
from mmedge.runtimes.engines.model_hash import model_sha256
from mmedge.runtimes.engines.spec import (
    BuildSettings,
    BuiltEngine,
    EngineKey,
    EngineRequest,
    ShapeProfile,
    ShapeRange,
)
from mmedge.runtimes.engines.store import EngineCache
from mmedge.specs import TensorSpec


def export(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as done:
        main(["export", *map(str, arguments)])
    captured = capsys.readouterr()
    return done.value.code, captured.out, captured.err


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCache:
    """An empty engine cache of this test's own."""
    monkeypatch.setenv("MMEDGE_CACHE_DIR", str(tmp_path / "cache"))
    return EngineCache()


def cached(
    cache: EngineCache,
    bundle: Bundle,
    role: str,
    *,
    backend: str = "tensorrt",
    usual: int = 1,
    settings: BuildSettings | None = None,
    plan: bytes = b"a plan",
) -> EngineKey:
    """Put an engine of a role's fp32 variant into the cache."""
    name, shape = ("pixel_values", (3, 8, 8)) if role == "image_encoder" else ("input_ids", (6,))
    sizes = [(count, *shape) for count in (1, usual, 8)]
    profile = ShapeProfile({name: ShapeRange(sizes[0], sizes[1], sizes[2])})
    request = EngineRequest(backend, (), (profile,), settings or BuildSettings())
    sha256 = model_sha256(bundle.file(f"{role}/fp32.onnx"))
    key = EngineKey(sha256, request, "10.3.0", "12.6", "540.4", "8.7")
    spec = TensorSpec("x", np.dtype(np.float32), (1,))
    cache.store(key, BuiltEngine(plan, (spec,), (spec,), (), 1.0))
    return key


def test_a_folder_for_cpp(
    tiny_bundle: Bundle, tmp_path: Path, cache: EngineCache, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, printed, errors = export(capsys, tiny_bundle.path, "--engine-dir", out)
    assert (code, errors) == (0, "")
    document = IoDocument.model_validate_json((out / "io.json").read_bytes())
    for graph in document.graphs:
        assert graph.trtexec.build in printed.replace("  trtexec", "trtexec").splitlines()
    assert f"{len(document.files) + 1} files" in printed


def test_engines_of_the_cache_come_along(
    tiny_bundle: Bundle, tmp_path: Path, cache: EngineCache, capsys: pytest.CaptureFixture[str]
) -> None:
    cached(cache, tiny_bundle, "image_encoder")
    out = tmp_path / "out"
    code, printed, _ = export(capsys, tiny_bundle.path, "--engine-dir", out)
    assert code == 0
    assert " fp32.tensorrt-10.3.0.sm87.engine " in printed
    image, text = IoDocument.model_validate_json((out / "io.json").read_bytes()).graphs
    assert (out / image.engines[0].file).read_bytes() == b"a plan"
    assert text.engines == ()
    export(capsys, tiny_bundle.path, "--engine-dir", out, "--no-engines", "--overwrite")
    assert list(out.rglob("*.engine")) == []


def test_omissions_are_reported(
    tiny_bundle: Bundle, tmp_path: Path, cache: EngineCache, capsys: pytest.CaptureFixture[str]
) -> None:
    cached(cache, tiny_bundle, "image_encoder", plan=b"first")
    cached(cache, tiny_bundle, "image_encoder", usual=4, plan=b"second")
    cached(cache, tiny_bundle, "text_encoder", settings=BuildSettings(stripped=True))
    out = tmp_path / "out"
    code, printed, _ = export(capsys, tiny_bundle.path, "--engine-dir", out, "--json")
    document = json.loads(printed)
    assert code == 0
    assert len(document["graphs"][0]["engines"]) == 1
    several, stripped = document["notes"]
    assert "several fit, the most recently used is exported" in several
    assert "it has no weights" in stripped


def test_a_damaged_engine_is_left_out_with_a_warning(
    tiny_bundle: Bundle, tmp_path: Path, cache: EngineCache, capsys: pytest.CaptureFixture[str]
) -> None:
    cached(cache, tiny_bundle, "image_encoder")
    (plan,) = cache.folder.glob("*.plan")
    plan.write_bytes(b"b plan")
    out = tmp_path / "out"
    _, printed, _ = export(capsys, tiny_bundle.path, "--engine-dir", out, "--json")
    document = json.loads(printed)
    assert document["graphs"][0]["engines"] == []
    assert "is damaged and not loaded" in document["notes"][0]


def test_a_triton_repository(
    tiny_bundle: Bundle, tmp_path: Path, cache: EngineCache, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "repository"
    code, printed, errors = export(capsys, tiny_bundle.path, "--triton", out)
    assert (code, errors) == (0, "")
    assert f"tritonserver --model-repository={out}" in printed.splitlines()
    assert "pip install mmedge" in printed
    assert (out / "encode_image/config.pbtxt").is_file()
    code, printed, _ = export(
        capsys, tiny_bundle.path, "--triton", out, "--role", "text_encoder", "--overwrite", "--json"
    )
    assert [model["name"] for model in json.loads(printed)["models"]] == [
        "text_encoder",
        "text_encoder_preprocessing",
        "encode_text",
    ]


def test_triton_with_engines(
    tiny_bundle: Bundle, tmp_path: Path, cache: EngineCache, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "repository"
    arguments = (tiny_bundle.path, "--triton", out, "--engines")
    cached(cache, tiny_bundle, "image_encoder", backend="tensorrt-rtx")
    code, _, errors = export(capsys, *arguments)
    assert code == 1
    assert "image_encoder/fp32: no engine of TensorRT in the cache" in errors
    assert "mmedge build" in errors
    assert not out.exists()
    cached(cache, tiny_bundle, "image_encoder")
    cached(cache, tiny_bundle, "text_encoder")
    code, printed, _ = export(capsys, *arguments)
    assert code == 0
    assert (out / "text_encoder/1/model.plan").read_bytes() == b"a plan"
    assert "TensorRT 10.3.0 on GPUs of compute capability 8.7 alone" in printed


def test_the_cpu_takes_the_graph_made_for_it(
    tiny_bundle: Bundle, tmp_path: Path, cache: EngineCache, capsys: pytest.CaptureFixture[str]
) -> None:
    """int8-dynamic has no portable graph; Triton's ONNX Runtime takes the other one."""
    for role in ("image_encoder", "text_encoder"):
        path = open_bundle(tiny_bundle.path).role(role).variants[1].models["portable"]
        steps = ("roles", role, "variants", 1, "models")
        edit_manifest(tiny_bundle.path, *steps, value={"onnxruntime": path})
    out = tmp_path / "repository"
    for device in ("cpu", "gpu"):
        arguments = ("--triton", out, "--precision", "int8", "--device", device, "--overwrite")
        assert export(capsys, tiny_bundle.path, *arguments)[0] == 0
    arguments = ("--engine-dir", tmp_path / "out", "--precision", "int8")
    code, _, errors = export(capsys, tiny_bundle.path, *arguments)
    assert code == 1
    assert "'int8' has no graph in the layout portable" in errors


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--engine-dir", "a", "--triton", "b"),
        ("--triton", "b", "--device", "tpu"),
        ("--engine-dir", "a", "--device", "cpu"),
        ("--engine-dir", "a", "--role", "image_encoder,"),
        ("--engine-dir", "a", "--target", "tensorrt-rtx"),
        ("--engine-dir", "a", "--build", "--no-engines"),
        ("--engine-dir", "a", "--build", "--target", "tpu"),
        ("--triton", "b", "--build", "--target", "tensorrt-rtx"),
    ],
)
def test_wrong_usage(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    code, out, errors = export(capsys, tiny_bundle.path, *arguments)
    assert (code, out) == (2, "")
    assert "Usage: mmedge export" in errors


def test_an_older_export_is_kept_by_default(
    tiny_bundle: Bundle, tmp_path: Path, cache: EngineCache, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert export(capsys, tiny_bundle.path, "--engine-dir", out, "--quiet") == (0, "", "")
    code, _, errors = export(capsys, tiny_bundle.path, "--engine-dir", out)
    assert code == 1
    assert "--overwrite" in errors
    other = tmp_path / "photos"
    other.mkdir()
    (other / "a.jpg").touch()
    code, _, errors = export(capsys, tiny_bundle.path, "--triton", other, "--overwrite")
    assert code == 1
    assert "left alone" in errors
    assert (other / "a.jpg").exists()


@pytest.mark.filterwarnings("always:.*is rebuilt:RuntimeWarning")
def test_engines_are_built_where_they_are_missing(
    tiny_bundle: Bundle, tmp_path: Path, cache: EngineCache, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real build: TensorRT-RTX needs no GPU for it."""
    pytest.importorskip("tensorrt_rtx_bindings")
    out = tmp_path / "out"
    build = ("--build", "--target", "tensorrt-rtx")
    arguments = ("--engine-dir", out, "--role", "text_encoder", *build)
    named = ("--compute-capability", "8.9,12.0", "--json")
    code, printed, errors = export(capsys, tiny_bundle.path, *arguments, *named)
    assert code == 0, errors
    assert "text_encoder/fp32, for 8.9 12.0 ..." in errors
    (graph,) = json.loads(printed)["graphs"]
    (engine,) = graph["engines"]
    assert set(engine["compute_capability"].split("+")) == {"8.9", "12.0"}
    assert engine["profiles"][0]["input_ids"]["max"] == [32, 6]
    assert (out / engine["file"]).stat().st_size > 1000
    (plan,) = cache.folder.glob("*.plan")
    built = plan.read_bytes()
    again = (*arguments, *named, "--overwrite", "--quiet")
    assert export(capsys, tiny_bundle.path, *again)[::2] == (0, "")
    assert list(cache.folder.glob("*.plan")) == [plan]
    plan.write_bytes(b"damaged")
    code, _, errors = export(capsys, tiny_bundle.path, *again)
    assert code == 0
    assert "Warning: " in errors
    assert "is rebuilt" in errors
    assert (out / engine["file"]).read_bytes() == built  # the same, it builds so


def test_variants_without_an_engine_are_skipped_with_a_warning(
    tiny_bundle: Bundle, tmp_path: Path, cache: EngineCache, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ("roles", "image_encoder", "variants", 0, "recipe")
    edit_manifest(tiny_bundle.path, *steps, value={"activations": "uint8"})
    out = tmp_path / "out"
    _, printed, _ = export(capsys, tiny_bundle.path, "--engine-dir", out, "--json")
    document = json.loads(printed)
    assert [graph["variant"] for graph in document["graphs"]] == ["int8-dynamic", "fp32"]
    assert "in place of the default fp32" in document["notes"][0]
    assert "activations are unsigned" in document["notes"][0]
    arguments = ("--engine-dir", out, "--precision", "fp32", "--json", "--overwrite")
    _, printed, _ = export(capsys, tiny_bundle.path, *arguments)
    assert "builds no engine of it" in json.loads(printed)["notes"][0]
