"""TensorRT and TensorRT for RTX: engines built from ONNX, kept in a cache, run without torch."""

__all__: list[str] = []
