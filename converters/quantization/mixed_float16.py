"""fp16 for the non-quantized ops of a quantized graph, needed for TensorRT's fused attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from mmedge.bundle.differences import cosines
from mmedge.bundle.nodes import NodeEntry
from mmedge.converters.graphs.probe import written_beside
from mmedge.converters.graphs.worker import Worker, lent
from mmedge.converters.passes.float16 import to_float16
from mmedge.converters.quantization.float16_check import emulate_narrow_floats, require_agreement
from mmedge.converters.statistics.collect import Feeds
from mmedge.converters.statistics.peaks import collect_peaks
from mmedge.specs import Array

__all__ = ["narrow_float_ops", "report_narrowed"]

_CHECKED = 8
# Largest loss by float16. It is measured against float32: a value that it rounds to the other
# side of a quantization step moves by the whole step, so where quantization loses much, the two
# quantized graphs are as far from each other as from float32, and neither is wrong.
_MAX_DROP = 0.01
_COSINE_MIN = 0.99


def narrow_float_ops(
    model: ir.Model, source: Path, feeds: Feeds | None, worker: Worker | None = None
) -> ir.Model:
    """Return a quantized graph with fp16 for non-quantized ops, converted in place.

    With data, what overflows float16 is found by measuring, on this graph, whose values have names
    of their own, and the outputs must be as near to float32 as without fp16.

    Args:
        model: Portable graph whose quantized layers are Q/DQ around float32 products.
        source: Float32 file that it was made of; external data lies beside it.
        feeds: Calibration data, or None.
        worker: Where graphs run; None starts one.

    Raises:
        QuantizationError: If they are not; the first node that is off is named.
        BackendError: If ONNX Runtime refuses the graph, or crashes.
    """
    ShapeInferencePass()(model)  # peaks are measured of what is known to be float32
    if feeds is None:
        return to_float16(model).model
    data = feeds

    def few() -> Iterable[Mapping[str, Array]]:
        return islice(iter(data()), _CHECKED)

    folder = source.parent
    with lent(worker) as runs, written_beside(model, folder) as reference:
        narrow = to_float16(model, collect_peaks(reference, data, runs)).model
        with (
            written_beside(narrow, folder) as written,
            written_beside(emulate_narrow_floats(written), folder) as emulated,
        ):
            drop = _cosine(source, reference, few, runs) - _cosine(source, emulated, few, runs)
            if not drop <= _MAX_DROP:
                require_agreement(reference, written, few, cosine_min=_COSINE_MIN, worker=runs)
    return narrow


def _cosine(reference: Path, model: Path, feeds: Feeds, worker: Worker) -> float:
    """Return the mean cosine of the outputs of two graphs; NaN where one is not finite."""
    found: list[float] = []
    label = f"{reference.name}, quantized"
    with worker.open(reference, reference.name) as expects, worker.open(model, label) as candidate:
        for feed in feeds():
            expected, got = expects.run(feed), candidate.run(feed)
            for name, array in expected.items():
                rows = [
                    a.reshape(-1, array.shape[-1]).astype(np.float32) for a in (array, got[name])
                ]
                found.extend(cosines(*rows).tolist())
    return float(np.mean(found))


def report_narrowed(entries: Iterable[NodeEntry], model: ir.Model) -> tuple[NodeEntry, ...]:
    """Return entries that mark the excluded layers in float16."""
    held = model.graph.initializers
    narrow = {
        name.removesuffix(".weight")
        for name, value in held.items()
        if value.dtype == ir.DataType.FLOAT16
    }
    return tuple(
        entry.model_copy(update={"precision": "float16"})
        if entry.precision == "float32" and entry.name in narrow
        else entry
        for entry in entries
    )
