"""A hostile bundle cannot choose what an export writes, nor where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import edit_manifest
from fake_triton import load_repository
from onnx import TensorProto

from mmedge.bundle import Bundle, describe_files, open_bundle
from mmedge.errors import BundleError, IntegrityError
from mmedge.exports import export_engine_folder, export_triton, select
from mmedge.exports.place import ExportFolder, fresh_folder

CODE = b"raise SystemExit('code of the bundle')\n"
VARIANT = ("roles", "image_encoder", "variants", 0)
EXPORTS: dict[str, Callable[[Bundle, Path], object]] = {
    "triton": lambda bundle, out: export_triton(bundle, out, select(bundle)),
    "engine folder": lambda bundle, out: export_engine_folder(bundle, out, select(bundle)),
}
each_export = pytest.mark.parametrize("export", EXPORTS.values(), ids=list(EXPORTS))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


@pytest.fixture
def folder(tiny_bundle: Bundle, tmp_path: Path) -> ExportFolder:
    (tmp_path / "folder").mkdir()
    return ExportFolder(tmp_path / "folder", tiny_bundle)


def described_again(path: Path) -> Bundle:
    """Open a bundle whose files were changed."""
    files = {name: entry.model_dump(mode="json") for name, entry in describe_files(path).items()}
    edit_manifest(path, "files", value=files)
    return open_bundle(path)


def with_tokenizer(bundle: Bundle, name: str, content: bytes) -> Bundle:
    path = bundle.path
    bundle.file("tokenizer.json").unlink()
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(content)
    edit_manifest(path, "processors", "text", "tokenizer_file", value=name)
    return described_again(path)


def with_weights_in(bundle: Bundle, model: str, location: str, lies: str) -> Bundle:
    """The bundle with image_encoder/fp32 at `model`, its weights outside at `location`."""
    path = bundle.path
    document = onnx.load(bundle.file("image_encoder/fp32.onnx"))
    weights = document.graph.initializer[0]
    for place in (path / model, path / lies):
        place.parent.mkdir(parents=True, exist_ok=True)
    (path / lies).write_bytes(weights.raw_data)
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.add(key="location", value=location)
    bundle.file("image_encoder/fp32.onnx").unlink()
    (path / model).write_bytes(document.SerializeToString())
    edit_manifest(path, *VARIANT, "models", value={"portable": model})
    edit_manifest(path, *VARIANT, "files", value=[model, lies])
    total = sum((path / each).stat().st_size for each in (model, lies))
    edit_manifest(path, *VARIANT, "size_bytes", value=total)
    return described_again(path)


@each_export
@pytest.mark.parametrize("name", ["model.py", "config.pbtxt", "io.json", "a/b/TOKENIZER.JSON"])
def test_a_tokenizer_has_a_name_of_ours(
    tiny_bundle: Bundle, out: Path, export: Callable[[Bundle, Path], object], name: str
) -> None:
    content = tiny_bundle.file("tokenizer.json").read_bytes()
    export(with_tokenizer(tiny_bundle, name, content), out)
    held = [path for path in out.rglob("*") if path.is_file() and path.read_bytes() == content]
    assert {path.name for path in held} == {"tokenizer.json"}


@each_export
def test_only_tokenizer_files_are_copied(
    tiny_bundle: Bundle, out: Path, export: Callable[[Bundle, Path], object]
) -> None:
    bundle = with_tokenizer(tiny_bundle, "model.py", CODE)
    with pytest.raises(BundleError, match="not a tokenizer"):
        export(bundle, out)
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_the_exported_preprocessing_is_found(tiny_bundle: Bundle, out: Path) -> None:
    content = tiny_bundle.file("tokenizer.json").read_bytes()
    export_triton(with_tokenizer(tiny_bundle, "model.py", content), out, select(tiny_bundle))
    preprocess = load_repository(out).infer
    text = np.array([[b"red"]], np.object_)
    assert preprocess("text_encoder_preprocessing", text=text)["input_ids"].shape == (1, 6)


@each_export
@pytest.mark.parametrize(
    ("model", "location", "lies"),
    [
        ("a/b/c/d/fp32.onnx", "../../../../stolen.data", "stolen.data"),
        ("a/fp32.onnx", "../stolen.data", "stolen.data"),
        ("a/fp32.onnx", "below/stolen.data", "a/below/stolen.data"),
        ("a/fp32.onnx", "model.py", "a/model.py"),
        ("a/model.onnx", "config.pbtxt", "a/config.pbtxt"),
        ("a/b.onnx", "model.onnx", "a/model.onnx"),
        ("a/b.onnx", "fp32.onnx", "a/fp32.onnx"),
    ],
)
def test_weights_stay_beside_their_model(
    tiny_bundle: Bundle,
    out: Path,
    tmp_path: Path,
    export: Callable[[Bundle, Path], object],
    model: str,
    location: str,
    lies: str,
) -> None:
    bundle = with_weights_in(tiny_bundle, model, location, lies)
    before = {path for path in tmp_path.rglob("*") if path != out.parent}
    with pytest.raises((BundleError, IntegrityError), match=r"keeps weights in"):
        export(bundle, out)
    assert {path for path in tmp_path.rglob("*") if path != out.parent} == before


@each_export
def test_a_bundle_that_verify_refuses_is_not_exported(
    tiny_bundle: Bundle, out: Path, export: Callable[[Bundle, Path], object]
) -> None:
    """A file of no role, which the export does not use: verify runs all the same."""
    (tiny_bundle.path / "unlisted").write_bytes(CODE)
    with pytest.raises(IntegrityError, match="not listed"):
        export(tiny_bundle, out)
    assert not out.exists()


@pytest.mark.parametrize(
    "relative", ["../out", "/etc/out", "a/../../out", "", ".", "a//b", "a\\b", "c:out", "a\0b"]
)
def test_nothing_is_written_outside(folder: ExportFolder, relative: str) -> None:
    before = sorted(folder.path.parent.rglob("*"))
    with pytest.raises(BundleError, match="cannot be exported"):
        folder.write(relative, CODE)
    with pytest.raises(BundleError, match="cannot be exported"):
        folder.copy("tokenizer.json", relative)
    assert sorted(folder.path.parent.rglob("*")) == before


def test_no_file_takes_the_place_of_another(folder: ExportFolder) -> None:
    folder.write("1/model.py", b"ours")
    folder.write("1/model.py", b"ours")  # what two graphs share is written once
    for relative in ("1/model.py", "1/MODEL.py"):
        with pytest.raises(BundleError, match="two different files"):
            folder.copy("tokenizer.json", relative)
    assert [path.name for path in folder.path.rglob("*")] == ["1", "model.py"]
    assert (folder.path / "1/model.py").read_bytes() == b"ours"


def test_a_file_that_changes_while_it_is_copied(tiny_bundle: Bundle, out: Path) -> None:
    with fresh_folder(tiny_bundle, out, "io.json", overwrite=False) as folder:
        tiny_bundle.file("tokenizer.json").write_bytes(CODE)
        with pytest.raises(IntegrityError, match="changed during the copy"):
            folder.copy("tokenizer.json", "tokenizer.json")
