"""Layouts of a graph: the fastest operators for one runtime.

A pass is registered here, in the layout that it makes, and tests/converters/passes/
test_passes_contract.py runs over it.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from mmedge.converters.passes.attention import FuseAttention
from mmedge.converters.passes.batch_norm import FoldBatchNorm
from mmedge.converters.passes.patch_embedding import PatchEmbeddingAsMatMul
from mmedge.converters.passes.pooled_token import SelectTokenEarly
from mmedge.converters.passes.rms_norm import FuseRmsNorm
from mmedge.errors import ConversionError
from mmedge.files import storage_errors

__all__ = ["ONNXRUNTIME_PASSES", "PORTABLE_PASSES", "to_onnxruntime_layout"]

# In order, on what torch exported: standard operators still, so that every layout and precision
# holds the same weights.
PORTABLE_PASSES: tuple[type[ir.passes.PassBase], ...] = (
    FoldBatchNorm,
    PatchEmbeddingAsMatMul,
    SelectTokenEarly,
)

# In order, on the portable layout.
ONNXRUNTIME_PASSES: tuple[type[ir.passes.PassBase], ...] = (FuseAttention, FuseRmsNorm)


def to_onnxruntime_layout(model: Path, out: Path) -> None:
    """Write `model` in the fastest operators for ONNX Runtime.

    Unchanged weights are not copied: where `model` has them in external data,
    `out` refers to the same file, so `out` must lie in the same folder.

    Args:
        model: Portable ONNX file.
        out: ONNX file to write, in the folder of `model`.

    Raises:
        ConversionError: If a pass fails, or `out` is in another folder.
    """
    if out.absolute().parent != model.absolute().parent:
        raise ConversionError(
            f"Layout {out} must be in the folder of {model}, whose external data it shares."
        )
    graph = ir.load(model)
    try:
        result = ir.passes.Sequential(*(step() for step in ONNXRUNTIME_PASSES))(graph)
    except ir.passes.PassError as error:
        raise ConversionError(f"Cannot lay out {model} for ONNX Runtime: {error}.") from error
    with storage_errors(out):
        ir.save(result.model, out)
