"""Sessions of bundle variants: opening, choice, verification, background builds."""

__all__: list[str] = []
