"""ONNX Runtime's own int8 methods, as the benchmarks' peers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from mmedge.specs import Array

__all__ = ["FeedReader", "write_dynamic", "write_static"]

Feed = dict[str, Array]


class FeedReader(CalibrationDataReader):  # type: ignore[misc]
    """Calibration feeds, one at a time."""

    def __init__(self, feeds: Iterable[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        """Return the next feed."""
        return next(self._feeds, None)


# Per channel and signed weights: the best that its own options give on this CPU.


def write_dynamic(model: Path, out: Path) -> None:
    """Quantize weights, and activations in each call."""
    quantize_dynamic(
        model,
        out,
        per_channel=True,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],  # ConvInteger is slower than Conv
    )


def write_static(model: Path, out: Path, feeds: Iterable[Feed]) -> None:
    """Quantize with ranges from calibration feeds: QDQ, unsigned activations."""
    quantize_static(
        model,
        out,
        FeedReader(feeds),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
