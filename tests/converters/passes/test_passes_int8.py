"""Int8 linear layers in their three forms."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from towers import image_tower, images, text_tower, texts

from mmedge.converters.numerics.int8_rounding import Range, quantize_weight
from mmedge.converters.passes import to_onnxruntime_layout
from mmedge.converters.passes.int8 import Int8Linears, quantizable_inputs
from mmedge.errors import QuantizationError
from mmedge.runtimes.backends import open_session
from mmedge.runtimes.onnx_file import PAIRED_KEY
from mmedge.specs import Array


def run(model: Path, feed: dict[str, Array]) -> Array:
    with open_session(model) as session:
        return session.run(feed)["embeds"]


def save(model: ir.Model, path: Path) -> Path:
    ir.save(model, path)
    return path


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    out = tmp_path / "image.ort.onnx"
    to_onnxruntime_layout(image_tower(tmp_path / "image.onnx"), out)
    return out


def wide_ranges(model: ir.Model) -> dict[str, Range]:
    return dict.fromkeys(quantizable_inputs(model), Range(-6.0, 6.0))


def test_quantized_weights_are_symmetric_and_one_scale_a_column() -> None:
    weight = np.array([[1.0, -20.0, 0.0], [-0.5, 10.0, 0.0]], np.float32)
    quantized, scales = quantize_weight(weight, axis=1)
    assert quantized.dtype == np.int8
    np.testing.assert_allclose(scales, [1 / 127, 20 / 127, 1 / 127])
    np.testing.assert_array_equal(quantized, [[127, -127, 0], [-64, 64, 0]])
    np.testing.assert_allclose(quantized * scales, weight, atol=0.08)


@pytest.mark.parametrize(
    ("given", "scale", "zero_point"),
    [
        (Range(-1.0, 1.0), 2 / 255, 128),
        (Range(0.5, 2.55), 0.01, 0),  # zero is always inside
        (Range(-2.55, -0.1), 0.01, 255),
        (Range(0.0, 0.0), 1.0, 0),
    ],
)
def test_affine_parameters_hold_zero_exactly(given: Range, scale: float, zero_point: int) -> None:
    got_scale, got_zero = given.affine()
    assert got_scale == pytest.approx(scale, rel=1e-5)
    assert abs(got_zero - zero_point) <= 1


@pytest.mark.parametrize("form", ["dynamic", "operators", "qdq"])
def test_every_form_is_close_to_float(form: str, layout: Path, tmp_path: Path) -> None:
    model = ir.load(layout)
    Int8Linears(form, wide_ranges(model))(model)  # type: ignore[arg-type]
    feed = images(4)
    cosine = (run(save(model, tmp_path / "int8.onnx"), feed) * run(layout, feed)).sum(axis=1)
    assert cosine.min() > 0.995
    assert cosine.max() < 1.0 - 1e-9  # it really is quantized


def test_operators_and_qdq_are_the_same_numbers(layout: Path, tmp_path: Path) -> None:
    results = []
    for form in ("operators", "qdq"):
        model = ir.load(layout)
        Int8Linears(form, wide_ranges(model))(model)  # type: ignore[arg-type]
        results.append(run(save(model, tmp_path / f"{form}.onnx"), images(4)))
    np.testing.assert_allclose(results[0], results[1], atol=1e-5)


@pytest.mark.parametrize("form", ["dynamic", "operators", "qdq"])
def test_paired_weights_give_the_same_outputs_with_every_kernel(
    form: str, layout: Path, tmp_path: Path
) -> None:
    """On a processor without VNNI the two kernels differ; elsewhere there is but one."""
    results = []
    for paired in (False, True):  # what asks for exact sums: the processor, or nothing
        model = ir.load(layout)
        Int8Linears(form, wide_ranges(model), paired=True)(model)  # type: ignore[arg-type]
        assert model.metadata_props == {PAIRED_KEY: "true"}
        if not paired:
            model.metadata_props.clear()
        results.append(run(save(model, tmp_path / f"{paired}.onnx"), images(4)))
    np.testing.assert_array_equal(results[0], results[1])
    cosine = (results[1] * run(layout, images(4))).sum(axis=1)
    assert cosine.min() > 0.99


def test_every_linear_layer_but_the_last_is_int8(layout: Path) -> None:
    model = ir.load(layout)
    linears = sum(node.op_type == "MatMul" for node in model.graph)
    Int8Linears("dynamic")(model)
    counted = Counter(node.op_type for node in model.graph)
    assert counted["MatMulIntegerToFloat"] == linears == 1 + 2 * 6
    assert counted["MatMul"] == 0
    assert counted["Gemm"] == 1  # the projection that makes the embedding
    # Query, key and value share one quantization: patches, 2 * (qkv, out, fc1, fc2).
    assert counted["DynamicQuantizeLinear"] == 1 + 2 * 4


def test_images_are_quantized_before_they_are_cut_into_patches(layout: Path) -> None:
    model = ir.load(layout)
    Int8Linears("dynamic")(model)
    first = next(node for node in model.graph if node.op_type == "DynamicQuantizeLinear")
    assert first.inputs[0] is model.graph.inputs[0]


def test_large_embedding_tables_are_int8_with_a_scale_a_row(tmp_path: Path) -> None:
    source, layout = text_tower(tmp_path / "text.onnx"), tmp_path / "text.ort.onnx"
    to_onnxruntime_layout(source, layout)
    model = ir.load(layout)
    Int8Linears("dynamic")(model)
    tables = [
        node.inputs[0]
        for node in model.graph
        if node.op_type == "Gather" and node.inputs[0] is not None
    ]
    assert any(table.dtype == ir.DataType.INT8 and table.shape == [3000, 32] for table in tables)
    feed = texts(3, 9)
    cosine = (run(save(model, tmp_path / "int8.onnx"), feed) * run(layout, feed)).sum(axis=1)
    assert cosine.min() > 0.995


def test_symmetric_activations_have_zero_point_zero(layout: Path) -> None:
    model = ir.load(layout)
    Int8Linears("qdq", wide_ranges(model), symmetric_activations=True)(model)
    quantizers = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert quantizers
    for node in quantizers:
        zero_point = node.inputs[2]
        assert zero_point is not None
        assert zero_point.const_value is not None
        assert zero_point.const_value.numpy() == 0
        assert zero_point.dtype == ir.DataType.INT8


def test_a_missing_range_is_named(layout: Path) -> None:
    model = ir.load(layout)
    ranges = wide_ranges(model)
    missing = next(reversed(ranges))
    del ranges[missing]
    with pytest.raises(QuantizationError, match=f"No calibrated range for '{missing}'"):
        Int8Linears("operators", ranges)(model)


def test_weights_that_are_not_finite_are_named(layout: Path) -> None:
    model = ir.load(layout)
    node = next(node for node in model.graph if node.op_type == "MatMul")
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    broken = weight.const_value.numpy().copy()
    broken[0, 0] = np.nan
    weight.const_value = ir.tensor(broken)
    with pytest.raises(QuantizationError, match=f"Weight '{weight.name}' holds NaN"):
        Int8Linears("dynamic")(model)


def test_a_graph_without_products_is_refused() -> None:
    value = ir.val("x", ir.DataType.FLOAT, [1])
    node = ir.node("Relu", [value])
    model = ir.Model(
        ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 20}), ir_version=10
    )
    with pytest.raises(QuantizationError, match="Nothing to quantize"):
        Int8Linears("dynamic")(model)
