"""The reader of ONNX files is held to what the onnx package reads."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tiny_graphs import INPUTS, OUTPUTS, WEIGHT, save, save_embedder

from mmedge.errors import BackendError
from mmedge.runtimes.onnx_file import ExternalData, check_external_data, read_onnx_file
from mmedge.specs import Array


def test_reads_what_onnx_reads(tmp_path: Path) -> None:
    model = save_embedder(tmp_path / "m.onnx")
    truth = onnx.load(model)

    found = read_onnx_file(model)

    assert found.inputs == INPUTS
    assert found.outputs == OUTPUTS
    assert found.ir_version == truth.ir_version
    assert found.opset == 20
    assert not found.has_fp16
    assert found.external_data == ()


def test_the_opset_is_that_of_the_default_domain(tmp_path: Path) -> None:
    model = onnx.load(save_embedder(tmp_path / "m.onnx"))
    model.opset_import.insert(0, helper.make_opsetid("com.microsoft", 1))
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    onnx.save(model, tmp_path / "m.onnx")

    assert read_onnx_file(tmp_path / "m.onnx").opset == 20


def test_shapes_of_every_kind(tmp_path: Path) -> None:
    inputs = [
        helper.make_tensor_value_info("fixed", TensorProto.INT8, [1, 300, 70000]),
        helper.make_tensor_value_info("unknown", TensorProto.BOOL, ["n", None, -1, ""]),
        helper.make_tensor_value_info("sums", TensorProto.INT64, ["past+sequence", "4"]),
        helper.make_tensor_value_info("scalar", TensorProto.DOUBLE, []),
        helper.make_tensor_value_info("überlänge", TensorProto.UINT16, ["größe"]),
    ]
    nodes = [helper.make_node("Identity", [i.name], [f"y{n}"]) for n, i in enumerate(inputs)]
    outputs = [
        helper.make_tensor_value_info(f"y{n}", i.type.tensor_type.elem_type, None)
        for n, i in enumerate(inputs)
    ]

    found = read_onnx_file(save(tmp_path / "m.onnx", nodes, inputs, outputs))

    assert [str(spec) for spec in found.inputs] == [
        "fixed int8(1, 300, 70000)",
        "unknown bool(n, unknown.1, unknown.2, unknown.3)",
        "sums int64(past + sequence, 4)",
        "scalar float64()",
        "überlänge uint16(größe)",
    ]


def test_an_initializer_that_is_also_an_input_need_not_be_fed(tmp_path: Path) -> None:
    model = onnx.load(save_embedder(tmp_path / "m.onnx"))
    model.graph.input.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, WEIGHT.shape))
    onnx.save(model, tmp_path / "m.onnx")

    assert read_onnx_file(tmp_path / "m.onnx").inputs == INPUTS


@pytest.mark.parametrize("where", ["weight", "input", "output"])
def test_float16_is_seen_wherever_it_is(where: str, tmp_path: Path) -> None:
    def kind(of: str) -> int:
        return TensorProto.FLOAT16 if of == where else TensorProto.FLOAT

    weight = np.eye(2, dtype=np.float16 if where == "weight" else np.float32)
    model = save(
        tmp_path / "m.onnx",
        [helper.make_node("Cast", ["x"], ["y"], to=kind("output"))],
        [helper.make_tensor_value_info("x", kind("input"), ["n"])],
        [helper.make_tensor_value_info("y", kind("output"), ["n"])],
        {"W": weight},
    )

    assert read_onnx_file(model).has_fp16


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_float8_is_seen(dtype: str, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    tensor = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    zero = np.zeros((), getattr(ml_dtypes, dtype, dtype))
    constants = {"scale": np.array(1, np.float32), "zero": zero}
    model = save(tmp_path / "m.onnx", nodes, tensor[:1], tensor[1:], constants)

    assert read_onnx_file(model).has_fp8 is (dtype != "int8")


@pytest.mark.parametrize(
    ("operator", "zero_point", "signed"),
    [("DequantizeLinear", "int8", True), ("DequantizeLinear", "uint8", False), ("Cast", "", False)],
)
def test_signed_quantization_is_seen(
    operator: str, zero_point: str, signed: bool, tmp_path: Path
) -> None:
    constants: dict[str, Array] = {"W": np.ones(2, np.int8), "scale": np.float32([1])}
    nodes = [helper.make_node("Cast", ["W"], ["codes"], to=TensorProto.FLOAT)]
    if operator == "DequantizeLinear":
        constants["zero"] = np.zeros(1, zero_point)
        nodes.append(helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]))
    else:
        nodes.append(helper.make_node("Add", ["x", "codes"], ["y"]))
    tensor = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    model = save(tmp_path / "m.onnx", nodes, tensor[:1], tensor[1:], constants)

    assert read_onnx_file(model).signed_codes is signed


@pytest.mark.parametrize(
    ("key", "value", "paired"),
    [
        ("mmedge.paired", "true", True),
        ("mmedge.paired", "false", False),
        ("another", "true", False),
    ],
)
def test_paired_weights_are_told_by_the_metadata(
    key: str, value: str, paired: bool, tmp_path: Path
) -> None:
    tensor = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    nodes = [helper.make_node("Neg", ["x"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, tensor[:1], tensor[1:], {})
    model = onnx.load(path)
    helper.set_model_props(model, {"author": "someone", key: value})
    onnx.save(model, path)

    assert read_onnx_file(path).paired is paired


def test_external_data_is_listed_with_its_extent(tmp_path: Path) -> None:
    model = save_embedder(tmp_path / "m.onnx", external="m.bin")

    found = read_onnx_file(model)

    assert found.external_data == (ExternalData("m.bin", WEIGHT.nbytes),)
    check_external_data(model, found)


def _hide_external_tensor(path: Path, *, sparse: bool) -> None:
    """Write a graph whose external tensor lies in a branch of an If."""
    tensor = numpy_helper.from_array(np.ones(4, np.float32), "hidden")
    onnx.external_data_helper.set_external_data(tensor, "../../secret", offset=8, length=16)
    tensor.ClearField("raw_data")
    if sparse:
        indices = numpy_helper.from_array(np.arange(4), "indices")
        constant = helper.make_node("Constant", [], ["out"], name="c")
        value = helper.make_sparse_tensor(tensor, indices, [8])
        constant.attribute.append(helper.make_attribute("sparse_value", value))
    else:
        constant = helper.make_node("Constant", [], ["out"], value=tensor)
    branch = helper.make_graph(
        [constant], "b", [], [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    )
    save(
        path,
        [helper.make_node("If", ["go"], ["y"], then_branch=branch, else_branch=branch)],
        [helper.make_tensor_value_info("go", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_external_data_hidden_in_a_branch_is_found_and_refused(
    sparse: bool, tmp_path: Path
) -> None:
    model = tmp_path / "a" / "b" / "m.onnx"
    _hide_external_tensor(model, sparse=sparse)
    (tmp_path / "secret").write_bytes(bytes(64))

    found = read_onnx_file(model)

    assert found.external_data == (ExternalData("../../secret", 24),) * 2
    with pytest.raises(BackendError, match=r"'\.\./\.\./secret' leads outside"):
        check_external_data(model, found)


@pytest.mark.parametrize("location", ["", "a\0b", "x" * 5000, "."])
def test_a_location_that_is_no_file_is_refused(location: str, tmp_path: Path) -> None:
    model = save_embedder(tmp_path / "m.onnx", external="m.bin")
    proto = onnx.load(model, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(proto, model)

    with pytest.raises(BackendError, match=r"m\.onnx: its external data"):
        check_external_data(model, read_onnx_file(model))


def _message(tag: int, content: bytes) -> bytes:
    length, size = len(content), b""
    while length >= 0x80:
        size += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([tag]) + size + bytes([length]) + content


def test_graphs_nested_without_end_are_refused(tmp_path: Path) -> None:
    node = b"location"
    for _ in range(2000):  # GraphProto.node[NodeProto.attribute[AttributeProto.g[GraphProto ...]]]
        node = _message(0x0A, _message(0x2A, _message(0x32, node)))
    (tmp_path / "m.onnx").write_bytes(_message(0x3A, node))

    with pytest.raises(BackendError, match=r"not a readable ONNX model.*recursion"):
        read_onnx_file(tmp_path / "m.onnx")


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("damage")
    _hide_external_tensor(folder / "m.onnx", sparse=True)
    return folder / "damaged.onnx", (folder / "m.onnx").read_bytes()


def test_every_cut_is_read_or_refused(intact: tuple[Path, bytes]) -> None:
    path, content = intact
    refusals = []
    for length in range(len(content)):
        path.write_bytes(content[:length])
        try:
            read_onnx_file(path)
        except BackendError as error:
            refusals.append(str(error))
    assert len(refusals) > 0.9 * len(content)
    assert all(str(path) in refusal for refusal in refusals)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_read_or_refused(intact: tuple[Path, bytes], data: st.DataObject) -> None:
    path, content = intact
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    refusal = str(path)
    try:
        check_external_data(path, read_onnx_file(path))
    except BackendError as error:  # and nothing else
        refusal = str(error)
    assert str(path) in refusal
