"""The layer report covers every layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import pytest
from towers import convolution_tower, image_tower, images, text_tower, texts

from mmedge.converters.methods.configs import DynamicInt8, Float16, StaticInt8
from mmedge.converters.passes.linears import find_linears
from mmedge.converters.quantization.layer_report import plan_layers
from mmedge.converters.quantization.quantize import quantize
from mmedge.specs import Array


def feeds() -> Iterator[dict[str, Array]]:
    return (images(3, seed=seed) for seed in range(3))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return image_tower(tmp_path / "image.onnx")


def test_every_linear_layer_is_reported_in_order(model: Path) -> None:
    graph = ir.load(model).graph
    layers = plan_layers(graph, ())
    assert [layer.name for layer in layers] == [linear.name for linear in find_linears(graph)]
    assert {layer.reason for layer in layers[:-1]} == {""}
    assert layers[-1].reason == "makes the embedding"


def test_a_table_is_a_layer(tmp_path: Path) -> None:
    layers = plan_layers(ir.load(text_tower(tmp_path / "text.onnx")).graph, ())
    (table,) = [layer for layer in layers if layer.op_type == "Gather"]
    assert table.shape == (3000, 32)
    assert (table.x, table.reason) == ("", "")


def test_a_convolution_stays_in_float_with_a_reason(tmp_path: Path) -> None:
    model = convolution_tower(tmp_path / "image.onnx")
    entries = quantize(model, tmp_path / "q.onnx", DynamicInt8())
    (patches,) = [entry for entry in entries if entry.op_type == "Conv"]
    assert patches.precision == "float32"
    assert patches.shape == (3 * 8 * 8, 32)
    assert "convolution" in patches.reason


def test_excluded_layers_have_a_reason_and_quantized_layers_figures(model: Path) -> None:
    keep = (find_linears(ir.load(model).graph)[2].name,)
    entries = quantize(model, model.with_name("q.onnx"), StaticInt8(keep=keep), calibration=feeds)
    by_name = {entry.name: entry for entry in entries}
    kept = by_name[keep[0]]
    assert (kept.precision, kept.low, kept.weight_error) == ("float32", None, None)
    assert kept.reason == "among the most sensitive layers"
    done = [entry for entry in entries if not entry.reason]
    assert len(done) == len(entries) - 2
    for entry in done:
        assert entry.precision == "int8"
        assert entry.low is not None
        assert entry.high is not None
        assert entry.low < entry.high
        assert entry.weight_error is not None
        assert 0 < entry.weight_error < 0.02


def test_dynamic_layers_have_no_range(tmp_path: Path) -> None:
    model = text_tower(tmp_path / "text.onnx")
    entries = quantize(
        model, tmp_path / "q.onnx", DynamicInt8(), calibration=lambda: iter([texts(2, 9)])
    )
    assert {entry.low for entry in entries} == {None}
    assert {entry.precision for entry in entries if not entry.reason} == {"int8"}


def test_fp16_is_described(model: Path) -> None:
    entries = quantize(model, model.with_name("q.onnx"), Float16(), calibration=feeds)
    assert {entry.precision for entry in entries if not entry.reason} == {"float16"}
