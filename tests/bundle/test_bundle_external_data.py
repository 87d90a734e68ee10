"""The files that a model reads besides itself belong to its variant, or the bundle is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import edit_manifest, image_encoder_onnx, text_encoder_onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from mmedge.bundle import Bundle, describe_files, open_bundle, verify_files
from mmedge.bundle.external_data import external_locations
from mmedge.errors import IntegrityError

MODEL = "image_encoder/fp32.onnx"
VARIANT = ("roles", "image_encoder", "variants", 0)


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


def replace_model(bundle: Bundle, data: bytes, *others: str) -> Bundle:
    """Put another model into a bundle, with a manifest that agrees."""
    (bundle.path / MODEL).write_bytes(data)
    files = describe_files(bundle.path)
    documents = {path: entry.model_dump() for path, entry in files.items()}
    edit_manifest(bundle.path, "files", value=documents)
    paths = [MODEL, *others]
    edit_manifest(bundle.path, *VARIANT, "files", value=paths)
    size_bytes = sum(files[path].size_bytes for path in paths)
    edit_manifest(bundle.path, *VARIANT, "size_bytes", value=size_bytes)
    return open_bundle(bundle.path)


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


def test_tensors_are_found_wherever_onnx_allows_them(tmp_path: Path) -> None:
    def constant(name: str) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value=outside(name, f"{name}.bin"))

    def graph(name: str) -> onnx.GraphProto:
        initializers = [outside(f"{name}_weight", f"{name}.bin")]
        return helper.make_graph([constant(f"{name}_constant")], name, [], [], initializers)

    top = graph("top")
    nested = helper.make_node("If", ["c"], ["y"], then_branch=graph("then"))
    top.node.append(helper.make_node("If", ["c"], ["y"], then_branch=graph("then_"), else_branch=(
        helper.make_graph([nested], "else", [], []))))  # fmt: skip
    lists = top.node.add(op_type="Custom")
    several = lists.attribute.add(name="tensors", type=onnx.AttributeProto.TENSORS)
    several.tensors.append(outside("listed", "listed.bin"))
    sparse = top.sparse_initializer.add()
    sparse.values.CopyFrom(outside("values", "values.bin"))
    sparse.indices.CopyFrom(outside("indices", "indices.bin"))
    model = helper.make_model(top)
    model.functions.add(name="f", domain="d").node.append(constant("function"))
    model.training_info.add().algorithm.CopyFrom(graph("training"))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    names = ["top", "top_constant", "then", "then_constant", "then_", "then__constant", "listed"]
    names += ["values", "indices", "function", "training", "training_constant"]
    expected = {f"{name}.bin" for name in names}
    assert external_locations(tmp_path / "model.onnx") == expected


def test_the_order_of_key_and_value_does_not_hide_a_path(tmp_path: Path) -> None:
    plain = b"\x0a\x08location\x12\x0b/etc/passwd"
    swapped = b"\x12\x0b/etc/passwd\x0a\x08location"
    data = with_weights_in("/etc/passwd")
    assert data.count(plain) == 1
    (tmp_path / "model.onnx").write_bytes(data.replace(plain, swapped))
    assert onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
    assert external_locations(tmp_path / "model.onnx") == {"/etc/passwd"}


def test_embedded_weights_name_nothing(tmp_path: Path) -> None:
    for data in (image_encoder_onnx(), text_encoder_onnx(1 / 64)):
        (tmp_path / "model.onnx").write_bytes(data)
        assert external_locations(tmp_path / "model.onnx") == frozenset()


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x3a\x7f", b"\x3b", b"\xff" * 99])
def test_what_is_no_model_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(IntegrityError, match="is not an ONNX model"):
        external_locations(tmp_path / "model.onnx")


@settings(max_examples=80)
@given(data=st.data())
def test_whatever_bytes_come_nothing_but_an_integrity_error_escapes(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = np.frombuffer(with_weights_in("w.bin"), np.uint8).copy()
    positions = st.integers(0, len(content) - 1)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(positions)] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    path.write_bytes(content.tobytes())
    try:
        found = external_locations(path)
    except IntegrityError as error:
        assert str(path) in str(error)  # noqa: PT017, either outcome is right
    else:
        assert all(isinstance(location, str) for location in found)
