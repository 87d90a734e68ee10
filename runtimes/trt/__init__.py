"""TensorRT and TensorRT for RTX: engines built from ONNX, cached, and run without torch."""

__all__: list[str] = []
