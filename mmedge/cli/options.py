"""Values of options that several commands read alike."""

from __future__ import annotations

import typer

__all__ = ["words"]


def words(option: str, text: str | None) -> tuple[str, ...] | None:
    """Return the values of "a,b,c", None where nothing was given.

    Args:
        option: For the message.
        text: What was given.

    Raises:
        typer.BadParameter: If a value is empty.
    """
    if text is None:
        return None
    values = tuple(word.strip() for word in text.split(","))
    if not all(values):
        raise typer.BadParameter(f"{option}: got {text!r}, expected values with commas between.")
    return values
