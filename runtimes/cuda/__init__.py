"""CUDA through cuda-python: memory, streams, arrays on the device."""

__all__: list[str] = []
