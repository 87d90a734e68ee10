"""Energy counters."""

__all__: list[str] = []
