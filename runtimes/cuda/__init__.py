"""CUDA through cuda-python: memory, streams, arrays on the device."""
