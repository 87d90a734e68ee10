"""Model sources: reading a folder or a hub repository safely."""

__all__: list[str] = []
