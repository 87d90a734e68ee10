"""What a sample's batch neighbours do to its embedding in each kind of int8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from towers import image_tower, images

from mmedge.converters.methods.configs import DynamicInt8, QuantizationConfig, StaticInt8
from mmedge.converters.passes import to_onnxruntime_layout
from mmedge.converters.quantization.quantize import quantize
from mmedge.runtimes.backends import open_session


@pytest.mark.parametrize(("config", "depends"), [(StaticInt8(), False), (DynamicInt8(), True)])
def test_only_dynamic_scales_see_the_neighbours(
    config: QuantizationConfig, depends: bool, tmp_path: Path
) -> None:
    layout, out = tmp_path / "image.ort.onnx", tmp_path / "int8.onnx"
    to_onnxruntime_layout(image_tower(tmp_path / "image.onnx"), layout)
    quantize(layout, out, config, calibration=lambda: [images(8)])
    together = images(2)["pixel_values"]
    together[1] *= 4.0
    with open_session(out) as session:
        alone = session.run({"pixel_values": together[:1]})["embeds"][0]
        beside = session.run({"pixel_values": together})["embeds"][0]
    assert (np.abs(alone - beside).max() > 1e-4) == depends
