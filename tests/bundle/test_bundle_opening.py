"""Opening a bundle and finding things in it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from bundles import VARIANTS, edit_manifest, encode_image, encode_text, golden_vectors

from mmedge.bundle import Bundle, Golden, open_bundle, save_golden
from mmedge.errors import BundleError, InputError, IntegrityError, ManifestError
from mmedge.specs import Precision

MODEL = "image_encoder/fp32.onnx"


def test_a_bundle_opens_from_a_path_or_a_string(tiny_bundle: Bundle) -> None:
    assert open_bundle(str(tiny_bundle.path)) == tiny_bundle == open_bundle(tiny_bundle.path)


def test_a_bundle_opens_from_the_working_directory(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_bundle.path)
    assert open_bundle(".").file(MODEL) == tiny_bundle.file(MODEL)


@pytest.mark.parametrize("name", ["missing.mmedge", "nul\0.mmedge", "n" * 5000])
def test_no_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="Cannot open bundle"):
        open_bundle(tmp_path / name)


def test_a_file_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file.mmedge").write_bytes(b"")
    with pytest.raises(BundleError, match="is a file, not a folder"):
        open_bundle(tmp_path / "file.mmedge")


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"has no manifest\.json"):
        open_bundle(tmp_path)


def test_a_manifest_that_is_a_folder(tiny_bundle: Bundle) -> None:
    (tiny_bundle.path / "manifest.json").unlink()
    (tiny_bundle.path / "manifest.json").mkdir()
    with pytest.raises(ManifestError, match=r"has no manifest\.json"):
        open_bundle(tiny_bundle.path)


def test_a_missing_file_is_named(tiny_bundle: Bundle) -> None:
    tiny_bundle.file(MODEL).unlink()
    with pytest.raises(IntegrityError, match=f"'{MODEL}' is missing"):
        open_bundle(tiny_bundle.path)


def test_a_folder_in_the_place_of_a_file(tiny_bundle: Bundle) -> None:
    tiny_bundle.file(MODEL).unlink()
    (tiny_bundle.path / MODEL).mkdir()
    with pytest.raises(IntegrityError, match="not a regular file"):
        open_bundle(tiny_bundle.path)


def test_a_pipe_in_the_place_of_a_file_does_not_hang(tiny_bundle: Bundle) -> None:
    tiny_bundle.file(MODEL).unlink()
    os.mkfifo(tiny_bundle.path / MODEL)
    with pytest.raises(IntegrityError, match="not a regular file"):
        open_bundle(tiny_bundle.path)


def test_a_truncated_file_is_named_with_both_sizes(tiny_bundle: Bundle) -> None:
    path = tiny_bundle.file(MODEL)
    size_bytes = path.stat().st_size
    os.truncate(path, size_bytes - 1)
    with pytest.raises(
        IntegrityError, match=f"'{MODEL}' has {size_bytes - 1} bytes, expected {size_bytes}"
    ):
        open_bundle(tiny_bundle.path)


def test_a_link_out_of_the_bundle_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    tiny_bundle.file(MODEL).rename(outside)
    (tiny_bundle.path / MODEL).symlink_to(outside)
    with pytest.raises(IntegrityError, match=f"'{MODEL}' is a link that leaves the bundle"):
        open_bundle(tiny_bundle.path)


def test_a_linked_folder_out_of_the_bundle_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tiny_bundle.path / "image_encoder").rename(tmp_path / "outside")
    (tiny_bundle.path / "image_encoder").symlink_to(tmp_path / "outside")
    with pytest.raises(IntegrityError, match="is a link that leaves the bundle"):
        open_bundle(tiny_bundle.path)


def test_a_linked_manifest_out_of_the_bundle_is_refused(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    (tiny_bundle.path / "manifest.json").rename(tmp_path / "outside.json")
    (tiny_bundle.path / "manifest.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(IntegrityError, match="is a link that leaves the bundle"):
        open_bundle(tiny_bundle.path)


def test_a_neighbour_whose_name_only_begins_alike_is_outside(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    neighbour = tmp_path / "tiny.mmedge-neighbour"
    neighbour.write_bytes(b"")
    (tiny_bundle.path / "link").symlink_to(neighbour)
    with pytest.raises(IntegrityError, match="is a link that leaves the bundle"):
        tiny_bundle.file("link")


def test_links_in_a_circle(tiny_bundle: Bundle) -> None:
    tiny_bundle.file(MODEL).unlink()
    (tiny_bundle.path / MODEL).symlink_to("fp32.onnx")
    with pytest.raises(IntegrityError, match=f"'{MODEL}' cannot be read"):
        open_bundle(tiny_bundle.path)


def test_a_link_to_the_bundle_itself_and_links_inside_are_fine(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    tiny_bundle.file(MODEL).rename(tiny_bundle.path / "model.bin")
    (tiny_bundle.path / MODEL).symlink_to("../model.bin")
    (tmp_path / "current").symlink_to("tiny.mmedge")
    opened = open_bundle(tmp_path / "current")
    assert opened.file(MODEL) == (tiny_bundle.path / "model.bin").resolve()


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "", "a/../../b", "nul\0"])
def test_file_hands_out_nothing_from_outside(tiny_bundle: Bundle, path: str) -> None:
    (tiny_bundle.path.parent / "outside").write_bytes(b"")
    with pytest.raises(IntegrityError, match="expected a relative POSIX path"):
        tiny_bundle.file(path)


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (None, "fp32"),
        ("fp32", "fp32"),
        ("int8", "int8-dynamic"),
        ("int8-dynamic", "int8-dynamic"),
        (Precision.INT8, "int8-dynamic"),
    ],
)
def test_a_variant_by_precision_or_name(tiny_bundle: Bundle, asked: str | None, given: str) -> None:
    assert tiny_bundle.variant("image_encoder", asked).name == given


def test_an_exact_name_comes_before_a_precision(tiny_bundle: Bundle) -> None:
    steps = ("roles", "image_encoder", "variants", 1, "name")
    edit_manifest(tiny_bundle.path, *steps, value="int4")
    edit_manifest(tiny_bundle.path, *steps[:3], 0, "precision", value="int4")
    assert open_bundle(tiny_bundle.path).variant("image_encoder", "int4").name == "int4"


@pytest.mark.parametrize("asked", ["int4", "INT8", "", "int8-static"])
def test_an_unknown_variant_names_those_there_are(tiny_bundle: Bundle, asked: str) -> None:
    with pytest.raises(InputError, match=rf"no variant '{asked}', expected .*'fp32', 'int8-dyn"):
        tiny_bundle.variant("text_encoder", asked)


def test_an_unknown_role_names_those_there_are(tiny_bundle: Bundle) -> None:
    with pytest.raises(InputError, match=r"no role 'decoder', expected .*'image_encoder', 'text"):
        tiny_bundle.variant("decoder")


def test_model_path_follows_the_preference(tiny_bundle: Bundle) -> None:
    variant = tiny_bundle.variant("image_encoder")
    both = variant.model_copy(
        update={"models": {"portable": MODEL, "onnxruntime": "text_encoder/fp32.onnx"}}
    )
    assert tiny_bundle.model_path(variant) == tiny_bundle.file(MODEL)
    assert tiny_bundle.model_path(both) == tiny_bundle.file("text_encoder/fp32.onnx")
    assert tiny_bundle.model_path(both, layouts=["portable"]) == tiny_bundle.file(MODEL)
    with pytest.raises(InputError, match="has no model in \\['onnxruntime'\\], only in"):
        tiny_bundle.model_path(variant, layouts=["onnxruntime"])


def test_the_golden_vectors_are_those_that_were_saved(tiny_bundle: Bundle) -> None:
    golden, expected = tiny_bundle.golden(), golden_vectors()
    images = expected.inputs["image_encoder"]["pixel_values"]
    ids = expected.inputs["text_encoder"]["input_ids"]
    np.testing.assert_array_equal(golden.inputs["image_encoder"]["pixel_values"], images)
    for name, (_, step) in VARIANTS.items():
        outputs = {role: golden.outputs[role][name]["embedding"] for role in golden.outputs}
        np.testing.assert_array_equal(outputs["image_encoder"], encode_image(images, step))
        np.testing.assert_array_equal(outputs["text_encoder"], encode_text(ids, step))


def test_golden_vectors_of_another_bundle_are_refused(tiny_bundle: Bundle) -> None:
    golden = golden_vectors()
    outputs = {"image_encoder": golden.outputs["image_encoder"]}
    save_golden(tiny_bundle.file("golden.npz"), Golden(golden.inputs, outputs))
    with pytest.raises(IntegrityError, match=r"golden outputs of text_encoder/fp32: got \[\]"):
        tiny_bundle.golden()


@pytest.mark.parametrize("path", [None, 3, ["a.mmedge"]])
def test_other_types_are_no_path(path: object) -> None:
    with pytest.raises(BundleError, match=f"got {type(path).__name__}, expected a path"):
        open_bundle(path)  # type: ignore[arg-type]


def test_an_unknown_variant_is_an_error_that_lists_the_others(tiny_bundle: Bundle) -> None:
    reported = tiny_bundle.no_variant("fp23", ["image_encoder", "text_encoder"])
    assert "image_encoder: fp32" in reported
    assert "text_encoder: fp32" in reported
    assert "Did you mean fp32?" in reported
