"""Linear layers as passes find them, and two with nothing between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmedge.converters.numerics.int8_rounding import Range
from mmedge.converters.passes.building import replace_value
from mmedge.converters.passes.float8 import Float8Linears
from mmedge.converters.passes.int8 import Int8Linears
from mmedge.converters.passes.linears import COMPARE_KEY, find_linears, makes_embedding
from mmedge.converters.passes.narrowing import ComputeInFloat32, NarrowFloats
from mmedge.converters.passes.weight_only import WeightOnlyLinears
from mmedge.converters.quantization.layer_report import plan_layers
from mmedge.runtimes.backends import open_session
from mmedge.specs import Array, Compare

RANGES = {"x": Range(-4.0, 4.0), "between": Range(-8.0, 8.0)}
"""By the names of the float graph, as calibration finds them."""
MOMENTS = {"x": np.eye(64, dtype=np.float32), "between": np.eye(32, dtype=np.float32)}

METHODS: dict[str, Callable[[], ir.passes.InPlacePass]] = {
    "int8 dynamic": lambda: Int8Linears("dynamic"),
    "int8 operators": lambda: Int8Linears("operators", RANGES),
    "int8 qdq": lambda: Int8Linears("qdq", RANGES),
    "int8 qdq signed": lambda: Int8Linears("qdq", RANGES, symmetric_activations=True),
    "fp8": lambda: Float8Linears(RANGES),
    "weight-only operators": lambda: WeightOnlyLinears(
        "operators", group_size=16, rounding="gptq", moments=MOMENTS
    ),
    "weight-only blocked": lambda: WeightOnlyLinears(
        "blocked", group_size=16, rounding="gptq", moments=MOMENTS
    ),
}


def chained(path: Path) -> Path:
    """Two products, the second of what the first gives, and a tanh, so that none embeds."""
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (64, 32), "a.bias": (32,), "b.weight": (32, 16)}
    initializers = [
        numpy_helper.from_array((rng.standard_normal(shape) * 0.2).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["product"], "a"),
        helper.make_node("Add", ["product", "a.bias"], ["between"], "a_bias"),
        helper.make_node("MatMul", ["between", "b.weight"], ["sum"], "b"),
        helper.make_node("Tanh", ["sum"], ["embeds"], "tanh"),
    ]
    graph = helper.make_graph(
        nodes,
        "chained",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 64])],
        [helper.make_tensor_value_info("embeds", TensorProto.FLOAT, ["rows", 16])],
        initializers,
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path
    )
    return path


def run(model: Path, feed: dict[str, Array]) -> Array:
    with open_session(model) as session:
        return session.run(feed)["embeds"]


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_reads_the_output_of_the_quantized_one_before(method: str, tmp_path: Path) -> None:
    source = chained(tmp_path / "float.onnx")
    model = ir.load(source)
    METHODS[method]()(model)
    # No float weight is left: each product is there once, in the method's form.
    assert not {"a.weight", "b.weight"} & set(model.graph.initializers)
    products = [node for node in model.graph if node.op_type.startswith("MatMul")]
    assert len(products) == 2
    made = tmp_path / "made.onnx"
    ir.save(model, made)
    feed = {"x": np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)}
    got, expected = run(made, feed), run(source, feed)
    assert 0.0 < np.abs(got - expected).mean() < 0.1


def test_a_replaced_value_hands_over_its_name(tmp_path: Path) -> None:
    model = ir.load(chained(tmp_path / "float.onnx"))
    first, second = find_linears(model.graph)
    node = ir.node("Relu", [first.x], name="other")
    node.outputs[0].name = "other_out"
    model.graph.insert_before(first.node, node)
    replace_value(first.output, node.outputs[0])
    assert second.x is node.outputs[0]
    assert second.x.name == "between"
    assert first.output.name != "between"


@pytest.mark.parametrize("compare", [*Compare, None])
def test_only_an_output_that_is_compared_by_rows_keeps_its_layer_in_float(
    compare: Compare | None, tmp_path: Path
) -> None:
    model = onnx.load(chained(tmp_path / "given.onnx"))
    model.graph.node.pop()  # the tanh
    model.graph.node[-1].output[0] = "embeds"
    if compare is not None:
        model.graph.output[0].metadata_props.add(key=COMPARE_KEY, value=compare.value)
    onnx.save(model, tmp_path / "marked.onnx")
    first, last = find_linears(ir.load(tmp_path / "marked.onnx").graph)
    assert not makes_embedding(first)
    assert makes_embedding(last) == (compare is Compare.ROWS)


@pytest.mark.parametrize("step", ["int8", "narrow", "computed"])
def test_an_output_keeps_its_mark(step: str, tmp_path: Path) -> None:
    """Passes replace the value of an output, and a file is read again."""
    model = onnx.load(chained(tmp_path / "given.onnx"))
    model.graph.node.pop()
    model.graph.node[-1].output[0] = "embeds"
    model.graph.output[0].metadata_props.add(key=COMPARE_KEY, value=Compare.TOKENS.value)
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "marked.onnx")
    marked = ir.load(tmp_path / "marked.onnx")
    if step == "int8":
        Int8Linears("dynamic")(marked)
    else:
        NarrowFloats(ir.DataType.FLOAT16)(marked)
    if step == "computed":
        ComputeInFloat32(ir.DataType.FLOAT16)(marked)
    ir.save(marked, tmp_path / "made.onnx")
    (output,) = ir.load(tmp_path / "made.onnx").graph.outputs
    assert output.metadata_props[COMPARE_KEY] == Compare.TOKENS.value


def tied(path: Path) -> Path:
    """A token table that is the head too, transposed, as torch exports a small decoder."""
    rng = np.random.default_rng(0)
    table = (rng.standard_normal((2048, 64)) * 0.2).astype(np.float32)
    shapes = [TensorProto.INT64, ["rows"]], [TensorProto.FLOAT, ["rows", 2048]]
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table.weight", "ids"], ["hidden"], "look_up"),
            helper.make_node("Transpose", ["table.weight"], ["turned"], "turn", perm=[1, 0]),
            helper.make_node("MatMul", ["hidden", "turned"], ["embeds"], "head"),
        ],
        "tied",
        [helper.make_tensor_value_info("ids", *shapes[0])],
        [helper.make_tensor_value_info("embeds", *shapes[1])],
        [numpy_helper.from_array(table, "table.weight")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path
    )
    return path


@pytest.mark.parametrize("method", METHODS)
def test_a_head_that_shares_the_token_table_is_quantized(
    method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(RANGES, "hidden", Range(-1.0, 1.0))
    monkeypatch.setitem(MOMENTS, "hidden", np.eye(64, dtype=np.float32))
    source, made = tied(tmp_path / "float.onnx"), tmp_path / "made.onnx"
    (head,) = find_linears(ir.load(source).graph)
    assert (head.shape, head.transposed) == ((64, 2048), True)
    model = ir.load(source)
    METHODS[method]()(model)
    assert not any(node.op_type == "Transpose" for node in model.graph)
    ir.save(model, made)
    feed = {"ids": np.arange(0, 2048, 97)}
    got, expected = run(made, feed), run(source, feed)
    assert 0.0 < np.abs(got - expected).mean() < 0.1
    np.testing.assert_array_equal(got.argmax(axis=-1), expected.argmax(axis=-1))


def test_a_shared_table_has_a_row_for_each_use(tmp_path: Path) -> None:
    layers = plan_layers(ir.load(tied(tmp_path / "float.onnx")).graph, ())
    assert [(layer.name, layer.op_type, layer.reason) for layer in layers] == [
        ("table", "Gather", ""),
        ("table", "MatMul", ""),
    ]
