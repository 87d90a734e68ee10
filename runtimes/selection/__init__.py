"""Backend selection by measurement, and hot swap of engines."""

__all__: list[str] = []
