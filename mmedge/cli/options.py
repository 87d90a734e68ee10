"""Arguments and options shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

__all__ = [
    "BackendOption",
    "BundleArgument",
    "DeviceOption",
    "JsonOption",
    "PrecisionOption",
    "PrecisionsOption",
    "RolesOption",
    "check_target",
    "words",
]

BundleArgument: TypeAlias = Annotated[
    Path, typer.Argument(help="Bundle, NAME.mmedge.", show_default=False)
]
JsonOption: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RolesOption: TypeAlias = Annotated[
    str | None, typer.Option("--role", help="Roles, a,b,c.", show_default="all")
]
PrecisionOption: TypeAlias = Annotated[
    str | None, typer.Option(help="Precision or variant.", show_default="the bundle's")
]
DeviceOption: TypeAlias = Annotated[
    str | None, typer.Option(help="Device: cpu, cuda or cuda:N.", show_default="the best available")
]
BackendOption: TypeAlias = Annotated[
    str | None, typer.Option(help="Backend.", show_default="the fastest")
]
PrecisionsOption: TypeAlias = Annotated[
    str | None,
    typer.Option("--precision", help="Precisions or variants, a,b,c.", show_default="all"),
]


def words(option: str, text: str | None) -> tuple[str, ...] | None:
    """Return the values of "a,b,c", None if the option is not given.

    Args:
        option: Its name, for the message.
        text: Its value.

    Raises:
        typer.BadParameter: If a value is empty.
    """
    if text is None:
        return None
    values = tuple(word.strip() for word in text.split(","))
    if not all(values):
        raise typer.BadParameter(f"{option}: got {text!r}, expected values separated by commas.")
    return values


def check_target(target: str | None) -> None:
    """Check that --target names a backend that builds engines; None passes.

    Raises:
        typer.BadParameter: If it does not.
    """
    from mmedge.runtimes.backends import engine_backends

    if target is not None and target not in (names := engine_backends()):
        raise typer.BadParameter(f"--target: got {target!r}, expected {' or '.join(names)}.")
