"""Activation statistics, collected inside the graph."""

__all__: list[str] = []
