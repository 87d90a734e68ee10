"""What `mmedge index add` and `import` do with each kind of source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmedge.retrieval.folders import FolderReport
    from mmedge.retrieval.index import Index

__all__ = ["add_folder", "add_frames", "add_vectors", "open_or_create"]

_MOST_NAMED = 5


def open_or_create(
    output: Path,
    model: Path | None,
    precision: str | None,
    backend: str | None,
    vectors: Sequence[Path],
) -> Index:
    """Open an index, or make one: with the bundle, else of the vectors' width and space."""
    from mmedge.errors import InputError
    from mmedge.media.vectors import open_vectors
    from mmedge.retrieval.index import Index

    if output.exists():
        return Index.open(output, bundle=model, precision=precision, backend=backend)
    if model is not None:
        return Index.create(output, model, precision=precision, backend=backend)
    if not vectors:
        raise InputError(f"{output} does not exist yet. Name the bundle to make it with: -m.")
    first = open_vectors(vectors[0])
    return Index.create(output, dim=first.dim, space=first.space)


def add_folder(
    opened: Index,
    source: Path,
    *,
    prefix: str | None,
    prune: bool,
    batch: int | None,
    workers: int | None,
    as_json: bool,
) -> dict[str, Any]:
    """Index a folder, with progress; return what was done, as JSON."""
    from mmedge.cli.output import print_warning
    from mmedge.cli.progress import Steps
    from mmedge.retrieval.folders import index_folder

    with Steps(shown=not as_json) as steps:

        def progress(report: FolderReport, total: int) -> None:
            steps.part(_rate(report, total), report.files, total)

        report = index_folder(
            opened,
            opened.bulk_model,
            source,
            prefix=prefix,
            prune=prune,
            batch_size=batch,
            workers=workers,
            progress=progress if steps.animated else None,
        )
        steps.say(f"{source}: {_summary(report)}")
    for path, reason in report.reasons[:_MOST_NAMED]:
        print_warning(reason if path in reason else f"{path}: {reason}")
    if report.failed > _MOST_NAMED:
        print_warning(f"{report.failed - _MOST_NAMED} more files could not be used (--json: all).")
    return {
        "added": report.added,
        "updated": report.updated,
        "unchanged": report.unchanged,
        "removed": report.removed,
        "failed": report.failed,
        "seconds": report.seconds,
        "reasons": [{"path": path, "reason": reason} for path, reason in report.reasons],
    }


def add_frames(
    opened: Index,
    source: Path,
    *,
    topic: str | None,
    batch: int | None,
    workers: int | None,
    as_json: bool,
) -> dict[str, Any]:
    """Index a video or a recording, with progress; return what was done, as JSON."""
    from mmedge.cli.progress import Steps
    from mmedge.media.recordings import Recording, is_recording
    from mmedge.retrieval.recordings import index_recording, index_video

    with Steps(shown=not as_json) as steps:
        if is_recording(source):
            with Recording(source, topic) as recording:
                total = recording.count or 0
                added = index_recording(
                    opened,
                    opened.bulk_model,
                    recording,
                    batch_size=batch,
                    workers=workers,
                    progress=lambda count: steps.part("frames", count, total),
                )
        else:
            steps.part("video", 0, 1)
            added = index_video(
                opened,
                opened.bulk_model,
                source,
                batch_size=batch,
                workers=workers,
            )
        steps.say(f"{source}: {added} frames added")
    return {"added": added}


def _rate(report: FolderReport, total: int) -> str:
    """Return the rate and the time left, "38/s, 2:05 left"."""
    done = report.added + report.updated
    if not done or report.seconds <= 0:
        return "indexing"
    rate = done / report.seconds
    minutes, seconds = divmod(round((total - report.files) / rate), 60)
    return f"indexing {rate:.3g}/s, {minutes}:{seconds:02} left"


def _summary(report: FolderReport) -> str:
    counts = {
        "added": report.added,
        "updated": report.updated,
        "unchanged": report.unchanged,
        "removed": report.removed,
        "failed": report.failed,
    }
    shown = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "no files"
    done = report.added + report.updated
    rate = f", {done / report.seconds:.3g}/s" if done and report.seconds > 0 else ""
    return f"{shown}, in {report.seconds:.1f} s{rate}"


def add_vectors(opened: Index, source: Path, *, as_json: bool) -> dict[str, Any]:
    """Import a file of vectors; return what was done, as JSON."""
    from mmedge.cli.output import plain
    from mmedge.media.vectors import open_vectors
    from mmedge.retrieval.vector_files import import_vectors

    written = import_vectors(opened, open_vectors(source))
    if not as_json:
        typer.echo(plain(f"{source}: {written} items written"))
    return {"written": written}
