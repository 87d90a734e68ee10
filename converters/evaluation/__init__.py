"""Fidelity of variants: metrics, intervals and neighbours."""

__all__: list[str] = []
