"""`mmedge index`: make and keep an index of images, sounds and ready vectors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from mmedge.cli.indexing import add_folder, add_frames, add_vectors, open_or_create
from mmedge.cli.options import BackendOption, JsonOption

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmedge.retrieval.stats import IndexStats, SegmentStats
    from mmedge.retrieval.sync import Synced

__all__ = ["index"]

IndexArgument: TypeAlias = Annotated[
    Path, typer.Argument(metavar="INDEX", help="Index, NAME.index.", show_default=False)
]
ModelOption: TypeAlias = Annotated[
    Path | None,
    typer.Option("--model", "-m", help="Bundle.", show_default="the one of the index"),
]

index = typer.Typer(
    no_args_is_help=True,
    help="Make, update, check, export and synchronise an index.",
)

_QUERIES_BYTES = 1 << 20


@index.command()
def add(  # noqa: PLR0913, PLR0917, one parameter an option
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of images and sounds; videos; recordings (.mcap, .bag, ROS 2 bags); "
            ".npz, .npy, .parquet or .arrow files of vectors.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Index, NAME.index; made if missing.", show_default=False
        ),
    ],
    model: ModelOption = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Precision or variant of the bundle.", show_default="the default"),
    ] = None,
    backend: BackendOption = None,
    topic: Annotated[
        str | None,
        typer.Option(help="Image topic of a recording.", show_default="the only one"),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="Prefix of a folder's ids.", show_default="the folder's name"),
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove items whose file is gone from its folder.")
    ] = False,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Batch size.", show_default="the bundle's")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Threads that decode files.", show_default="one per CPU"),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Add what is new or changed. Unchanged files are skipped, so an interrupted run resumes."""
    from mmedge.cli.output import print_json
    from mmedge.errors import InputError
    from mmedge.media.recordings import is_recording
    from mmedge.media.vectors import VECTOR_SUFFIXES
    from mmedge.preprocess.video_file import VIDEO_SUFFIXES

    for source in sources:
        if not source.exists():
            raise InputError(f"{source}: no such file or folder. Check the path.")
        suffix = source.suffix.lower()
        known = VECTOR_SUFFIXES | VIDEO_SUFFIXES
        if not source.is_dir() and suffix not in known and not is_recording(source):
            raise InputError(
                f"{source}: got {suffix or 'a file without suffix'}, expected a folder of images "
                f"and sounds, a recording (.mcap, .bag), or one of {', '.join(sorted(known))}."
            )
    ready = {source for source in sources if source.suffix.lower() in VECTOR_SUFFIXES}
    documents = []
    with open_or_create(
        output, model, precision, backend, [each for each in sources if each in ready]
    ) as opened:
        for source in sources:
            if source in ready:
                document = add_vectors(opened, source, as_json=json)
            elif is_recording(source) or source.is_file():
                document = add_frames(
                    opened, source, topic=topic, batch=batch, workers=workers, as_json=json
                )
            else:
                document = add_folder(
                    opened,
                    source,
                    prefix=prefix,
                    prune=prune,
                    batch=batch,
                    workers=workers,
                    as_json=json,
                )
            documents.append({"source": str(source), **document})
        items = len(opened)
    if json:
        print_json({"index": str(output), "items": items, "sources": documents})
    else:
        from mmedge.cli.output import plain

        typer.echo(plain(f"{output}: {items} items"))


@index.command("import")
def import_(
    place: IndexArgument,
    sources: Annotated[
        list[Path],
        typer.Argument(help=".npz, .npy, .parquet or .arrow files.", show_default=False),
    ],
    json: JsonOption = False,
) -> None:
    """Import files of vectors, made by export or by other programs. The index is made if missing.

    An id that is there already is replaced, unless the file's revision is older.
    """
    from mmedge.cli.output import print_json
    from mmedge.media.vectors import open_vectors

    for source in sources:
        open_vectors(source)  # mistakes first
    with open_or_create(place, None, None, None, sources) as opened:
        documents = [
            {"source": str(source), **add_vectors(opened, source, as_json=json)}
            for source in sources
        ]
    if json:
        print_json({"index": str(place), "sources": documents})


@index.command()
def export(
    place: IndexArgument,
    output: Annotated[
        Path, typer.Argument(help="File to write: .npz or .parquet.", show_default=False)
    ],
    json: JsonOption = False,
) -> None:
    """Export all items with their vectors to a file."""
    from mmedge.cli.output import plain, print_json
    from mmedge.retrieval.index import Index
    from mmedge.retrieval.vector_files import export_vectors

    with Index.open(place, read_only=True) as opened:
        rows = export_vectors(opened, output)
        items = len(opened)
    if json:
        print_json({"index": str(place), "output": str(output), "items": items, "vectors": rows})
    else:
        typer.echo(plain(f"{output}: {items} items, {rows} vectors"))


@index.command()
def stats(place: IndexArgument, json: JsonOption = False) -> None:
    """Show what an index holds."""
    from dataclasses import asdict

    from mmedge.cli.output import print_json, stdout_console
    from mmedge.cli.tables import facts, print_part, table
    from mmedge.retrieval.index import Index

    with Index.open(place, read_only=True) as opened:
        found = opened.stats()
    if json:
        print_json({"index": str(place), **asdict(found)})
        return
    console = stdout_console()
    console.print(facts(_stats(found)))
    rows = [
        (each.snapshot or "in memory", str(each.vectors), str(each.alive), _searched(each))
        for each in found.segments
    ]
    if rows:
        numbers = ("vectors", "alive")
        heads = ("snapshot", *numbers, "search")
        print_part("Segments", table(*heads, numbers=numbers, rows=rows), console)


def _searched(segment: SegmentStats) -> str:
    """How much of a segment a search looks at, for each kind of query."""
    if not segment.lists:
        return "exact"
    widths = (
        f"{kind} {'exact' if lists is None else lists}" for kind, lists in segment.recall.items()
    )
    return f"of {segment.lists} lists, for recall 0.95: {', '.join(widths)}; others exact"


def _stats(found: IndexStats) -> Iterator[tuple[str, str]]:
    from mmedge.cli.output import human_bytes

    yield "items", str(found.items)
    yield "vectors", f"{found.vectors} of {found.dim} dimensions"
    yield "kernels", found.kernels
    yield "space", found.space or "unknown"
    yield "bundle", found.bundle or "none"
    if found.precision is not None:
        yield "precision", found.precision
    yield "record", human_bytes(found.record_bytes)
    yield "snapshots", human_bytes(found.snapshots_bytes)
    if found.damaged:
        yield "damaged", ", ".join(found.damaged)
    if found.migrating_to is not None:
        yield "migrating to", found.migrating_to


@index.command()
def verify(
    place: IndexArgument,
    repair: Annotated[
        bool, typer.Option("--repair", help="Repair what is damaged, from the record.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check every page, item and vector. Exit code 1 if something is or stays damaged."""
    from dataclasses import asdict

    from mmedge.cli.output import plain, print_json
    from mmedge.retrieval.verifying import verify_index

    found = verify_index(place, repair=repair)
    if json:
        print_json({"index": str(place), **asdict(found)})
    else:
        parts = {"damaged": found.problems, "repaired": found.repaired, "lost": found.lost}
        for what, entries in parts.items():
            for entry in entries:
                typer.echo(plain(f"{what}: {entry}"))
        if not any(parts.values()):
            typer.echo(plain(f"{place}: whole"))
    if found.lost or (found.problems and not repair):
        raise typer.Exit(1)


@index.command()
def migrate(
    place: IndexArgument,
    model: Annotated[
        Path, typer.Option("--model", "-m", help="Bundle to embed with.", show_default=False)
    ],
    precision: Annotated[
        str | None,
        typer.Option(help="Precision or variant of the bundle.", show_default="the default"),
    ] = None,
    backend: BackendOption = None,
    drop_missing: Annotated[
        bool, typer.Option("--drop-missing", help="Remove items whose source is gone.")
    ] = False,
) -> None:
    """Embed all items again with another bundle. An interrupted migration resumes."""
    from mmedge.cli.progress import Steps
    from mmedge.retrieval.index import Index

    with Steps() as steps, Index.open(place) as opened:
        done = opened.migrate(
            model,
            precision=precision,
            backend=backend,
            drop_missing=drop_missing,
            progress=lambda count, total: steps.part("embedding", count, total),
        )
    typer.echo(f"{done} items embedded")


@index.command()
def compact(
    place: IndexArgument,
    queries: Annotated[
        Path | None,
        typer.Option(
            help="Text file of searches, one a line, with which the search width is measured.",
            show_default="texts of the items",
        ),
    ] = None,
) -> None:
    """Drop what deleted items left behind; from 20,000 vectors on, put them in inverted lists."""
    from mmedge.cli.output import human_bytes, plain
    from mmedge.retrieval.index import Index

    def size() -> int:
        return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())

    texts = None if queries is None else _lines(queries)
    with Index.open(place) as opened:
        before = size()
        opened.compact(texts)
    typer.echo(plain(f"{place}: {human_bytes(before)} before, {human_bytes(size())} now"))


def _lines(path: Path) -> list[str]:
    """Read the lines of a text file that are not empty."""
    from mmedge.errors import InputError
    from mmedge.files.json_file import read_file

    data = read_file(path, max_bytes=_QUERIES_BYTES, error=InputError)
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}).") from error
    if not lines:
        raise InputError(f"{path}: is empty, expected searches, one a line.")
    return lines


ServerArgument: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="SERVER", help="Milvus: http://HOST:PORT, or a path.db.", show_default=False
    ),
]
CollectionOption: TypeAlias = Annotated[
    str, typer.Option("--collection", "-c", help="Collection on the server.")
]
TokenOption: TypeAlias = Annotated[
    str | None,
    typer.Option(envvar="MMEDGE_TOKEN", help="USER:PASSWORD or an API key.", show_default="none"),
]


@index.command()
def push(
    place: IndexArgument,
    server: ServerArgument,
    collection: CollectionOption = "mmedge",
    token: TokenOption = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="Send all items again, not only changes.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Send changes since the last push to a server; an interrupted push resumes."""
    from mmedge.retrieval.sync import push as send

    _sync(send, place, server, collection, token, everything=everything, as_json=json)


@index.command()
def pull(
    place: IndexArgument,
    server: ServerArgument,
    collection: CollectionOption = "mmedge",
    token: TokenOption = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="Fetch all items again, not only changes.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Fetch changes since the last pull from a server; an interrupted pull resumes."""
    from mmedge.retrieval.sync import pull as fetch

    _sync(fetch, place, server, collection, token, everything=everything, as_json=json)


def _sync(
    copy: Any,  # noqa: ANN401, push or pull
    place: Path,
    server: str,
    collection: str,
    token: str | None,
    *,
    everything: bool,
    as_json: bool,
) -> None:
    from dataclasses import asdict

    from mmedge.cli.output import print_json
    from mmedge.cli.progress import Steps
    from mmedge.retrieval.index import Index
    from mmedge.retrieval.stores.milvus import MilvusStore

    with (
        Steps(shown=not as_json) as steps,
        Index.open(place) as opened,
        MilvusStore(
            server,
            collection,
            dim=opened.dim,
            space=opened.space,
            writer=opened.identity,
            token=token,
        ) as store,
    ):

        def progress(done: Synced) -> None:
            steps.part("changes", done.changes, done.changes)

        done = copy(opened, store, on_progress=progress, everything=everything)
    if as_json:
        print_json({"index": str(place), "server": server, **asdict(done)})
    else:
        typer.echo(f"{done.changes} changes: {done.written} written, {done.deleted} deleted")
