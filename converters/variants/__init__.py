"""Making, measuring and describing variants."""

__all__: list[str] = []
