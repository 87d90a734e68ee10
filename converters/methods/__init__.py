"""Quantization methods: typed configs, and their names."""

__all__: list[str] = []
