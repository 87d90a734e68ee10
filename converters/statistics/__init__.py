"""Activation statistics, collected inside the graph."""
