"""Weight-only linear layers and tables in their two forms."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from towers import VOCABULARY, WIDTH, image_tower, images, text_tower, texts

from mmedge.converters.numerics.group_rounding import Bits, hqq, round_to_nearest
from mmedge.converters.passes import to_onnxruntime_layout
from mmedge.converters.passes.linears import EXCLUDED
from mmedge.converters.passes.weight_only import WeightOnlyLinears, moment_inputs
from mmedge.converters.statistics.collect import collect_moments
from mmedge.errors import QuantizationError
from mmedge.runtimes.backends import open_session
from mmedge.specs import Array, Float32Array

Form = Literal["operators", "blocked"]


def run(model: Path, feed: dict[str, Array], output: str = "embeds") -> Array:
    with open_session(model) as session:
        return session.run(feed)[output]


def save(model: ir.Model, path: Path) -> Path:
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=64)
    onnx.checker.check_model(path, full_check=True)
    return path


def linear_graph(
    path: Path, weight: Float32Array, bias: Float32Array | None = None, *, transposed: bool = False
) -> Path:
    """One product, with a normalization after it so that it does not make an embedding."""
    stored = np.ascontiguousarray(weight.T) if transposed else weight
    initializers = [numpy_helper.from_array(stored, "fc.weight")]
    op_type = "Gemm" if transposed else "MatMul"
    nodes = [helper.make_node(op_type, ["x", "fc.weight"], ["product"], "fc")]
    if transposed:
        nodes[0].attribute.append(helper.make_attribute("transB", 1))
    last = "product"
    if bias is not None:
        initializers.append(numpy_helper.from_array(bias, "fc.bias"))
        nodes.append(helper.make_node("Add", ["product", "fc.bias"], ["sum"], "fc_bias"))
        last = "sum"
    nodes.append(helper.make_node("Relu", [last], ["y"], "relu"))
    nodes.append(helper.make_node("Tanh", ["y"], ["embeds"], "tanh"))
    inputs, outputs = weight.shape
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inputs])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", outputs]),
            helper.make_tensor_value_info("embeds", TensorProto.FLOAT, ["rows", outputs]),
        ],
        initializers,
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path
    )
    return path


def weights(inputs: int, outputs: int, seed: int = 0) -> Float32Array:
    found = np.random.default_rng(seed).standard_normal((inputs, outputs)) * 0.1
    return found.astype(np.float32)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "inputs", "group_size"),
    [(4, 96, 32), (4, 100, 32), (4, 20, 128), (4, 256, 256), (8, 96, 32), (8, 75, 16), (2, 96, 32)],
)
def test_the_runtime_computes_what_the_quantized_values_mean(
    bits: Bits, inputs: int, group_size: int, symmetric: bool, tmp_path: Path
) -> None:
    weight, bias = weights(inputs, 24), weights(1, 24, seed=1)[0]
    model = ir.load(linear_graph(tmp_path / "float.onnx", weight, bias))
    step = WeightOnlyLinears("operators", bits=bits, group_size=group_size, symmetric=symmetric)
    step(model)
    used = step.weights[0].group_size
    assert used <= max(group_size, 32)
    quantized = round_to_nearest(weight, bits, used, symmetric=symmetric)
    x = np.random.default_rng(2).standard_normal((5, inputs)).astype(np.float32)
    got = run(save(model, tmp_path / "few.onnx"), {"x": x}, "y")
    expected = np.maximum(x @ quantized.matrix() + bias, 0)
    # The runtime rounds activations to int8 for the product, group by group.
    np.testing.assert_allclose(got, expected, atol=0.02 * np.abs(expected).max())
    if bits < 8:
        assert np.abs(got - np.maximum(x @ weight + bias, 0)).max() > np.abs(got - expected).max()


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_both_forms_are_the_same_weights(
    bits: Bits, symmetric: bool, transposed: bool, tmp_path: Path
) -> None:
    weight = weights(128, 24)
    x = np.eye(128, dtype=np.float32)  # 1 and 0 are exact at every accuracy: the output is Wq
    results = {}
    for form in ("operators", "blocked"):
        model = ir.load(linear_graph(tmp_path / "float.onnx", weight, transposed=transposed))
        WeightOnlyLinears(form, bits=bits, group_size=32, symmetric=symmetric)(model)  # type: ignore[arg-type]
        results[form] = run(save(model, tmp_path / f"{form}.onnx"), {"x": x}, "y")
    quantized = round_to_nearest(weight, bits, 32, symmetric=symmetric)
    np.testing.assert_allclose(results["blocked"], np.maximum(quantized.matrix(), 0), atol=1e-7)
    np.testing.assert_allclose(results["operators"], results["blocked"], atol=1e-6)


@pytest.mark.parametrize("form", ["operators", "blocked"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_towers_are_close_to_float(form: Form, tower: str, tmp_path: Path) -> None:
    make, feed = (image_tower, images(4)) if tower == "image" else (text_tower, texts(4, 9))
    source = make(tmp_path / "tower.onnx")
    model = ir.load(source)
    inputs = [(value.name, value.shape, value.dtype) for value in model.graph.inputs]
    WeightOnlyLinears(form, bits=8, group_size=16)(model)
    assert [(value.name, value.shape, value.dtype) for value in model.graph.inputs] == inputs
    cosine = (run(save(model, tmp_path / "few.onnx"), feed) * run(source, feed)).sum(axis=1)
    assert 0.999 < cosine.min() < 1.0 - 1e-9


def test_the_layout_for_onnx_runtime_is_taken_too(tmp_path: Path) -> None:
    source = image_tower(tmp_path / "image.onnx")
    layout = tmp_path / "image.ort.onnx"
    to_onnxruntime_layout(source, layout)
    model = ir.load(layout)
    WeightOnlyLinears("operators", bits=8, group_size=16)(model)
    counted = Counter(node.op_type for node in model.graph)
    assert counted["MatMul"] + counted["Gemm"] == 0
    cosine = (run(save(model, tmp_path / "few.onnx"), images(3)) * run(source, images(3))).sum(
        axis=1
    )
    assert cosine.min() > 0.999


@pytest.mark.parametrize(
    ("form", "bits", "symmetric"),
    [("operators", 4, True), ("operators", 2, False), ("blocked", 8, True)],
)
def test_placeholders_have_the_size_of_quantized_values(
    form: Form, bits: Bits, symmetric: bool, tmp_path: Path
) -> None:
    source, sizes = text_tower(tmp_path / "text.onnx"), []
    roundings: tuple[Literal["rtn", "none"], ...] = ("rtn", "none")
    for rounding in roundings:
        model = ir.load(source)
        step = WeightOnlyLinears(
            form, bits=bits, group_size=16, symmetric=symmetric, rounding=rounding
        )
        step(model)
        constants = sorted(
            (name, value.const_value.nbytes)
            for name, value in model.graph.initializers.items()
            if value.const_value is not None
        )
        sizes.append((constants, [(w.name, w.bits, w.size_bytes) for w in step.weights]))
        assert (step.weights[0].weight_error is None) == (rounding == "none")
    assert sizes[0] == sizes[1]


def test_excluded_layers_and_bits_per_layer(tmp_path: Path) -> None:
    model = ir.load(text_tower(tmp_path / "text.onnx"))
    plain = WeightOnlyLinears("operators", bits=4, group_size=32)
    plain(model)
    names = [weight.name for weight in plain.weights]
    *layers, last, table = plain.weights
    assert {weight.bits for weight in layers} == {4}
    assert (last.bits, table.op_type, table.bits) == (8, "Gather", 4)
    assert table.shape == (VOCABULARY, WIDTH)
    model = ir.load(tmp_path / "text.onnx")
    step = WeightOnlyLinears(
        "operators", group_size=32, keep=[names[0], names[-1]], bits_of={names[1]: 2, names[-2]: 4}
    )
    step(model)
    found = {weight.name: weight for weight in step.weights}
    assert (found[names[0]].bits, found[names[0]].reason) == (32, EXCLUDED)
    assert (found[names[-1]].bits, found[names[1]].bits, found[names[-2]].bits) == (32, 2, 4)
    counted = Counter(node.op_type for node in model.graph)
    assert counted["GatherBlockQuantized"] == 0
    assert counted["MatMulNBits"] == len(layers)
    save(model, tmp_path / "few.onnx")


@pytest.mark.parametrize("bits", [2, 4])
def test_tables_are_looked_up_in_few_bits(bits: Bits, tmp_path: Path) -> None:
    source = text_tower(tmp_path / "text.onnx")
    model = ir.load(source)
    table = next(node.inputs[0] for node in model.graph if node.op_type == "Gather")
    assert table is not None
    assert table.const_value is not None
    rows = table.const_value.numpy()
    step = WeightOnlyLinears("operators", bits=bits, group_size=16, symmetric=False, rounding="hqq")
    step(model)
    lookup = next(node for node in model.graph if node.op_type == "GatherBlockQuantized")
    lookup.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(lookup.outputs[0])
    feed = texts(2, 5)
    with open_session(save(model, tmp_path / "few.onnx")) as session:
        got = session.run(feed)[lookup.outputs[0].name or ""]
    expected = hqq(rows.T, bits, 16).matrix().T[feed["input_ids"]]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def tied_decoder(path: Path, vocabulary: int = 1200, width: int = 64) -> Path:
    """Ids to logits through one table, as a decoder whose head is its embedding."""
    nodes = [
        helper.make_node("Gather", ["wte.weight", "ids"], ["rows"], "wte"),
        helper.make_node("MatMul", ["rows", "fc.weight"], ["hidden"], "fc"),
        helper.make_node("Transpose", ["wte.weight"], ["turned"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["hidden", "turned"], ["logits"], "head"),
    ]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "sequence"])],
        [
            helper.make_tensor_value_info(
                "logits", TensorProto.FLOAT, ["batch", "sequence", vocabulary]
            )
        ],
        [
            numpy_helper.from_array(weights(vocabulary, width), "wte.weight"),
            numpy_helper.from_array(weights(width, width, seed=1), "fc.weight"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
    return path


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_table_that_is_the_head_too_is_stored_once(symmetric: bool, tmp_path: Path) -> None:
    source = tied_decoder(tmp_path / "decoder.onnx")
    model = ir.load(source)
    step = WeightOnlyLinears("operators", bits=4, group_size=32, symmetric=symmetric)
    step(model)
    few = save(model, tmp_path / "few.onnx")
    assert [weight.name for weight in step.weights] == ["fc", "wte"]
    table = step.weights[1]
    assert table.bits == 4
    held = ir.load(few).graph.initializers.values()
    counted = sum(weight.size_bytes for weight in step.weights)
    shape_bytes = 16
    assert sum(value.const_value.nbytes for value in held if value.const_value) == (
        counted + shape_bytes
    )
    ids = np.arange(12).reshape(2, 6)
    got, expected = run(few, {"ids": ids}, "logits"), run(source, {"ids": ids}, "logits")
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.97


def test_gptq_needs_its_moments_and_errs_less_with_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    mixing = rng.standard_normal((8, 64))  # eight directions carry nearly all of the input
    rows = rng.standard_normal((400, 8)) @ mixing + 0.1 * rng.standard_normal((400, 64))
    x = rows.astype(np.float32)
    source = linear_graph(tmp_path / "float.onnx", weights(64, 48))
    expected = run(source, {"x": x[200:]}, "y")
    names = moment_inputs(ir.load(source))
    assert names == ["x"]
    moments = collect_moments(source, names, lambda: [{"x": x[:200]}])
    errors = {}
    for rounding in ("rtn", "gptq"):
        model = ir.load(source)
        WeightOnlyLinears("blocked", group_size=32, rounding=rounding, moments=moments)(model)  # type: ignore[arg-type]
        got = run(save(model, tmp_path / f"{rounding}.onnx"), {"x": x[200:]}, "y")
        errors[rounding] = float(np.linalg.norm(got - expected))
    assert errors["gptq"] < 0.6 * errors["rtn"]
    with pytest.raises(QuantizationError, match="No second moment for 'x', which layer 'fc' reads"):
        WeightOnlyLinears("operators", rounding="gptq")(ir.load(source))


def test_blocked_leaves_layers_that_an_engine_would_fold(tmp_path: Path) -> None:
    reasons = {}
    for inputs in (32, 48, 75):
        model = ir.load(linear_graph(tmp_path / f"{inputs}.onnx", weights(inputs, 24)))
        step = WeightOnlyLinears("blocked", group_size=32)
        try:
            step(model)
        except QuantizationError as error:
            reasons[inputs] = str(error)
        else:
            reasons[inputs] = str(step.weights[0].group_size)
    assert reasons[32] == reasons[48] == "16"
    assert "75 inputs are not several whole groups" in reasons[75]


def test_blocked_is_int4_with_several_blocks_and_no_zero_point(tmp_path: Path) -> None:
    model = ir.load(linear_graph(tmp_path / "float.onnx", weights(128, 24)))
    WeightOnlyLinears("blocked", group_size=128)(model)
    found = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert len(found) == 1
    quantized, scale = found[0].inputs
    assert quantized is not None
    assert scale is not None
    assert (quantized.dtype, quantized.shape) == (ir.DataType.INT4, [128, 24])
    assert (scale.dtype, scale.shape) == (ir.DataType.FLOAT, [2, 24])
    assert scale.const_value is not None
    assert (scale.const_value.numpy() > 0).all()  # TensorRT takes no others
    assert found[0].attributes["block_size"].as_int() == 64
    assert model.graph.opset_imports[""] == 21


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (4, 256)])
def test_blocked_refuses_settings_that_engines_lack(bits: Bits, group_size: int) -> None:
    with pytest.raises(QuantizationError, match="The blocked form: got"):
        WeightOnlyLinears("blocked", bits=bits, group_size=group_size)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    weight = weights(64, 24)
    weight[3, 5] = np.inf
    model = ir.load(linear_graph(tmp_path / "float.onnx", weight))
    with pytest.raises(QuantizationError, match=r"Weight 'fc\.weight' holds NaN"):
        WeightOnlyLinears("operators")(model)


def test_a_weight_of_two_products_is_stored_once(tmp_path: Path) -> None:
    source = linear_graph(tmp_path / "float.onnx", weights(64, 64))
    proto = onnx.load(source)
    proto.graph.node.insert(1, helper.make_node("MatMul", ["product", "fc.weight"], ["again"]))
    proto.graph.node[2].input[0] = "again"
    onnx.save(proto, source)
    model = ir.load(source)
    step = WeightOnlyLinears("operators")
    step(model)
    assert len(step.weights) == 1
    products = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert len(products) == 2
    assert products[0].inputs[1] is products[1].inputs[1]
    x = np.eye(64, dtype=np.float32)
    assert np.isfinite(run(save(model, tmp_path / "few.onnx"), {"x": x}, "y")).all()
