"""Arithmetic of quantization: rounding, scales, distances."""
