"""From a variant of a bundle to a session that runs."""

__all__: list[str] = []
