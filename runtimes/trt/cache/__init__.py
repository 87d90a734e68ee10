"""The cache of TensorRT engines."""

__all__: list[str] = []
