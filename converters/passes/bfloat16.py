"""Conversion to bfloat16: the range of float32, so without overflow or calibration data.

TensorRT takes the graph unchanged. ONNX Runtime has hardly any bfloat16 CPU kernel and rejects
it ("Could not find an implementation for MatMul"); OpenVINO computes in bfloat16 on request, from
the float32 graph. So the variant exists in the portable layout only, and what it is worth is
measured on `emulate_bfloat16`: the same weights and roundings, each operator computed in float32.

Source: ONNX, IR specification, tensor element type BFLOAT16; Kalamkar et al. 2019, "A Study of
BFLOAT16 for Deep Learning Training".
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from mmedge.converters.passes.float16 import output_normalization
from mmedge.converters.passes.narrowing import ComputeInFloat32, NarrowFloats

__all__ = ["emulate_bfloat16", "to_bfloat16"]


def to_bfloat16(model: Path) -> ir.Model:
    """Return a portable float32 graph in bfloat16, inputs and outputs left in float32.

    The normalization of the embedding stays in float32: the cast to the output only comes earlier.

    Args:
        model: Portable ONNX file.

    Raises:
        QuantizationError: If the dtype of a value is not known; the value is named.
    """
    graph = ir.load(model)
    NarrowFloats(ir.DataType.BFLOAT16, output_normalization(graph.graph))(graph)
    return graph


def emulate_bfloat16(model: Path) -> ir.Model:
    """Return a bfloat16 graph that runs without bfloat16 kernels.

    Every operator computes in float32 from the bfloat16 weights and rounds what it gives. For
    measuring fidelity, never to be shipped: it is slower than float32.

    Args:
        model: ONNX file that `to_bfloat16` made. Save the result in its folder: the weights are
            read from its external data.
    """
    graph = ir.load(model)
    ComputeInFloat32(ir.DataType.BFLOAT16)(graph)
    return graph
