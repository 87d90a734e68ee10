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
from mmedge.converters.passes.linears import find_linears
from mmedge.converters.passes.weight_only import WeightOnlyLinears
from mmedge.runtimes.session import open_session
from mmedge.specs import Array

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
def test_a_layer_reads_what_became_of_the_one_before(method: str, tmp_path: Path) -> None:
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
