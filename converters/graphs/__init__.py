"""Exporting graphs and running them in a worker."""

__all__: list[str] = []
