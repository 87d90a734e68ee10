"""`mmedge families`: the model families that can be converted."""

from __future__ import annotations

import ast
from pathlib import Path

import typer

from mmedge.cli.options import JsonOption

__all__ = ["families"]


def families(json: JsonOption = False) -> None:
    """List the model families that mmedge convert takes, those of other packages included."""
    from mmedge.cli.output import print_json, stdout_console
    from mmedge.cli.tables import table
    from mmedge.converters.families import offered

    found = {name: _summary(place.split(":")[0]) for name, place in sorted(offered().items())}
    if json:
        print_json([{"name": name, "summary": summary} for name, summary in found.items()])
        return
    stdout_console().print(table("family", "models", rows=found.items()))
    typer.echo("docs/sources.md says what each needs, docs/families.md what was tried.")


def _summary(module: str) -> str:
    """Return the first line of a module's docstring, without importing what it imports."""
    from importlib.util import find_spec

    try:
        spec = find_spec(module)
    except ImportError:
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return f"{module} (cannot be found)"
    tree = ast.parse(Path(spec.origin).read_bytes())
    return (ast.get_docstring(tree) or module).partition("\n")[0]
