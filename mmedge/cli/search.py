"""`mmedge search`: find items of an index by a text, an image or a sound."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmedge.cli.options import BackendOption, JsonOption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmedge.retrieval.items import Match

__all__ = ["search"]

_HIDDEN = {"modified_ns", "size_bytes"}


def search(  # noqa: PLR0913, PLR0917, one parameter an option
    place: Annotated[
        Path, typer.Argument(metavar="INDEX", help="Index, NAME.index.", show_default=False)
    ],
    text: Annotated[
        str | None, typer.Argument(help="What to look for.", show_default=False)
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Image that hits are like; with a text, like both.", show_default=False),
    ] = None,
    audio: Annotated[
        list[Path] | None, typer.Option(help="Sound that hits are like.", show_default=False)
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of hits.")] = 10,
    where: Annotated[
        str | None,
        typer.Option(
            help="Filter, e.g. 'time > 2026-01-01 and tag = \"kitchen\"'.", show_default="none"
        ),
    ] = None,
    unlike: Annotated[
        list[str] | None, typer.Option(help="Text that hits are not like.", show_default="none")
    ] = None,
    word: Annotated[
        str | None,
        typer.Option("--words", help="Words of the items' texts, fused.", show_default="none"),
    ] = None,
    distinct: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Leave out near-duplicates: cosine.",
            show_default="none",
        ),
    ] = None,
    recall: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Recall of an approximate search.")
    ] = 0.95,
    model: Annotated[
        Path | None,
        typer.Option("--model", "-m", help="Bundle.", show_default="the one of the index"),
    ] = None,
    backend: BackendOption = None,
    sheet: Annotated[
        Path | None,
        typer.Option(help="Write a contact sheet of the hits, a .png.", show_default="no"),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Search an index, best hits first."""
    from mmedge.cli.output import print_json
    from mmedge.retrieval.filter_text import parse_filter
    from mmedge.retrieval.index import Index
    from mmedge.retrieval.queries import Query

    if not text and not image and not audio:
        raise typer.BadParameter("Nothing to look for: give a text, --image or --audio.")
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise typer.BadParameter(f"--sheet: got {sheet.name!r}, expected a name ending in .png.")
    condition = None if where is None else parse_filter(where)
    with Index.open(place, bundle=model, backend=backend, read_only=True) as opened:
        sounds = [opened.embed(audio=sound)[0] for sound in audio or ()]
        query = Query(
            [*([text] if text else []), *(image or ()), *sounds], unlike or (), words=word
        )
        matches = opened.search(query, k, where=condition, recall=recall, distinct=distinct)
    if sheet is not None:
        from mmedge.cli.sheet import write_sheet

        named = [path.name for path in (*(image or ()), *(audio or ()))]
        title = " + ".join([text, *named] if text else named)
        write_sheet(sheet, title, matches)
    if json:
        print_json({"index": str(place), "matches": [_document(match) for match in matches]})
    else:
        _print(matches)


def _document(match: Match) -> dict[str, object]:
    return {
        "id": match.id,
        "score": match.score,
        "time": match.time,
        "source": match.source,
        "text": match.text,
        "part": match.part,
        "metadata": dict(match.metadata),
    }


def _print(matches: Sequence[Match]) -> None:
    from mmedge.cli.output import stdout_console
    from mmedge.cli.tables import table

    if not matches:
        typer.echo("No hits.")
        return
    heads = {"score": "score", "id": "id", "time": "time", "text": "text", "metadata": "metadata"}
    rows = [
        (f"{match.score:.3f}", match.id, _minute(match.time), match.text or "", _fields(match))
        for match in matches
    ]
    kept = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    shown = table(
        *(list(heads)[i] for i in kept),
        numbers=("score",),
        rows=[[row[i] for i in kept] for row in rows],
    )
    stdout_console().print(shown)


def _minute(time: float | None) -> str:
    from datetime import datetime, timezone

    if time is None:
        return ""
    try:
        return datetime.fromtimestamp(time, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, OSError, ValueError):
        return f"{time:g}"


def _fields(match: Match) -> str:
    shown = {name: value for name, value in match.metadata.items() if name not in _HIDDEN}
    return ", ".join(
        f"{name}={'/'.join(value) if isinstance(value, list) else value}"
        for name, value in shown.items()
        if value not in (None, [], "")
    )
