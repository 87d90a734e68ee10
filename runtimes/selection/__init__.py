"""Choosing a backend by measurement, and hot swaps of engines."""

__all__: list[str] = []
