"""Calibration and evaluation data: reading, checking, streaming, synthetic samples."""
