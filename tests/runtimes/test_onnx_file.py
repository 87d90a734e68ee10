"""The reader of ONNX files is held to what the onnx package reads."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from bundles import text_encoder_onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tiny_graphs import INPUTS, OUTPUTS, WEIGHT, save, save_embedder, tensor_info

from mmedge.errors import BackendError
from mmedge.runtimes.onnx_file import ExternalData, check_external_data, read_onnx_file
from mmedge.specs import Array


def test_reads_models_as_onnx_does(tmp_path: Path) -> None:
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
        tensor_info("fixed", [1, 300, 70000], TensorProto.INT8),
        tensor_info("unknown", ["n", None, -1, ""], TensorProto.BOOL),
        tensor_info("sums", ["past+sequence", "4"], TensorProto.INT64),
        tensor_info("scalar", [], TensorProto.DOUBLE),
        tensor_info("überlänge", ["größe"], TensorProto.UINT16),
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


@pytest.mark.parametrize("operator", ["Loop", "Scan", "If", "Neg"])
@pytest.mark.parametrize("where", ["top", "branch", "function"])
def test_loops_are_seen_wherever_they_are(operator: str, where: str, tmp_path: Path) -> None:
    nodes = [helper.make_node(operator, ["x"], ["y"])]
    if where == "branch":
        graph = helper.make_graph(nodes, "then", [], [])
        nodes = [helper.make_node("If", ["x"], ["y"], then_branch=graph)]
    model = helper.make_model(helper.make_graph(nodes if where != "function" else [], "g", [], []))
    if where == "function":
        model.functions.add(name="f", domain="d").node.extend(nodes)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert read_onnx_file(tmp_path / "m.onnx").may_loop is (operator in ("Loop", "Scan"))


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
        [tensor_info("x", ["n"], kind("input"))],
        [tensor_info("y", ["n"], kind("output"))],
        {"W": weight},
    )

    assert read_onnx_file(model).has_fp16


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_float8_is_seen(dtype: str, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    ends = [tensor_info(name, [2]) for name in ("x", "y")]
    zero = np.zeros((), getattr(ml_dtypes, dtype, dtype))
    constants = {"scale": np.array(1, np.float32), "zero": zero}
    model = save(tmp_path / "m.onnx", nodes, ends[:1], ends[1:], constants)

    assert read_onnx_file(model).has_fp8 is (dtype != "int8")


@pytest.mark.parametrize(
    ("operator", "zero_point", "signed"),
    [("DequantizeLinear", "int8", True), ("DequantizeLinear", "uint8", False), ("Cast", "", False)],
)
def test_signed_quantization_is_seen(
    operator: str, zero_point: str, signed: bool, tmp_path: Path
) -> None:
    constants: dict[str, Array] = {"W": np.ones(2, np.int8), "scale": np.float32([1])}
    nodes = [helper.make_node("Cast", ["W"], ["quantized"], to=TensorProto.FLOAT)]
    if operator == "DequantizeLinear":
        constants["zero"] = np.zeros(1, zero_point)
        nodes.append(helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]))
    else:
        nodes.append(helper.make_node("Add", ["x", "quantized"], ["y"]))
    ends = [tensor_info(name, [2]) for name in ("x", "y")]
    model = save(tmp_path / "m.onnx", nodes, ends[:1], ends[1:], constants)

    assert read_onnx_file(model).signed_int8 is signed


@pytest.mark.parametrize(
    ("key", "value", "paired"),
    [
        ("mmedge.paired", "true", True),
        ("mmedge.paired", "false", False),
        ("another", "true", False),
    ],
)
def test_paired_weights_are_marked_in_the_metadata(
    key: str, value: str, paired: bool, tmp_path: Path
) -> None:
    ends = [tensor_info(name, [2]) for name in ("x", "y")]
    nodes = [helper.make_node("Neg", ["x"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, ends[:1], ends[1:], {})
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
        [tensor_info("go", [], TensorProto.BOOL)],
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


def outside(name: str, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("offset", "0"), ("location", location), ("length", "8")):
        tensor.external_data.add(key=key, value=value)
    return tensor


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
    function = model.functions.add(name="f", domain="d")
    function.node.append(constant("function"))
    function.attribute_proto.append(helper.make_attribute("value", outside("d", "default.bin")))
    model.training_info.add().algorithm.CopyFrom(graph("training"))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    names = ["top", "top_constant", "then", "then_constant", "then_", "then__constant", "listed"]
    names += ["values", "indices", "function", "training", "training_constant"]
    names += ["default"]
    expected = tuple(sorted(f"{name}.bin" for name in names))
    assert read_onnx_file(tmp_path / "model.onnx").external_locations == expected


def _message(tag: int, content: bytes) -> bytes:
    length, size = len(content), b""
    while length >= 0x80:
        size += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([tag]) + size + bytes([length]) + content


LOCATION, PATH, OTHER = (
    _message(0x0A, b"location"),
    _message(0x12, b"/etc/passwd"),
    _message(0x12, b"x"),
)


@pytest.mark.parametrize(
    "entries",
    [
        (PATH + LOCATION,),
        (LOCATION + PATH + OTHER,),
        (LOCATION + OTHER + PATH,),
        (b"\x18\x01" + LOCATION + PATH,),
        (LOCATION + PATH, LOCATION + OTHER),
        (LOCATION + OTHER, LOCATION + PATH),
    ],
)
@pytest.mark.parametrize("flag", [b"", b"\x70\x00", b"\x70\x01"])
def test_no_spelling_hides_a_path(entries: tuple[bytes, ...], flag: bytes, tmp_path: Path) -> None:
    tensor = b"".join(_message(0x6A, entry) for entry in entries) + flag
    (tmp_path / "m.onnx").write_bytes(_message(0x3A, _message(0x2A, tensor)))
    assert "/etc/passwd" in read_onnx_file(tmp_path / "m.onnx").external_locations


def _nested(graphs: int) -> bytes:
    graph = b""
    for _ in range(graphs):  # GraphProto.node[NodeProto.attribute[AttributeProto.g[GraphProto]]]
        graph = _message(0x0A, _message(0x2A, _message(0x32, graph or b"\x12\x08location")))
    return _message(0x3A, graph)


def _input(name: bytes, *axes: bytes) -> bytes:
    """A model with one float32 input, of these dimensions."""
    shape = b"".join(_message(0x0A, axis) for axis in axes)
    kind = _message(0x0A, b"\x08\x01" + _message(0x12, shape))
    return _message(0x3A, _message(0x5A, _message(0x0A, name) + _message(0x12, kind)))


def _external(key: bytes, value: bytes) -> bytes:
    entry = _message(0x6A, _message(0x0A, key) + _message(0x12, value))
    return _message(0x3A, _message(0x2A, _message(0x6A, LOCATION + PATH) + entry))


LARGEST = b"\xff" * 8 + b"\x7f"  # 2**63 - 1
BEYOND = {
    **{f"a {what} of 2^63 bytes": (_message(0x3A, tag + LARGEST), "runs past")
       for what, tag in (("node", b"\x0a"), ("weight", b"\x2a"), ("input", b"\x5a"),
                         ("sparse weight", b"\x7a"))},
    **{f"a {what} of 2^63 bytes": (b"\x3a\x00" + tag + LARGEST, "runs past")
       for what, tag in (("function", b"\xca\x01"), ("opset", b"\x42"), ("property", b"\x72"),
                         ("training", b"\xa2\x01"))},
    "a length of 2^64": (b"\x3a" + b"\x80" * 9 + b"\x02", "longer than 64 bits"),
    "a number of 30 bytes": (b"\x08" + b"\xff" * 30 + b"\x01", "longer than 64 bits"),
    "a number that is cut off": (b"\x08\xff", "is cut off"),
    "a number for a graph": (b"\x38\x07", "a number is where"),
    "a number for a name": (_message(0x3A, b"\x5a\x02\x08\x07"), "a name at byte 7 is none"),
    "two graphs": (b"\x3a\x00" * 2, "two graphs"),
    "no graph": (b"\x08\x01", "no graph"),
    "33 graphs in each other": (_nested(32), "more than 32 graphs are nested"),
    "2000 graphs in each other": (_nested(2000), "more than 32 graphs are nested"),
    "a size of 2^31": (_input(b"x", b"\x08\x80\x80\x80\x80\x08"), "axes of up to 2147483648"),
    "a size of 2^70": (_input(b"x", b"\x08" + b"\xff" * 9 + b"\x7f"), "longer than 64 bits"),
    "33 axes": (_input(b"x", *[b"\x08\x01"] * 33), "'x' has 33 axes"),
    "a name of 100 kB": (_input(b"x" * 100_000), "longer than 64 KiB"),
    **{f"an {key} of {value[:20]!r}": (_external(key.encode(), value), f"the {key} of external")
       for key in ("offset", "length") for value in (b"", b"-1", b"1_0", b"9" * 5000, b"\xd9\xa3")},
}  # fmt: skip


@pytest.mark.parametrize("what", BEYOND)
def test_values_beyond_the_bounds_are_refused(what: str, tmp_path: Path) -> None:
    data, reason = BEYOND[what]
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(BackendError, match=rf"m\.onnx: not a readable ONNX model.*{reason}"):
        read_onnx_file(tmp_path / "m.onnx")


def test_32_graphs_in_each_other_and_32_axes_are_read(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(_nested(31))
    assert read_onnx_file(tmp_path / "m.onnx").inputs == ()
    (tmp_path / "m.onnx").write_bytes(_input(b"x", *[b"\x08\xff\xff\xff\xff\x07"] * 32))
    assert read_onnx_file(tmp_path / "m.onnx").inputs[0].shape == (2**31 - 1,) * 32


def test_more_fields_than_any_model_has_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmedge.runtimes.onnx_file._MAX_FIELDS", 1000)
    for nodes, refused in ((999, False), (1000, True)):
        (tmp_path / "m.onnx").write_bytes(_message(0x3A, b"\x0a\x00" * nodes))
        if not refused:
            assert read_onnx_file(tmp_path / "m.onnx").inputs == ()
            continue
        with pytest.raises(BackendError, match="more than 1000 fields"):
            read_onnx_file(tmp_path / "m.onnx")


SUBJECTS = ("embedder", "branches", "text encoder", "sparse")


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("damage")
    save_embedder(folder / "embedder")
    _hide_external_tensor(folder / "branches", sparse=False)
    _hide_external_tensor(folder / "sparse", sparse=True)
    (folder / "text encoder").write_bytes(text_encoder_onnx())
    return {name: (folder / name).read_bytes() for name in SUBJECTS}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_cut_is_read_or_refused(
    subject: str, intact: dict[str, bytes], tmp_path: Path
) -> None:
    content, path = intact[subject], tmp_path / "m.onnx"
    refusals = []
    for length in range(0, len(content), 1 + len(content) // 500):
        path.write_bytes(content[:length])
        try:
            read_onnx_file(path)
        except BackendError as error:
            refusals.append(str(error))
    assert refusals
    assert all(str(path) in refusal for refusal in refusals)


@settings(max_examples=600)
@given(subject=st.sampled_from(SUBJECTS), data=st.data())
def test_any_damage_is_read_or_refused(
    intact: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, subject: str,
    data: st.DataObject,
) -> None:  # fmt: skip
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    content = bytearray(intact[subject])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        pieces = st.binary(max_size=3) | st.sampled_from([LARGEST, b"\xff" * 11, b"\x80", b"\x3a"])
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(pieces)
    path.write_bytes(content)
    try:
        check_external_data(path, read_onnx_file(path))
    except BackendError as error:  # and nothing else
        assert str(path) in str(error)  # noqa: PT017, either outcome is right
