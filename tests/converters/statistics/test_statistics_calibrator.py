"""Statistics are collected once, and nothing that was written on the way is left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import pytest
from towers import image_tower, images

from mmedge.converters.methods.configs import DynamicInt8, Equalization, StaticInt8
from mmedge.converters.passes.int8 import quantizable_inputs
from mmedge.converters.quantization.quantize import quantize
from mmedge.converters.statistics.calibrator import Calibrator
from mmedge.converters.variants.builder import lay_out
from mmedge.runtimes.backends import open_session
from mmedge.specs import Array


class Data:
    """A stream that counts how often it was started."""

    def __init__(self) -> None:
        self.readings = 0

    def __call__(self) -> Iterator[dict[str, Array]]:
        self.readings += 1
        return (images(3, seed=100 + seed) for seed in range(4))


@pytest.fixture
def data() -> Data:
    return Data()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return image_tower(tmp_path / "image.onnx")


@pytest.fixture
def names(model: Path) -> list[str]:
    return list(quantizable_inputs(ir.load(model)))


def test_ranges_are_collected_once_a_method(model: Path, names: list[str], data: Data) -> None:
    calibrator = Calibrator(data)
    some = calibrator.ranges(model, names[:2], "minmax", symmetric=False)
    once = data.readings
    assert calibrator.ranges(model, names[:2], "minmax", symmetric=False) == some
    assert data.readings == once
    everything = calibrator.ranges(model, names, "minmax", symmetric=False)
    assert {name: everything[name] for name in names[:2]} == some
    assert list(everything) == names
    assert data.readings > once
    more = data.readings
    calibrator.ranges(model, names, "percentile", symmetric=False)
    assert data.readings == more + 1  # the extremes are known


def test_channels_and_peaks_are_collected_once(model: Path, names: list[str], data: Data) -> None:
    calibrator = Calibrator(data)
    channels, peaks = calibrator.channels(model, names), calibrator.peaks(model)
    once = data.readings
    assert calibrator.channels(model, names[:1])[names[0]] is channels[names[0]]
    assert calibrator.peaks(model) is peaks
    assert data.readings == once


def test_an_equalized_graph_is_made_once_and_goes_with_the_calibrator(
    model: Path, data: Data
) -> None:
    before = set(model.parent.iterdir())
    calibrator = Calibrator(data)
    made = calibrator.equalized(model, Equalization(0.5), "uint8")
    once = data.readings
    assert calibrator.equalized(model, Equalization(0.5), "uint8") == made
    assert data.readings == once
    assert calibrator.equalized(model, Equalization(0.25), "uint8") != made
    feed = images(2)
    with open_session(model) as plain, open_session(made) as scaled:
        expected, got = plain.run(feed)["embeds"], scaled.run(feed)["embeds"]
    assert abs(expected - got).max() < 1e-5
    calibrator.close()
    assert set(model.parent.iterdir()) == before
    calibrator.close()


def test_variants_of_one_graph_share_their_statistics(model: Path, data: Data) -> None:
    calibrator = Calibrator(data)
    out = model.with_name("q.onnx")
    quantize(model, out, StaticInt8(), calibration=calibrator)
    once = data.readings
    quantize(model, out, StaticInt8(form="qdq"), calibration=calibrator)
    quantize(model, out, DynamicInt8(), calibration=calibrator)
    assert data.readings == once


def test_layouts_of_one_role_share_their_statistics(model: Path, names: list[str]) -> None:
    layouts = lay_out(model)
    fused = layouts["onnxruntime"]
    assert quantizable_inputs(ir.load(fused)) == names
    corrected = StaticInt8(bias_correction=True)
    cut = StaticInt8("qdq", "int8", "mse", equalization=Equalization(0.5))
    for config in (corrected, cut):
        data = Data()
        calibrator = Calibrator(data, layouts.values())
        quantize(model, model.with_name("q.onnx"), config, calibration=calibrator)
        once = data.readings
        quantize(fused, model.with_name("q2.onnx"), config, calibration=calibrator)
        assert data.readings == once
        calibrator.close()
    shared = calibrator.ranges(model, names, "minmax", symmetric=False)
    assert calibrator.ranges(fused, names, "minmax", symmetric=False) == shared
    alone = Calibrator(Data()).ranges(fused, names, "minmax", symmetric=False)
    for name in names:
        assert shared[name].low == pytest.approx(alone[name].low, rel=1e-5, abs=1e-6)
        assert shared[name].high == pytest.approx(alone[name].high, rel=1e-5, abs=1e-6)


def test_other_graphs_share_nothing(model: Path, names: list[str], data: Data) -> None:
    calibrator = Calibrator(data, [model])
    calibrator.ranges(model, names, "minmax", symmetric=False)
    once = data.readings
    other = image_tower(model.with_name("other.onnx"), seed=3)
    calibrator.ranges(other, names, "minmax", symmetric=False)
    assert data.readings == once + 1


def test_quantize_cleans_up_after_a_calibrator_of_its_own(model: Path, data: Data) -> None:
    before = {path.name for path in model.parent.iterdir()}
    config = DynamicInt8(equalization=Equalization(0.5))
    quantize(model, model.with_name("q.onnx"), config, calibration=data)
    after = {path.name for path in model.parent.iterdir()}
    assert after == before | {"q.onnx", "q.onnx.data"}
