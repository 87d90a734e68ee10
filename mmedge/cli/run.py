"""`mmedge run`: run a bundle on files and texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmedge.cli.options import (
    BackendOption,
    BundleArgument,
    DeviceOption,
    JsonOption,
    PrecisionOption,
)

if TYPE_CHECKING:
    from mmedge.models.running import Made
    from mmedge.specs import Array

__all__ = ["run"]

_SHOWN = 4  # numbers of a list


def run(  # noqa: PLR0913, PLR0917, one parameter an option
    bundle: BundleArgument,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image file.", show_default=False)
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text: to embed, a label, or a prompt.", show_default=False),
    ] = None,
    audio: Annotated[
        list[Path] | None, typer.Option(help="Audio file.", show_default=False)
    ] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="Video file.", show_default=False)
    ] = None,
    feed: Annotated[
        Path | None,
        typer.Option(help="Arrays by input of the graph, .npz.", show_default=False),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="embed, classify, complete, ...", show_default="what fits the inputs"),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Labels an image, at most.")] = 5,
    threshold: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Score of a detection.", show_default="the model's"),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Length of a generated text, in tokens.", show_default="up to 128"
        ),
    ] = None,
    precision: PrecisionOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Measure which backend is the fastest, once.",
            show_default="$MMEDGE_MEASURE, or yes",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the arrays too, .npz.", show_default="no"),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Run a bundle on images, texts, sounds, videos or arrays.

    Each of these options may be given several times. An image or video with texts is classified;
    an image alone gets the checkpoint's own labels, if it has any, and an embedding otherwise.
    A generator continues each text, and prints it as it comes.
    """
    import mmedge
    from mmedge.cli.output import print_json, print_pieces
    from mmedge.models.running import Given, Settings, chosen_run

    if output is not None and output.suffix != ".npz":
        raise typer.BadParameter(f"--output: got {output.name!r}, expected a name ending in .npz.")
    arrays = {} if feed is None else _arrays(feed)
    given = Given(image or (), text or (), audio or (), video or (), arrays)
    with mmedge.load(
        bundle, device=device, precision=precision, backend=backend, measure=measure
    ) as model:
        runs = model.runs
        name = chosen_run(runs, given, task)
        settings = Settings(k, threshold, max_new_tokens)
        stream = runs[name].stream
        if stream is not None and not json and output is None:
            print_pieces(stream(given, settings))
            return
        made = runs[name].call(given, settings)
    if output is not None:
        _write(output, made)
    if json:
        print_json({"bundle": str(bundle), "task": name, "results": [*map(dict, made.rows)]})
    else:
        _print(made)


def _arrays(path: Path) -> Mapping[str, Array]:
    from mmedge.errors import InputError
    from mmedge.files.npz_file import read_npz

    return read_npz(
        path, error=lambda why: InputError(f"{path}: {why}. Write it with numpy.savez.")
    )


def _write(path: Path, made: Made) -> None:
    from mmedge.errors import InputError
    from mmedge.files.npz_file import write_npz

    if not made.arrays:
        raise InputError(f"{path}: this task makes no arrays. Leave --output out.")
    write_npz(path, made.arrays)


def _print(made: Made) -> None:
    from mmedge.cli.output import stdout_console
    from mmedge.cli.tables import table

    if not made.rows:
        typer.echo("Nothing found.")
        return
    columns = tuple(made.rows[0])
    numbers = [name for name in columns if isinstance(made.rows[0][name], float)]
    rows = [[_cell(row[name]) for name in columns] for row in made.rows]
    stdout_console().print(table(*columns, numbers=numbers, rows=rows))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list):
        cells = [_cell(each) for each in value[:_SHOWN]]
        rest = f", ... ({len(value)})" if len(value) > _SHOWN else ""
        return ", ".join(cells) + rest
    return str(value)
