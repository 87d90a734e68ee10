"""Engines that are built ahead: what they are built of, and the cache that keeps them."""

__all__: list[str] = []
