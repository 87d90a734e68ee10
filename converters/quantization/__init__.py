"""Quantizing a graph, and choosing which layers to exclude."""
