"""Hashing a bundle: a single changed byte anywhere is found, and so is a file too many."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from bundles import (
    MODEL,
    image_encoder_onnx,
    replace_model,
    write_tiny_bundle,
)
from onnx import TensorProto

from mmedge.bundle import Bundle, open_bundle, verify_files
from mmedge.errors import IntegrityError, MmedgeError

FILES = [
    "golden.npz",
    "image_encoder/fp32.onnx",
    "image_encoder/int8-dynamic.onnx",
    "text_encoder/fp32.onnx",
    "text_encoder/int8-dynamic.onnx",
    "tokenizer.json",
]


def test_a_fresh_bundle_is_whole(tiny_bundle: Bundle) -> None:
    assert list(tiny_bundle.manifest.files) == FILES
    verify_files(tiny_bundle)


@pytest.mark.parametrize("relative", FILES)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_changed_byte_is_found(tiny_bundle: Bundle, relative: str, where: str) -> None:
    path = tiny_bundle.file(relative)
    data = bytearray(path.read_bytes())
    data[{"first": 0, "middle": len(data) // 2, "last": -1}[where]] ^= 1
    path.write_bytes(data)
    opened = open_bundle(tiny_bundle.path)  # opening looks at sizes only
    expected = tiny_bundle.manifest.files[relative].sha256
    with pytest.raises(IntegrityError, match=f"'{relative}' has sha256 .*expected {expected}"):
        verify_files(opened)


def test_a_file_that_changed_its_size_after_opening(tiny_bundle: Bundle) -> None:
    with tiny_bundle.file("tokenizer.json").open("ab") as file:
        file.write(b" ")
    with pytest.raises(IntegrityError, match=r"'tokenizer\.json' has \d+ bytes, expected"):
        verify_files(tiny_bundle)


def test_a_file_that_vanished_after_opening(tiny_bundle: Bundle) -> None:
    tiny_bundle.file("tokenizer.json").unlink()
    with pytest.raises(IntegrityError, match=r"'tokenizer\.json' is missing"):
        verify_files(tiny_bundle)


@pytest.mark.parametrize("extra", ["extra.bin", "image_encoder/extra.bin", ".hidden", "a/b/c"])
def test_an_unlisted_file_is_found(tiny_bundle: Bundle, extra: str) -> None:
    (tiny_bundle.path / extra).parent.mkdir(parents=True, exist_ok=True)
    (tiny_bundle.path / extra).write_bytes(b"")
    with pytest.raises(IntegrityError, match=f"file '{extra}' is not listed"):
        verify_files(tiny_bundle)


def test_an_unlisted_link_to_a_folder_is_found_and_not_followed(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    (tiny_bundle.path / "everything").symlink_to(tmp_path)  # which holds the bundle itself
    with pytest.raises(IntegrityError, match="file 'everything' is not listed"):
        verify_files(tiny_bundle)


def test_any_single_bit_of_the_manifest_is_refused_or_harmless(tmp_path: Path) -> None:
    """Opening and hashing end in an MmedgeError or succeed; nothing else escapes."""
    bundle = write_tiny_bundle(tmp_path / "tiny.mmedge")
    manifest = bundle.path / "manifest.json"
    data = manifest.read_bytes()
    messages = []
    for position in range(0, len(data), 97):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        manifest.write_bytes(damaged)
        try:
            verify_files(open_bundle(bundle.path))
        except MmedgeError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert all(str(bundle.path) in message for message in messages)


def outside(name: str, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("offset", "0"), ("location", location), ("length", "8")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def with_weights_in(location: str) -> bytes:
    model = onnx.load_from_string(image_encoder_onnx())
    weights = model.graph.initializer[0]
    weights.ClearField("raw_data")
    weights.MergeFrom(outside("weights", location))
    data: bytes = model.SerializeToString()
    return data


def test_weights_among_the_variants_files_are_fine(tiny_bundle: Bundle) -> None:
    (tiny_bundle.path / "image_encoder" / "fp32.data").write_bytes(b"\0" * 48)
    data = "image_encoder/fp32.data"
    verify_files(replace_model(tiny_bundle, with_weights_in("fp32.data"), data))


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "../../outside.bin",
        "../text_encoder/fp32.onnx",
        "missing.data",
        "int8-dynamic.onnx",
        "*/_ORT_MEM_ADDR_/*",
        "",
        "nul\0",
    ],
)
def test_weights_elsewhere_are_refused(tiny_bundle: Bundle, location: str) -> None:
    (tiny_bundle.path.parent / "outside.bin").write_bytes(b"\0" * 48)
    opened = replace_model(tiny_bundle, with_weights_in(location))
    with pytest.raises(IntegrityError, match=f"'{MODEL}' keeps weights in '"):
        verify_files(opened)


def test_weights_by_an_absolute_path_are_refused_even_inside(tiny_bundle: Bundle) -> None:
    data = "image_encoder/fp32.data"
    (tiny_bundle.path / data).write_bytes(b"\0" * 48)
    absolute = str(tiny_bundle.path / data)
    opened = replace_model(tiny_bundle, with_weights_in(absolute), data)
    with pytest.raises(IntegrityError, match="keeps weights in '/"):
        verify_files(opened)


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x3a\x7f", b"\x3b", b"\xff" * 99])
def test_other_objects_are_no_model(tiny_bundle: Bundle, data: bytes) -> None:
    with pytest.raises(IntegrityError, match="not a readable ONNX model"):
        verify_files(replace_model(tiny_bundle, data))
