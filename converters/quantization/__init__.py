"""Quantizing a graph, and choosing which layers to exclude."""

__all__: list[str] = []
