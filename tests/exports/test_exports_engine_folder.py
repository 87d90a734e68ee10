"""The folder for trtexec and C++: io.json matches its files."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from bundles import edit_manifest
from pydantic import ValidationError

from mmedge.bundle import Bundle, open_bundle
from mmedge.errors import BundleError, IntegrityError, StorageError
from mmedge.exports import IoDocument, export_engine_folder, select
from mmedge.exports.document import VectorFile
from mmedge.exports.engine_folder import SuppliedEngine
from mmedge.exports.schema import io_schema
from mmedge.exports.trtexec import trtexec_lines
from mmedge.files import sha256_file
from mmedge.preprocess import AudioConfig, VectorConfig
from mmedge.preprocess.steps import FitLength, LogMel
from mmedge.runtimes.engines.spec import EngineKey, EngineRequest, ShapeProfile, ShapeRange
from mmedge.specs import Array

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def read(folder: Path, vector: VectorFile) -> Array:
    """A raw file as any program would read it."""
    raw = np.frombuffer((folder / vector.file).read_bytes(), np.dtype(vector.dtype))
    return raw.reshape(vector.shape)


def engine(sha256: str = "0" * 64) -> SuppliedEngine:
    ranges = {"pixel_values": ShapeRange((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))}
    request = EngineRequest("tensorrt-rtx", ("8.9", "12.0"), (ShapeProfile(ranges),))
    key = EngineKey(sha256, request, "1.7.1", "", "", "8.9+12.0")
    return SuppliedEngine(b"a plan", key)


def test_written_files_match_their_description(tiny_bundle: Bundle, out: Path) -> None:
    document = export_engine_folder(tiny_bundle, out, select(tiny_bundle))
    assert IoDocument.model_validate_json((out / "io.json").read_bytes()) == document
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - {"io.json"}
    assert found == set(document.files)
    for relative, entry in document.files.items():
        assert (out / relative).stat().st_size == entry.size_bytes
        assert sha256_file(out / relative) == entry.sha256
    assert [(graph.role, graph.variant) for graph in document.graphs] == [
        ("image_encoder", "fp32"),
        ("text_encoder", "fp32"),
    ]
    assert document.scores == getattr(tiny_bundle.manifest.kind, "contrastive_head", None)
    assert document.scores is not None


def test_labels_of_a_classifier_are_described(vit_bundle: Path, out: Path) -> None:
    bundle = open_bundle(vit_bundle)
    document = export_engine_folder(bundle, out, select(bundle))
    assert document.classes == getattr(bundle.manifest.kind, "class_head", None)
    assert document.classes is not None
    (graph,) = document.graphs
    assert [output.name for output in graph.outputs] == ["embedding", "logits"]
    assert [output.name for output in graph.vectors.outputs] == ["embedding", "logits"]


def test_sounds_and_vectors_are_described_by_their_steps(tiny_bundle: Bundle, out: Path) -> None:
    sounds = AudioConfig(
        input="pixel_values",
        sampling_rate=16_000,
        steps=(
            FitLength(samples=4800, pad="zeros", truncate="first"),
            LogMel(
                fft_size=512,
                hop=160,
                mels=8,
                min_hz=0,
                max_hz=8000,
                scale="htk",
                norm=None,
                log="db",
            ),
        ),
    )
    joints = VectorConfig(input="input_ids", size=2, mean=(0, 0), std=(1, 1))
    manifest = tiny_bundle.manifest.model_copy(
        update={"processors": {"image": sounds, "text": joints}}
    )
    document = export_engine_folder(
        replace(tiny_bundle, manifest=manifest), out, select(tiny_bundle)
    )
    assert document.audio == sounds
    assert document.vectors == (joints,)
    assert (document.image, document.text) == (None, None)


def test_graphs_return_the_raw_vectors(tiny_bundle: Bundle, out: Path) -> None:
    """Read as a C++ program would, run from the exported file alone."""
    chosen = select(tiny_bundle, precisions=["fp32", "int8"])
    for graph in export_engine_folder(tiny_bundle, out, chosen).graphs:
        session = onnxruntime.InferenceSession(
            str(out / graph.onnx), providers=["CPUExecutionProvider"]
        )
        feed = {vector.name: read(out, vector) for vector in graph.vectors.inputs}
        results = session.run([vector.name for vector in graph.vectors.outputs], feed)
        for vector, result in zip(graph.vectors.outputs, results, strict=True):
            expected = read(out, vector)
            assert expected.shape[0] == graph.vectors.samples
            assert np.abs(result - expected).max() <= graph.vectors.tolerance.max_abs_error


def test_external_data_comes_along(bundle_with_data: Bundle, out: Path) -> None:
    (graph,) = export_engine_folder(
        bundle_with_data, out, select(bundle_with_data, roles=["image_encoder"])
    ).graphs
    assert graph.external_data == ("image_encoder/fp32.onnx.data",)
    onnxruntime.InferenceSession(str(out / graph.onnx), providers=["CPUExecutionProvider"])


def test_external_data_of_another_variant_is_refused(bundle_with_data: Bundle, out: Path) -> None:
    steps = ("roles", "image_encoder", "variants", 0)
    path = "image_encoder/fp32.onnx"
    edit_manifest(bundle_with_data.path, *steps, "files", value=[path])
    size = bundle_with_data.manifest.files[path].size_bytes
    edit_manifest(bundle_with_data.path, *steps, "size_bytes", value=size)
    bundle = open_bundle(bundle_with_data.path)
    with pytest.raises(IntegrityError, match=r"keeps weights in 'fp32\.onnx\.data'"):
        export_engine_folder(bundle, out, select(bundle))
    assert not out.exists()


def test_a_changed_file_is_not_exported(tiny_bundle: Bundle, out: Path) -> None:
    path = tiny_bundle.file("text_encoder/fp32.onnx")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"'text_encoder/fp32\.onnx' has sha256"):
        export_engine_folder(tiny_bundle, out, select(tiny_bundle))
    assert list(out.parent.glob("*out*")) == []


def test_axes_and_command_lines(tiny_bundle: Bundle, out: Path) -> None:
    image, text = export_engine_folder(tiny_bundle, out, select(tiny_bundle)).graphs
    assert {name: (a.min, a.opt, a.max) for name, a in text.axes.items()} == {
        "batch": (1, 1, 32),
        "sequence": (1, 6, 6),
    }
    assert shlex.split(image.trtexec.build) == [
        "trtexec",
        "--onnx=image_encoder/fp32.onnx",
        "--saveEngine=image_encoder/fp32.engine",
        "--stronglyTyped",
        "--noTF32",
        "--minShapes=pixel_values:1x3x8x8",
        "--optShapes=pixel_values:1x3x8x8",
        "--maxShapes=pixel_values:8x3x8x8",
        "--memPoolSize=workspace:1024",
    ]
    assert "--maxShapes=input_ids:32x6" in shlex.split(text.trtexec.build)
    assert shlex.split(text.trtexec.build_rtx)[0] == "tensorrt_rtx"
    check = shlex.split(text.trtexec.check)
    assert "--shapes=input_ids:2x4" in check
    (given,) = [part for part in check if part.startswith("--loadInputs=input_ids:")]
    assert (out / given.partition(":")[2]).is_file()


def test_odd_names_stay_one_argument_of_the_command(tiny_bundle: Bundle, out: Path) -> None:
    (graph, *_) = export_engine_folder(tiny_bundle, out, select(tiny_bundle)).graphs
    entry = graph.inputs[0].model_copy(update={"name": "input:0 a"})
    lines = trtexec_lines("a b.onnx", "a b.engine", [entry], graph.axes, graph.vectors)
    words = shlex.split(lines.build)
    assert "--onnx=a b.onnx" in words
    assert "--minShapes='input:0 a':1x3x8x8" in words


def test_a_graph_of_fixed_shapes_needs_no_bounds(tiny_bundle: Bundle, out: Path) -> None:
    (graph, *_) = export_engine_folder(tiny_bundle, out, select(tiny_bundle)).graphs
    entry = graph.inputs[0].model_copy(update={"shape": (1, 3, 8, 8)})
    lines = trtexec_lines("a.onnx", "a.engine", [entry], {}, graph.vectors)
    assert "Shapes" not in lines.build


def test_no_more_golden_samples_than_an_engine_takes(tiny_bundle: Bundle, out: Path) -> None:
    document = export_engine_folder(tiny_bundle, out, select(tiny_bundle))
    for graph in document.graphs:
        for vector in graph.vectors.inputs:
            entry = next(each for each in graph.inputs if each.name == vector.name)
            for size, axis in zip(vector.shape, entry.shape, strict=True):
                assert size <= (graph.axes[axis].max if isinstance(axis, str) else axis)


def test_engines_lie_beside_their_graph(tiny_bundle: Bundle, out: Path) -> None:
    document = export_engine_folder(
        tiny_bundle, out, select(tiny_bundle, roles=["image_encoder"]), engines=lambda _: [engine()]
    )
    (described,) = document.graphs[0].engines
    assert (out / described.file).read_bytes() == b"a plan"
    assert described.file == "image_encoder/fp32.tensorrt-rtx-1.7.1.sm89_120.engine"
    assert described.compute_capability == "8.9+12.0"
    assert described.profiles[0]["pixel_values"].max == (4, 3, 8, 8)


def test_an_axis_that_nothing_bounds_is_an_error(tiny_bundle: Bundle, out: Path) -> None:
    steps = ("roles", "image_encoder", "inputs", 0, "shape")
    edit_manifest(tiny_bundle.path, *steps, value=["batch", 3, "height", 8])
    bundle = open_bundle(tiny_bundle.path)
    with pytest.raises(BundleError, match="no bounds for axis 'height'"):
        export_engine_folder(bundle, out, select(bundle))
    assert not out.exists()


def test_only_an_export_is_replaced_and_only_on_request(tiny_bundle: Bundle, out: Path) -> None:
    chosen = select(tiny_bundle)
    out.mkdir()
    export_engine_folder(tiny_bundle, out, chosen)  # an empty folder is no obstacle
    (out / "left over").touch()
    with pytest.raises(StorageError, match="--overwrite"):
        export_engine_folder(tiny_bundle, out, chosen)
    export_engine_folder(tiny_bundle, out, chosen, overwrite=True)
    assert not (out / "left over").exists()
    (out / "io.json").unlink()
    with pytest.raises(StorageError, match="left alone"):
        export_engine_folder(tiny_bundle, out, chosen, overwrite=True)
    assert (out / "tokenizer.json").exists()


def test_the_document_names_only_files_that_it_lists(tiny_bundle: Bundle, out: Path) -> None:
    document = export_engine_folder(tiny_bundle, out, select(tiny_bundle)).model_dump(mode="json")
    del document["files"]["image_encoder/fp32.onnx"]
    with pytest.raises(ValidationError, match="is not in files"):
        IoDocument.model_validate(document)


def test_the_published_schema_is_the_models() -> None:
    published = (DOCS / "io.schema.json").read_text("utf-8")
    assert published == io_schema(), "run: python -m mmedge.exports.schema > docs/io.schema.json"


def cpp_of_the_docs() -> str:
    """The program that docs/export.md shows."""
    blocks = re.findall(r"```cpp\n(.*?)```", (DOCS / "export.md").read_text("utf-8"), re.DOTALL)
    (program,) = [str(block) for block in blocks if "int main" in block]
    return program


@pytest.fixture(scope="module")
def compare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "compare.cpp").write_text(cpp_of_the_docs(), "utf-8")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]
    command = ["g++", *flags, str(folder / "compare.cpp"), "-o", str(folder / "compare")]
    subprocess.run(command, check=True, timeout=120)
    return folder / "compare"


def test_the_program_of_the_docs_detects_wrong_outputs(
    compare: Path, tiny_bundle: Bundle, out: Path
) -> None:
    (graph, *_) = export_engine_folder(tiny_bundle, out, select(tiny_bundle)).graphs
    (vector,) = graph.vectors.outputs
    tolerance = graph.vectors.tolerance
    limits = [str(tolerance.cosine_min), str(tolerance.max_abs_error)]

    def run_on(result: Array) -> Any:
        (out / "output.bin").write_bytes(result.tobytes())
        width = str(vector.shape[-1])
        command = [str(compare), str(out / vector.file), str(out / "output.bin"), width, *limits]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    expected = read(out, vector)
    assert run_on(expected).returncode == 0
    assert run_on(expected + np.float32(5e-4)).returncode == 0
    off = run_on(expected + np.float32(0.01))
    assert off.returncode == 1
    assert "0.01" in off.stdout
    assert run_on(expected[:, ::-1].copy()).returncode == 1
    assert run_on(np.full_like(expected, np.nan)).returncode == 1
    assert run_on(expected[:1]).returncode == 2


def test_io_json_is_plain_json(tiny_bundle: Bundle, out: Path) -> None:
    export_engine_folder(tiny_bundle, out, select(tiny_bundle))
    document = json.loads((out / "io.json").read_text("utf-8"))
    assert document["graphs"][0]["inputs"][0] == {
        "name": "pixel_values",
        "dtype": "float32",
        "shape": ["batch", 3, 8, 8],
    }
