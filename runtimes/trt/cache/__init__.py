"""The cache of TensorRT engines."""
