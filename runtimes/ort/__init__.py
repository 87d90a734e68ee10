"""The ONNX Runtime backend."""

__all__: list[str] = []
