"""The table of an engine's layers, and what was folded to float."""

from __future__ import annotations

import json

import pytest

from mmedge.errors import EngineBuildError
from mmedge.runtimes.engines.spec import EngineLayer, count_precisions
from mmedge.runtimes.trt.layers import (
    check_precision,
    folded,
    parse_inspection,
    parse_layers,
)

# As TensorRT-RTX 1.7 lists them, cut short.
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
TABLE = (
    EngineLayer("__shape_0", "shape_call", (), ()),
    EngineLayer(
        "cast_0", "kgen", ("fp32",), ("int8",), "cast_0xabc", ("fp16",), ("cast", "quantize")
    ),
    EngineLayer(
        "product_a+product_b",
        "gemm",
        ("int8",),
        ("fp16",),
        "stub",
        ("int8", "fp32"),
        ("product_a", "product_b"),
    ),
)


def test_what_the_builder_lists_becomes_a_table() -> None:
    assert parse_layers(MESSAGE) == TABLE


@pytest.mark.parametrize("text", ["", "Layers:\n", "Engine Layer Information:\nLayer(CONV): a"])
def test_nothing_told_is_no_table(text: str) -> None:
    assert parse_layers(text) == ()


# The same engine, by the inspectors of two versions.
OLD = [
    {
        "Name": "conv",
        "LayerType": "CaskConvolution",
        "Inputs": [
            {"Name": "x", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8"}
        ],
        "Outputs": [{"Name": "y", "Format/Datatype": "Channel major FP16 format"}],
        "Weights": {"Type": "Int8", "Count": 432},
        "Bias": {"Type": "Float", "Count": 0},
        "TacticName": "sm80_xmma",
        "Metadata": "[ONNX Layer: conv_1]\x1e[ONNX Layer: relu_2]",
    },
    "a name alone",
]
NEW = [
    {
        "Name": "conv",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "DataType": "Int8", "Format": "kCHW32"}],
        "Outputs": [{"Name": "y", "DataType": "Half", "Format": "kHWC8"}],
        "Weights": {"Type": "Int8", "Count": 432},
        "TacticName": "sm80_xmma",
        "Metadata": "[ONNX Layer: conv_1][ONNX Layer: relu_2]",
    },
    "a name alone",
]


@pytest.mark.parametrize("layers", [OLD, NEW], ids=["10.x", "11.x"])
def test_what_the_inspector_says_becomes_the_same_table(layers: list[object]) -> None:
    found = parse_inspection(json.dumps({"Layers": layers, "Bindings": ["x", "y"]}))
    assert found == (
        EngineLayer(
            "conv",
            "CaskConvolution",
            ("int8",),
            ("fp16",),
            "sm80_xmma",
            ("int8",),
            ("conv_1", "relu_2"),
        ),
        EngineLayer("a name alone", "", (), ()),
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"Layers": [3]}', '{"Bindings": []}'])
def test_an_inspector_that_says_something_else_gives_no_table(text: str) -> None:
    assert parse_inspection(text) == ()


@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        ("Float", "fp32"),
        ("Row major linear FP32", "fp32"),
        ("Half", "fp16"),
        ("BFloat16", "bf16"),
        ("FP8", "fp8"),
        ("E4M3", "fp8"),
        ("Int4", "int4"),
        ("UInt8", "uint8"),
        ("Int8", "int8"),
        ("Int32", "int32"),
        ("Int64", "int64"),
        ("Bool", "bool"),
        ("E8M0", "e8m0"),
    ],
)
def test_the_words_of_the_library_are_understood(words: str, dtype: str) -> None:
    layer = {"Name": "a", "Inputs": [{"DataType": words}]}
    assert parse_inspection(json.dumps({"Layers": [layer]}))[0].inputs == (dtype,)


def test_a_layer_computes_in_the_dtype_that_it_reads() -> None:
    shape, quantize, product = TABLE
    assert (shape.precision, quantize.precision, product.precision) == ("", "fp32", "int8")
    weight_only = EngineLayer("fc", "fusion", ("fp16",), ("fp16",), "", ("int4", "fp16"))
    assert weight_only.precision == "int4"
    assert count_precisions(TABLE) == {"fp32": 1, "int8": 1}


def test_products_in_codes_are_what_was_asked_for() -> None:
    asked = {"product_a": "int8", "product_b": "int8"}
    assert folded(TABLE, asked) == {}
    assert check_precision(TABLE, asked) == ()
    assert check_precision(TABLE, {}) == ()


def test_all_in_float_is_an_error_that_names_nodes() -> None:
    dequantized = EngineLayer("d", "kgen", (), ("fp16",), "", ("int8",), ("weight",))
    product = EngineLayer("p", "gemm", ("fp16", "fp16"), ("fp16",), "", (), ("product",))
    with pytest.raises(EngineBuildError, match=r"asks for int8 in 1 nodes.*'product'") as caught:
        check_precision((dequantized, product), {"product": "int8"})
    assert "docs/quantization.md" in str(caught.value)


def test_some_in_float_is_told() -> None:
    asked = {"product_a": "int8", "lost": "int8"}
    assert check_precision(TABLE, asked) == ("1 of 2 nodes in int8 run in float: 'lost'.",)


def test_each_dtype_must_be_there() -> None:
    with pytest.raises(EngineBuildError, match="asks for fp8 in 1 nodes"):
        check_precision(TABLE, {"product_a": "int8", "other": "fp8"})


def test_without_a_table_nothing_is_claimed() -> None:
    (doubt,) = check_precision((), {"product": "int8"})
    assert "whether int8 is used is unknown" in doubt
