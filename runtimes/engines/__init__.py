"""Engines built ahead of time: requests, records, and the engine cache."""

__all__: list[str] = []
