"""The table of an engine's layers, and what was folded to float."""

from __future__ import annotations

import json

import pytest

from mmedge.errors import EngineBuildError
from mmedge.runtimes.engines.spec import EngineLayer, count_precisions
from mmedge.runtimes.trt.layers import check_precision, folded, parse_inspection, parse_layers

# As TensorRT-RTX 1.7 lists them, shortened.
MESSAGE = """Layers:
Name: __shape_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , \
StreamId: 0, Metadata: \

Name: cast_0, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [-1,16], Datatype: Float, \
Format: (Linear) Row major linear format }], Constants: [ { Name: s, Dimensions: [1], \
Datatype: Half, Format: (Linear) Row major linear format }], Outputs: [ { Name: q, \
Dimensions: [-1,16], Datatype: Int8, Format: (Linear) Row major linear format }], \
TacticName: cast_0xabc, StreamId: 0, Metadata: [ONNX Layer: cast][ONNX Layer: quantize]
Name: product_a+product_b, LayerType: gemm, Inputs: [ { Name: q, Dimensions: [-1,16], \
Datatype: Int8, Format: (Linear) Row major linear format }], Constants: [ { Name: w, \
Dimensions: [16,32], Datatype: Int8, Format: (Linear) Row major linear format }, { Name: alpha, \
Dimensions: [1], Datatype: Float, Format: (Linear) Row major linear format }], Outputs: [ { \
Name: y, Dimensions: [-1,32], Datatype: Half, Format: (Linear) Row major linear format }], \
TacticName: stub, StreamId: 0, Metadata: [ONNX Layer: product_a]\x1e[ONNX Layer: product_b]

I/O Tensors:
 Name: x, IOMode: Input, DataType: Float, Dimensions: [-1,16], Location: Device
"""
PRODUCTS = ("product_a", "product_b")
TABLE = (
    EngineLayer("__shape_0", "shape_call", (), ()),
    EngineLayer(
        "cast_0", "kgen", ("fp32",), ("int8",), "cast_0xabc", ("fp16",), ("cast", "quantize")
    ),
    EngineLayer(
        "product_a+product_b", "gemm", ("int8",), ("fp16",), "stub", ("int8", "fp32"), PRODUCTS
    ),
)


def test_layers_are_parsed_from_the_builders_log() -> None:
    assert parse_layers(MESSAGE) == TABLE
    for empty in ("", "Layers:\n", "Engine Layer Information:\nLayer(CONV): a"):
        assert parse_layers(empty) == ()


# What the inspectors of two versions report differently of one layer.
OLD = {
    "Inputs": [{"Format/Datatype": "Thirty-two wide channel vectorized row major Int8"}],
    "Outputs": [{"Format/Datatype": "Channel major FP16 format"}],
    "Bias": {"Type": "Float", "Count": 0},
    "Metadata": "[ONNX Layer: conv_1]\x1e[ONNX Layer: relu_2]",
}
NEW = {
    "Inputs": [{"DataType": "Int8", "Format": "kCHW32"}],
    "Outputs": [{"DataType": "Half", "Format": "kHWC8"}],
    "Metadata": "[ONNX Layer: conv_1][ONNX Layer: relu_2]",
}


@pytest.mark.parametrize("reported", [OLD, NEW], ids=["10.x", "11.x"])
def test_layers_are_parsed_from_the_inspectors_report(reported: dict[str, object]) -> None:
    layer = reported | {"Name": "conv", "LayerType": "CaskConvolution", "TacticName": "sm80_xmma"}
    layer["Weights"] = {"Type": "Int8", "Count": 432}
    found = parse_inspection(json.dumps({"Layers": [layer, "a name alone"], "Bindings": ["x"]}))
    nodes = ("conv_1", "relu_2")
    assert found == (
        EngineLayer("conv", "CaskConvolution", ("int8",), ("fp16",), "sm80_xmma", ("int8",), nodes),
        EngineLayer("a name alone", "", (), ()),
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"Layers": [3]}', '{"Bindings": []}'])
def test_an_unknown_report_gives_no_layers(text: str) -> None:
    assert parse_inspection(text) == ()


@pytest.mark.parametrize(
    ("reported", "dtype"),
    [
        *((name, name.lower()) for name in ("Int4", "UInt8", "Int8", "Int32", "Int64", "Bool")),
        ("Float", "fp32"),
        ("Row major linear FP32", "fp32"),
        ("Half", "fp16"),
        ("BFloat16", "bf16"),
        ("FP8", "fp8"),
        ("E4M3", "fp8"),
        ("E8M0", "e8m0"),
    ],
)
def test_dtype_names_of_the_library(reported: str, dtype: str) -> None:
    layer = {"Name": "a", "Inputs": [{"DataType": reported}]}
    assert parse_inspection(json.dumps({"Layers": [layer]}))[0].inputs == (dtype,)


def test_a_layer_computes_in_the_dtype_that_it_reads() -> None:
    assert [layer.precision for layer in TABLE] == ["", "fp32", "int8"]
    assert count_precisions(TABLE) == {"fp32": 1, "int8": 1}
    weight_only = EngineLayer("fc", "fusion", ("fp16",), ("fp16",), "", ("int4", "fp16"))
    assert weight_only.precision == "int4"


def test_warnings_about_nodes_that_were_folded_to_float() -> None:
    expected = dict.fromkeys(PRODUCTS, "int8")
    assert folded(TABLE, expected) == {}
    assert check_precision(TABLE, expected) == check_precision(TABLE, {}) == ()
    warning = "1 of 2 nodes in int8 run in float: 'lost'."
    assert check_precision(TABLE, {"product_a": "int8", "lost": "int8"}) == (warning,)
    (unknown,) = check_precision((), {"product": "int8"})
    assert "whether int8 is used is unknown" in unknown


def test_a_dtype_folded_in_every_node_is_an_error() -> None:
    with pytest.raises(EngineBuildError, match="has 1 nodes in fp8"):
        check_precision(TABLE, {"product_a": "int8", "other": "fp8"})
    dequantized = EngineLayer("d", "kgen", (), ("fp16",), "", ("int8",), ("weight",))
    product = EngineLayer("p", "gemm", ("fp16", "fp16"), ("fp16",), "", (), ("product",))
    with pytest.raises(EngineBuildError, match=r"1 nodes in int8.*'product'.*quantization\.md"):
        check_precision((dequantized, product), {"product": "int8"})
