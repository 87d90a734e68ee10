"""Arithmetic of quantization: rounding, scales, distances."""

__all__: list[str] = []
