"""Graphs that look like what a pass takes and are not, and constants at the edges of int8."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from towers import HEADS, VOCABULARY, WIDTH, Graph, convolution_tower, text_tower

from mmedge.converters.numerics.int8_rounding import Range, quantize_weight
from mmedge.converters.passes.attention import FuseAttention
from mmedge.converters.passes.building import add_initializer
from mmedge.converters.passes.int8 import Int8Linears, quantizable_inputs
from mmedge.converters.passes.matching import constant
from mmedge.converters.passes.patch_embedding import PatchEmbeddingAsMatMul
from mmedge.converters.passes.pooled_token import SelectTokenEarly
from mmedge.runtimes.backends import open_session
from mmedge.specs import Array

TOKENS = 6


def save(
    graph: Graph, result: str, path: Path, shape: list[str | int], inputs: Iterable[str] = ("x",)
) -> Path:
    """Write a graph over x (batch, TOKENS, WIDTH) with the output `result`."""
    graph.nodes.append(helper.make_node("Identity", [result], ["y"], "returned"))
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", TOKENS, WIDTH])
        for name in inputs
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    model = helper.make_model(
        helper.make_graph(graph.nodes, "graph", values, [output], graph.initializers),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(onnx.shape_inference.infer_shapes(model, data_prop=True, strict_mode=True), path)
    return path


def tokens(batch: int = 3) -> dict[str, Array]:
    shape = (batch, TOKENS, WIDTH)
    return {"x": np.random.default_rng(3).standard_normal(shape).astype(np.float32)}


def run(model: Path | ir.Model, feed: dict[str, Array], folder: Path) -> Array:
    path = folder / "made.onnx"
    if isinstance(model, ir.Model):
        ir.save(model, path)
    else:
        path = model
    with open_session(path) as session:
        return next(iter(session.run(feed).values()))


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def fused(source: Path) -> ir.Model:
    model = ir.load(source)
    FuseAttention()(model)
    return model


@pytest.mark.parametrize("shape", [(1, 1, 1, TOKENS), (1, HEADS, TOKENS, TOKENS)], ids=str)
def test_a_mask_for_all_queries_is_left_to_the_nodes(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    """ONNX Runtime's kernel refuses it; one mask a head it takes."""
    graph = Graph(0)
    returned = graph.attention("x", graph.weight(*shape, scale=1.0))
    source = save(graph, returned, tmp_path / "given.onnx", ["batch", TOKENS, WIDTH])
    model = fused(source)
    assert operators(model)["Attention"] == (shape[2] == TOKENS)
    made = run(model, tokens(), tmp_path)
    np.testing.assert_allclose(made, run(source, tokens(), tmp_path), atol=2e-6)


def test_a_scale_that_the_operator_does_not_take_is_left_alone(tmp_path: Path) -> None:
    source = save(
        graph := Graph(0),
        graph.attention("x", None),
        tmp_path / "given.onnx",
        ["batch", TOKENS, WIDTH],
    )
    model = ir.load(source)
    product = next(node for node in model.graph if node.op_type == "Softmax").inputs[0]
    assert product is not None
    matmul = product.producer()
    assert matmul is not None
    assert matmul.inputs[0] is not None
    scaled = matmul.inputs[0].producer()
    assert scaled is not None
    negative = ir.tensor(np.array(-0.5, np.float32), name="negative")
    value = ir.Value(
        name="negative",
        const_value=negative,
        shape=ir.Shape([]),
        type=ir.TensorType(negative.dtype),
    )
    model.graph.register_initializer(value)
    scaled.replace_input_with(1, value)
    assert not FuseAttention()(model).modified


def test_a_guard_that_gives_something_else_than_zero_is_left_alone(tmp_path: Path) -> None:
    source = text_tower(tmp_path / "text.onnx", blocks=1)
    model = ir.load(source)
    where = next(
        node
        for node in model.graph
        if node.op_type == "Where" and node.inputs[0].producer().op_type == "IsNaN"  # type: ignore[union-attr]
    )
    where.replace_input_with(1, where.inputs[2])
    assert not FuseAttention()(model).modified


@pytest.fixture(params=[fused, ir.load], ids=["fused", "decomposed"])
def laid_out(request: pytest.FixtureRequest) -> Callable[[Path], ir.Model]:
    """Attention in one node, and as torch writes it: a selection moves through both."""
    found: Callable[[Path], ir.Model] = request.param
    return found


def pooled(folder: Path, index: Array, shape: list[str | int]) -> Path:
    graph = Graph(0)
    x = graph.block("x", None)
    chosen = graph.node("Gather", x, graph.constant(index, "int64"), axis=1)
    return save(graph, chosen, folder / "given.onnx", shape)


@pytest.mark.parametrize("index", [0, 2, -1])
def test_a_token_is_counted_from_either_end(
    index: int, laid_out: Callable[[Path], ir.Model], tmp_path: Path
) -> None:
    source = pooled(tmp_path, np.array(index), ["batch", WIDTH])
    model = laid_out(source)
    assert SelectTokenEarly()(model).modified
    made = run(model, tokens(), tmp_path)
    np.testing.assert_allclose(made, run(source, tokens(), tmp_path), atol=2e-6)


def test_a_zero_in_a_reshape_that_would_mean_a_size_of_zero(tmp_path: Path) -> None:
    """torch computes the batch size, and sets allowzero, under which 0 copies nothing."""
    source = pooled(tmp_path, np.array(2), ["batch", WIDTH])
    model = ir.load(source)
    batch = ir.node("Shape", [model.graph.inputs[0]], {"start": 0, "end": 1}, name="batch")
    model.graph.insert_before(model.graph[0], batch)
    for node in [node for node in model.graph if node.op_type == "Reshape"]:
        tail = constant(node.inputs[1])
        if tail is not None and tail[0] == 0:
            rest = add_initializer(model.graph, f"{node.name}_rest", tail[1:])
            whole = ir.node("Concat", [batch.outputs[0], rest], {"axis": 0}, name=f"{node.name}_to")
            model.graph.insert_before(node, whole)
            node.replace_input_with(1, whole.outputs[0])
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 1)
    assert SelectTokenEarly()(model).modified
    made = run(model, tokens(), tmp_path)
    np.testing.assert_allclose(made, run(source, tokens(), tmp_path), atol=2e-6)


def test_an_index_of_one_axis_keeps_the_axis_of_the_token(
    laid_out: Callable[[Path], ir.Model], tmp_path: Path
) -> None:
    source = pooled(tmp_path, np.array([2]), ["batch", 1, WIDTH])
    model = laid_out(source)
    SelectTokenEarly()(model)
    made = run(model, tokens(), tmp_path)
    np.testing.assert_allclose(made, run(source, tokens(), tmp_path), atol=2e-6)
    assert made.shape == (3, 1, WIDTH)


def test_tensors_broadcast_over_the_tokens_are_not_cut(
    laid_out: Callable[[Path], ir.Model], tmp_path: Path
) -> None:
    graph = Graph(0)
    mean = graph.node("ReduceMean", "x", graph.constant([1], "int64"), keepdims=1)
    x = graph.node("Add", graph.block("x", None), mean)
    x = graph.node("Gather", x, graph.constant(3, "int64"), axis=1)
    source = save(graph, x, tmp_path / "given.onnx", ["batch", WIDTH])
    model = laid_out(source)
    SelectTokenEarly()(model)
    made = run(model, tokens(), tmp_path)
    np.testing.assert_allclose(made, run(source, tokens(), tmp_path), atol=2e-6)


def test_pairs_that_do_not_take_each_sample_once_stay(
    laid_out: Callable[[Path], ir.Model], tmp_path: Path
) -> None:
    graph = Graph(0)
    x = graph.block("x", None)
    pairs = graph.constant([[1, 0], [0, 2], [2, 2]], "int64")
    source = save(graph, graph.node("GatherND", x, pairs), tmp_path / "given.onnx", [3, WIDTH])
    model = laid_out(source)
    assert not SelectTokenEarly()(model).modified


def test_two_selections_of_one_value_stay_right(
    laid_out: Callable[[Path], ir.Model], tmp_path: Path
) -> None:
    graph = Graph(0)
    x = graph.block("x", None)
    first = graph.node("Gather", x, graph.constant(0, "int64"), axis=1)
    last = graph.node("Gather", x, graph.constant(-1, "int64"), axis=1)
    source = save(graph, graph.node("Sub", first, last), tmp_path / "given.onnx", ["batch", WIDTH])
    model = laid_out(source)
    SelectTokenEarly()(model)
    made = run(model, tokens(), tmp_path)
    np.testing.assert_allclose(made, run(source, tokens(), tmp_path), atol=2e-6)


def test_causal_attention_is_not_narrowed(tmp_path: Path) -> None:
    """One query alone would be taken for the first, which sees one key."""
    model = fused(pooled(tmp_path, np.array(3), ["batch", WIDTH]))
    attention = next(node for node in model.graph if node.op_type == "Attention")
    attention.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    ir.save(model, tmp_path / "causal.onnx")
    assert SelectTokenEarly()(model).modified  # what follows it is
    assert attention.graph is model.graph
    made = run(model, tokens(), tmp_path)
    np.testing.assert_allclose(made, run(tmp_path / "causal.onnx", tokens(), tmp_path), atol=2e-6)


def test_two_patch_convolutions_without_names(tmp_path: Path) -> None:
    model = ir.load(convolution_tower(tmp_path / "image.onnx", blocks=1))
    nodes = list(model.graph)
    conv = next(node for node in nodes if node.op_type == "Conv")
    flatten, transpose = nodes[nodes.index(conv) + 1 : nodes.index(conv) + 3]
    conv.name = None
    after: list[ir.Node] = []
    source: ir.Value = conv.outputs[0]
    for node in (conv, flatten, transpose):
        inputs = list(node.inputs) if node is conv else [source, *node.inputs[1:]]
        twin = ir.node(node.op_type, inputs, dict(node.attributes.items()))
        twin.outputs[0].name = f"{node.outputs[0].name}_twin"
        twin.outputs[0].type, twin.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        source = twin.outputs[0]
        after.append(twin)
    model.graph.insert_after(transpose, after)
    model.graph.outputs.append(source)
    PatchEmbeddingAsMatMul()(model)
    assert operators(model)["Conv"] == 0
    ir.save(model, tmp_path / "product.onnx")
    onnx.checker.check_model(tmp_path / "product.onnx")


def ranges(model: ir.Model) -> dict[str, Range]:
    return dict.fromkeys(quantizable_inputs(model), Range(-6.0, 6.0))


def nearly_as_float(source: Path, form: str, folder: Path) -> ir.Model:
    """Quantize, compare and return the quantized model."""
    model = ir.load(source)
    # Paired: these sums are exact on every processor, however ONNX Runtime computes them.
    Int8Linears(form, ranges(model), paired=True)(model)  # type: ignore[arg-type]
    made, given = run(model, tokens(), folder), run(source, tokens(), folder)
    assert made.shape == given.shape
    cosine = (made * given).sum() / np.linalg.norm(made) / np.linalg.norm(given)
    assert cosine > 0.998
    return model


FORMS = pytest.mark.parametrize("form", ["dynamic", "operators", "qdq"])


@FORMS
def test_a_weight_of_two_layers_is_quantized_once(form: str, tmp_path: Path) -> None:
    graph = Graph(0)
    tied = graph.weight(WIDTH, WIDTH)
    hidden = graph.node("Relu", graph.node("MatMul", "x", tied))
    flat = graph.node("Reshape", hidden, graph.constant([-1, WIDTH], "int64"))
    turned = graph.node("Relu", graph.node("Gemm", flat, tied, transB=1))
    again = graph.node("Relu", graph.node("MatMul", turned, tied))
    source = save(graph, again, tmp_path / "given.onnx", ["tokens", WIDTH])
    model = nearly_as_float(source, form, tmp_path)
    quantized = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT8]
    # As it is, for two layers, and transposed for the third.
    assert sum(value.shape == [WIDTH, WIDTH] for value in quantized) == 2


@FORMS
@pytest.mark.parametrize("shape", [(1,), (1, WIDTH), (1, 1)], ids=str)
def test_a_bias_that_is_broadcast_is_added_beside_the_product(
    shape: tuple[int, ...], form: str, tmp_path: Path
) -> None:
    graph = Graph(0)
    bias = graph.weight(*shape, scale=1.0)
    x = graph.node(
        "Relu", graph.node("Add", graph.node("MatMul", "x", graph.weight(WIDTH, WIDTH)), bias)
    )
    flat = graph.node("Reshape", x, graph.constant([-1, WIDTH], "int64"))
    x = graph.node("Relu", graph.node("Gemm", flat, graph.weight(WIDTH, WIDTH), bias))
    source = save(graph, x, tmp_path / "given.onnx", ["tokens", WIDTH])
    nearly_as_float(source, form, tmp_path)


def test_two_readers_of_one_table_without_names(tmp_path: Path) -> None:
    model = ir.load(text_tower(tmp_path / "text.onnx", blocks=1))
    gather = next(node for node in model.graph if node.op_type == "Gather")
    gather.name = None
    twin = ir.node("Gather", list(gather.inputs), {"axis": 0})
    twin.outputs[0].name = "tokens_again"
    twin.outputs[0].type, twin.outputs[0].shape = gather.outputs[0].type, gather.outputs[0].shape
    model.graph.insert_after(gather, twin)
    model.graph.outputs.append(twin.outputs[0])
    Int8Linears("dynamic")(model)
    tables = [
        value for value in model.graph.initializers.values() if value.shape == [VOCABULARY, WIDTH]
    ]
    assert [table.dtype for table in tables] == [ir.DataType.INT8]
    names = [value.name for node in model.graph for value in node.outputs]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-39, 1e-36])
def test_weights_that_are_next_to_nothing_stay_finite(size: float) -> None:
    weight = np.full((4, 2), size, np.float32)
    weight[:, 1] = 1.0
    quantized, scales = quantize_weight(weight, axis=1)
    assert (scales >= np.finfo(np.float32).tiny).all()
    np.testing.assert_allclose(quantized * scales, weight, atol=2e-36)


@pytest.mark.parametrize("high", [0.0, 1e-45, 1e-40, 1e-36])
def test_the_scale_of_a_tiny_range_is_no_zero(high: float) -> None:
    scale, zero_point = Range(0.0, high).affine()
    assert scale >= np.finfo(np.float32).tiny
    assert zero_point == 0
