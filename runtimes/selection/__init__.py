"""Choosing a backend by measurement, and swapping engines."""
