"""Command registry and entry point."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

__all__ = ["app", "run"]

# One line per command: the module mmedge.cli.NAME holds its function NAME, or a Typer of that name
# the command has commands of its own. The modules are imported for their help texts, so whatever is
# heavy is imported inside their functions.
_COMMANDS = (
    "build",
    "cache",
    "chat",
    "convert",
    "doctor",
    "export",
    "families",
    "heads",
    "index",
    "inspect",
    "profile",
    "run",
    "search",
    "serve",
    "verify",
)


class _InterruptedRunError(Exception):
    """Carries a KeyboardInterrupt past typer, which would exit without a message."""


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401, typer's Context has moved between releases
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _InterruptedRunError from error


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"mmedge {version('mmedge')}")
        raise typer.Exit


app = typer.Typer(
    name="mmedge",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _mmedge(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Convert multimodal PyTorch models, run them on edge devices, and measure both.

    A bundle (NAME.mmedge) is what passes from workstation to device. MMEDGE_TRACEBACK=1 shows
    where an error came from.
    """


for _name in _COMMANDS:
    _command = getattr(importlib.import_module(f"mmedge.cli.{_name}"), _name)
    if isinstance(_command, typer.Typer):
        app.add_typer(_command, name=_name)
    else:
        app.command(_name)(_command)


def _unfold(command: Any) -> None:  # noqa: ANN401, typer's Command has moved between releases
    """Join each paragraph of the help texts into one line: typer keeps docstring line breaks."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    command.help = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
    for inner in getattr(command, "commands", {}).values():
        _unfold(inner)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return the exit code; usage errors exit by themselves with 2.

    Raises:
        KeyboardInterrupt: If it was interrupted.
        MmedgeError: Whatever the command raises.
    """
    command = typer.main.get_command(app)
    _unfold(command)
    try:
        command.main(args=None if arguments is None else list(arguments), prog_name="mmedge")
    except _InterruptedRunError as error:
        raise KeyboardInterrupt(*(error.__cause__.args if error.__cause__ else ())) from error
    except SystemExit as done:
        if done.code is None or isinstance(done.code, int):
            return done.code or 0
        raise
    return 0
