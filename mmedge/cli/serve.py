"""`mmedge serve`: a local page and HTTP API for an index."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["serve"]


def serve(
    path: Annotated[Path, typer.Argument(help="Index, NAME.index.", show_default=False)],
    bundle: Annotated[
        Path | None,
        typer.Option(
            "-m", "--bundle", help="Bundle that encodes queries.", show_default="the index's own"
        ),
    ] = None,
    root: Annotated[
        list[Path] | None,
        typer.Option(
            "--root",
            help="Folder whose images may be shown; may be repeated.",
            show_default="the indexed folders, if only this machine is served",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 8000,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            help="Name under which other machines reach this one; may be repeated. Required for a "
            "--host that is not the loopback's.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve a search page and a JSON API for an index, to this machine only by default.

    Stop it with Ctrl-C. See docs/serving.md for the API and for what other machines can reach.
    """
    from mmedge.cli.output import print_warning
    from mmedge.serving.app import ServeOptions, create_app, open_served
    from mmedge.serving.guard import allowed_hosts, is_loopback
    from mmedge.serving.server import check_installed, listen, run, url

    check_installed()
    hosts = allowed_hosts(host, allow_host or ())
    # What an index from elsewhere records as its folders must not be shown to others unasked.
    folders = root or (None if is_loopback(host) else ())
    served = open_served(path, ServeOptions(bundle, folders))
    try:
        app = create_app(served, hosts)
        listening = listen(host, port)
        if not is_loopback(host):
            print_warning(
                "Everyone who reaches this machine can search the index and see its images: there "
                "is no password."
            )

        def ready() -> None:
            for note in served.notes:
                typer.echo(note)
            typer.echo(f"Serving {served.title} at {url(listening)} (Ctrl-C stops it)")

        run(app, listening, ready)
    finally:
        served.close()
