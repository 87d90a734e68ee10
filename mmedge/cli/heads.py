"""`mmedge heads`: heads on the taps of encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["heads"]

heads = typer.Typer(no_args_is_help=True, help="Add heads to a bundle; teach labels by example.")


@heads.command()
def add(
    bundle: Annotated[Path, typer.Argument(help="Bundle of the encoders.", show_default=False)],
    head: Annotated[Path, typer.Argument(help="Bundle of the head.", show_default=False)],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Bundle to write, NAME.mmedge.", show_default=False)
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Overwrite an existing bundle.")
    ] = False,
) -> None:
    """Write a bundle that holds encoders and a head on them."""
    from mmedge.bundle.joining import add_head
    from mmedge.cli.output import plain, stdout_console

    manifest = add_head(bundle, head, out, overwrite=overwrite)
    stdout_console().print(plain(f"{out} written: {', '.join(manifest.roles)}."))
