"""Quantization methods: typed configs, and their names."""
