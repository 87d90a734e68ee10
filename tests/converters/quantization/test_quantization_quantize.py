"""Quantization from config to file, and the statistics behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from towers import image_tower, images

from mmedge.converters.methods.configs import (
    DynamicInt8,
    Float16,
    QuantizationConfig,
    StaticInt8,
    WeightOnly,
)
from mmedge.converters.passes import to_onnxruntime_layout
from mmedge.converters.passes.int8 import quantizable_inputs
from mmedge.converters.quantization.quantize import quantize
from mmedge.converters.statistics.collect import collect_ranges
from mmedge.errors import CalibrationError, QuantizationError
from mmedge.runtimes.backends import open_session
from mmedge.specs import Array


def run(model: Path, feed: dict[str, Array]) -> Array:
    with open_session(model) as session:
        return session.run(feed)["embeds"]


def feeds() -> Iterator[dict[str, Array]]:
    for seed in range(6):
        yield images(3, seed=100 + seed)


@pytest.fixture
def portable(tmp_path: Path) -> Path:
    return image_tower(tmp_path / "image.onnx")


@pytest.fixture
def layout(portable: Path) -> Path:
    out = portable.with_name("image.ort.onnx")
    to_onnxruntime_layout(portable, out)
    return out


@pytest.mark.parametrize(
    ("config", "floor", "weight_type"),
    [
        (DynamicInt8(), 0.995, ir.DataType.INT8),
        (StaticInt8(), 0.995, ir.DataType.INT8),
        (StaticInt8(ranges="percentile"), 0.99, ir.DataType.INT8),
        (StaticInt8(form="qdq"), 0.995, ir.DataType.INT8),
        (StaticInt8(form="qdq", activations="int8"), 0.99, ir.DataType.INT8),
        (Float16(), 0.99999, ir.DataType.FLOAT16),
    ],
    ids=str,
)
def test_each_method_keeps_the_embedding(
    config: QuantizationConfig,
    floor: float,
    weight_type: ir.DataType,
    portable: Path,
    layout: Path,
) -> None:
    source = portable if isinstance(config, Float16) else layout
    out = portable.with_name("quantized.onnx")
    quantize(source, out, config, calibration=feeds)
    feed = images(4)
    assert (run(out, feed) * run(portable, feed)).sum(axis=1).min() > floor
    model = ir.load(out)
    assert weight_type in {value.dtype for value in model.graph.initializers.values()}
    assert [value.dtype for value in (*model.graph.inputs, *model.graph.outputs)] == [
        ir.DataType.FLOAT
    ] * 2
    assert out.with_name("quantized.onnx.data").is_file()


def test_quantizing_twice_gives_the_same_bytes(layout: Path) -> None:
    first, second = layout.with_name("a") / "q.onnx", layout.with_name("b") / "q.onnx"
    for out in (first, second):
        out.parent.mkdir()
        quantize(layout, out, StaticInt8(), calibration=feeds)
    assert first.read_bytes() == second.read_bytes()
    assert Path(f"{first}.data").read_bytes() == Path(f"{second}.data").read_bytes()


def test_the_layer_with_more_bits_has_a_reason(layout: Path) -> None:
    entries = quantize(layout, layout.with_name("q.onnx"), WeightOnly(group_size=16))
    reasons = {entry.precision: entry.reason for entry in entries}
    assert reasons == {"int4": "", "int8": "makes the embedding"}


def test_static_int8_without_calibration_is_refused(layout: Path) -> None:
    with pytest.raises(CalibrationError, match="needs calibration data"):
        quantize(layout, layout.with_name("q.onnx"), StaticInt8())


def test_signed_operators_are_refused(layout: Path) -> None:
    with pytest.raises(QuantizationError, match="QDQ form only"):
        quantize(
            layout, layout.with_name("q.onnx"), StaticInt8(activations="int8"), calibration=feeds
        )


def test_an_unknown_config_is_refused(layout: Path) -> None:
    with pytest.raises(QuantizationError, match="got str"):
        quantize(layout, layout.with_name("q.onnx"), "int8")  # type: ignore[arg-type]


def test_minmax_is_the_extremes_over_all_the_data(layout: Path) -> None:
    model = ir.load(layout)
    names = quantizable_inputs(model)
    got = collect_ranges(layout, names, feeds)
    patches = names[0]  # the images themselves, rearranged
    everything = np.concatenate([feed["pixel_values"].ravel() for feed in feeds()])
    assert got[patches].low == pytest.approx(everything.min())
    assert got[patches].high == pytest.approx(everything.max())
    assert list(got) == names


def test_percentile_cuts_the_tails_off(layout: Path) -> None:
    def with_an_outlier() -> Iterator[dict[str, Array]]:
        yield from feeds()
        spike = images(1, seed=1)
        spike["pixel_values"][0, 0, 0, 0] = 500.0
        yield spike

    names = quantizable_inputs(ir.load(layout))[:1]
    whole = collect_ranges(layout, names, with_an_outlier)[names[0]]
    central = collect_ranges(layout, names, with_an_outlier, method="percentile")[names[0]]
    assert whole.high == 500.0
    assert central.high < 10.0
    assert central.low >= whole.low


def test_statistics_leave_no_file_behind(layout: Path) -> None:
    before = sorted(layout.parent.iterdir())
    collect_ranges(layout, quantizable_inputs(ir.load(layout)), feeds)
    assert sorted(layout.parent.iterdir()) == before


def test_no_calibration_data_is_an_error(layout: Path) -> None:
    with pytest.raises(CalibrationError, match="got 0 samples"):
        collect_ranges(layout, quantizable_inputs(ir.load(layout)), lambda: iter(()))


def test_an_activation_that_is_not_finite_is_named(layout: Path) -> None:
    def broken() -> Iterator[dict[str, Array]]:
        feed = images(1)
        feed["pixel_values"][0, 0, 0, 0] = np.nan
        yield feed

    names = quantizable_inputs(ir.load(layout))
    with pytest.raises(QuantizationError, match=f"Activation '{names[0]}' is NaN or infinite"):
        collect_ranges(layout, names, broken)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_value_that_is_not_finite_is_found_anywhere(value: float, layout: Path) -> None:
    """ONNX Runtime's ReduceMin and ReduceMax pass over a NaN unless it comes first."""
    names = quantizable_inputs(ir.load(layout))
    for place in (1, 777, -1):
        feed = images(2)
        feed["pixel_values"].reshape(-1)[place] = value
        with pytest.raises(QuantizationError, match="is NaN or infinite"):
            collect_ranges(layout, names[:1], lambda feed=feed: [feed])  # type: ignore[misc]


@pytest.mark.parametrize("value", [0.0, 3.0, 1e-42])
def test_an_activation_that_never_changes_has_no_tails(value: float, layout: Path) -> None:
    feed = {"pixel_values": np.full_like(images(2)["pixel_values"], value)}
    feed["pixel_values"][0, 0, 0, 0] = np.nextafter(np.float32(value), np.float32(9))
    names = quantizable_inputs(ir.load(layout))[:1]
    got = collect_ranges(layout, names, lambda: [feed], method="percentile")[names[0]]
    assert got.low == np.float32(value)
    assert got.high >= got.low


def test_weights_that_another_layout_holds_are_not_stored_again(
    portable: Path, layout: Path
) -> None:
    first, second = portable.with_name("first.onnx"), portable.with_name("second.onnx")
    quantize(layout, first, StaticInt8(), calibration=feeds)
    quantize(layout, second, StaticInt8(form="qdq"), calibration=feeds, share=first)
    assert not second.with_name("second.onnx.data").exists()
    assert second.stat().st_size < Path(f"{first}.data").stat().st_size
    feed = images(3)
    np.testing.assert_allclose(run(first, feed), run(second, feed), atol=1e-5)
