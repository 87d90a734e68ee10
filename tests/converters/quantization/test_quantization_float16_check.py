"""Checks of half precision that crash the engine: an error of the candidate, and no end of all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import pytest
from crashes import crash_on
from towers import image_tower, images

from mmedge.converters.methods.configs import StaticInt8
from mmedge.converters.passes.float16 import to_float16
from mmedge.converters.quantization.float16_check import require_agreement
from mmedge.converters.quantization.quantize import quantize
from mmedge.errors import BackendError
from mmedge.specs import Array


def feeds() -> Iterator[dict[str, Array]]:
    yield images(2, seed=50)


@pytest.fixture
def portable(tmp_path: Path) -> Path:
    return image_tower(tmp_path / "image.onnx")


@pytest.fixture(autouse=True)
def _crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written only to be measured ends its engine; what lies there before runs."""
    crash_on(".graph.*", tmp_path, monkeypatch)


def test_a_crash_in_the_check_of_fp16_is_an_error(portable: Path) -> None:
    half = portable.with_name("fp16.onnx")
    ir.save(to_float16(portable).model, half)
    before = sorted(path.name for path in portable.parent.iterdir())
    with pytest.raises(BackendError, match=r"^fp16.onnx: onnxruntime crashed \(SIGSEGV\)"):
        require_agreement(portable, half, feeds)
    assert sorted(path.name for path in portable.parent.iterdir()) == before


def test_a_crash_in_the_check_of_a_half_rest_is_an_error(portable: Path) -> None:
    config = StaticInt8(form="qdq", activations="int8", rest="float16")
    out = portable.with_name("int8.onnx")
    with pytest.raises(BackendError, match=r"onnxruntime crashed \(SIGSEGV\)"):
        quantize(portable, out, config, calibration=feeds)
    assert not out.exists()
