"""Choosing a backend by measurement, and swapping engines."""

__all__: list[str] = []
