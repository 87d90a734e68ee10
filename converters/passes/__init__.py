"""Graph passes: one file a pass, each an onnx_ir model in and a PassResult out.

`to_onnxruntime_layout` brings a portable graph into the operators that ONNX Runtime runs fastest.
"""

from mmedge.converters.passes.layout import (
    ONNXRUNTIME_PASSES,
    PORTABLE_PASSES,
    to_onnxruntime_layout,
)

__all__ = ["ONNXRUNTIME_PASSES", "PORTABLE_PASSES", "to_onnxruntime_layout"]
