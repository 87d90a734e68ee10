"""The search for a precision."""

__all__: list[str] = []
