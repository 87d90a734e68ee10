"""Calibration and evaluation data: reading, checking, streaming, synthetic samples."""

__all__: list[str] = []
