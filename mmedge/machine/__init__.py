"""Facts about this machine."""

__all__: list[str] = []
