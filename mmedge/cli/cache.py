"""`mmedge cache`: list and remove cached files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmedge.cli.options import JsonOption

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mmedge.runtimes.engines.spec import ShapeProfile, ShapeRange
    from mmedge.runtimes.engines.store import CacheEntry, EngineCache

__all__ = ["cache"]

_DAY_S = 86_400.0

cache = typer.Typer(
    no_args_is_help=True,
    help="List or remove cached engines and backend choices.",
)


@cache.command("list")
def list_(
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the hash of every engine.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """List the engines, most recently used first, and count other cached files."""
    from mmedge.cli.output import print_json
    from mmedge.runtimes.engines.store import EngineCache

    engines = EngineCache()
    entries = engines.entries(verify=verify)
    if json:
        print_json(
            {
                "folder": str(engines.folder.parent),
                "engines": [_document(entry) for entry in entries],
                **{name: _counted(paths) for name, paths in _others(engines).items()},
            }
        )
    else:
        _print(engines, entries)


@cache.command()
def prune(
    outputs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Bundles and exports, or folders of them: remove what killed commands left beside "
            "them (partial folders, searches to be resumed).",
            show_default="none",
        ),
    ] = None,
    older_than: Annotated[
        float | None,
        typer.Option(metavar="DAYS", min=0, help="Remove engines not loaded for DAYS."),
    ] = None,
    keep_mib: Annotated[
        float | None,
        typer.Option(metavar="N", min=0, help="Remove least recently used engines down to N MiB."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Remove engines of models whose name contains NAME or whose hash begins with it.",
        ),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Remove all engines and all other cached files."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed.")] = False,
) -> None:
    """Remove unusable engines, and those that the options select.

    Unusable engines are damaged, left by a build that was killed, or built for another version of
    their library than the installed one. Engines being built stay, and so does what a running
    command writes.
    """
    from mmedge.cli.output import human_bytes, plain
    from mmedge.files import storage_errors
    from mmedge.runtimes.backends import BACKENDS, backend
    from mmedge.runtimes.engines.store import EngineCache, PruneRule
    from mmedge.runtimes.selection.remembered import choice_files

    if everything and (older_than, keep_mib, model) != (None, None, None):
        raise typer.BadParameter("--all removes everything: omit the other options.")
    installed = {name: backend(name).engine_version() for name in BACKENDS}
    pruned = EngineCache().prune(
        PruneRule(
            versions={name: found for name, found in installed.items() if found},
            older_than_s=None if older_than is None else older_than * _DAY_S,
            model=model,
            keep_bytes=None if keep_mib is None else int(keep_mib * (1 << 20)),
            everything=everything,
        ),
        dry_run=dry_run,
    )
    freed_bytes = pruned.freed_bytes
    would = "would be " if dry_run else ""
    for entry, reason in pruned.removed:
        typer.echo(
            plain(f"{_name(entry)}: {would}removed, {human_bytes(entry.size_bytes)}: {reason}")
        )
    choices = choice_files() if everything else ()
    for path in choices:
        freed_bytes += path.stat().st_size
        if not dry_run:
            with storage_errors(path):
                path.unlink(missing_ok=True)
    for path, size_bytes in _leftovers(outputs or [], dry_run=dry_run):
        freed_bytes += size_bytes
        typer.echo(plain(f"{path}: {would}removed, {human_bytes(size_bytes)}: leftover of a run"))
    other = f" and {_number(len(choices), 'choice')} of a backend" if choices else ""
    typer.echo(
        f"{_number(len(pruned.removed), 'engine')}{other} {would}removed, "
        f"{human_bytes(freed_bytes)}; {_number(pruned.kept, 'engine')} kept, "
        f"{human_bytes(pruned.kept_bytes)}."
    )


def _leftovers(outputs: Iterable[Path], *, dry_run: bool) -> Iterator[tuple[Path, int]]:
    """Remove and yield leftovers of killed commands in the cache and around the outputs."""
    from mmedge.bundle.paths import MANIFEST_NAME
    from mmedge.files.atomic import remove_if_free, remove_leftovers
    from mmedge.files.cache_folder import cache_folder

    kept = cache_folder()
    places: list[tuple[Path, str | None]] = [(kept, None), (kept / "backends", None)]
    for output in (path.absolute() for path in outputs):
        places.append((output.parent, output.name))
        if not (output / MANIFEST_NAME).exists():
            places.append((output, None))
    for folder, name in places:
        if not folder.is_dir():
            continue
        pattern = f".{name or '*'}.search"
        searches = [each for each in folder.glob(pattern) if each.is_dir()]
        sizes = {each: _size_bytes(each) for each in folder.glob(".*")}
        removed = [each for each in searches if remove_if_free(each, dry_run=dry_run)]
        for path in (*removed, *remove_leftovers(folder, name, dry_run=dry_run)):
            yield path, sizes[path]


def _size_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.lstat().st_size for file in files if file.is_file())


def _others(engines: EngineCache) -> dict[str, tuple[Path, ...]]:
    from mmedge.runtimes.engines.pruning import side_files
    from mmedge.runtimes.selection.remembered import choice_files

    return {
        "timing_caches": side_files(engines.folder, "timing"),
        "runtime_caches": side_files(engines.folder, "runtime"),
        "model_hashes": side_files(engines.folder, "models"),
        "backend_choices": choice_files(),
    }


def _counted(paths: Iterable[Path]) -> dict[str, int]:
    sizes = [path.stat().st_size for path in paths]
    return {"files": len(sizes), "size_bytes": sum(sizes)}


def _document(entry: CacheEntry) -> dict[str, object]:
    document: dict[str, object] = {
        "digest": entry.digest,
        "fault": entry.fault or None,
        "being_built": entry.busy,
        "size_bytes": entry.size_bytes,
        "used_unix_s": entry.used_unix_s,
    }
    record = entry.record
    if record is not None:
        document |= {
            "label": record.label,
            "key": asdict(record.key),
            "plan_sha256": record.plan_sha256,
            "layers": len(record.layers),
            "duration_s": record.duration_s,
            "warnings": list(record.warnings),
            "mmedge": record.mmedge,
            "built_unix_s": record.built_unix_s,
        }
    return document


def _print(engines: EngineCache, entries: tuple[CacheEntry, ...]) -> None:
    from rich.text import Text

    from mmedge.cli.output import human_bytes, plain, stdout_console
    from mmedge.cli.tables import table

    console = stdout_console()
    console.print(f"In {plain(str(engines.folder.parent))}:", soft_wrap=True)
    rows = []
    for entry in entries:
        facts = ("", "", "", "")
        if (record := entry.record) is not None:
            key = record.key
            facts = (
                f"{key.request.backend} {key.version}",
                key.compute_capability,
                _shapes(key.request.profiles),
                _minute(record.built_unix_s),
            )
        state = "being built" if entry.busy else entry.fault or "ok"
        colour = "green" if state == "ok" else "red" if entry.fault else "yellow"
        rows.append(
            (
                _name(entry),
                *facts[:3],
                human_bytes(entry.size_bytes),
                facts[3],
                _minute(entry.used_unix_s),
                Text(plain(state), colour),
            )
        )
    if rows:
        columns = ("model", "built for", "GPU", "shapes", "size", "built", "used", "state")
        console.print(table(*columns, numbers=("size",), rows=rows))
    total = human_bytes(sum(entry.size_bytes for entry in entries))
    others = {name: _counted(paths) for name, paths in _others(engines).items()}
    summary = [f"{_number(len(entries), 'engine')}, {total}"] + [
        f"{name.replace('_', ' ')}: {found['files']}, {human_bytes(found['size_bytes'])}"
        for name, found in others.items()
    ]
    console.print("; ".join(summary), soft_wrap=True)


def _name(entry: CacheEntry) -> str:
    record = entry.record
    if record is None:
        return entry.digest
    return record.label or record.key.model_sha256[:12]


def _shapes(profiles: tuple[ShapeProfile, ...]) -> str:
    """Return profiles in short, "1..8x3x224x224": inputs split by commas, profiles by bars."""
    return " | ".join(", ".join(map(_shape, profile.ranges.values())) for profile in profiles)


def _shape(ranges: ShapeRange) -> str:
    return "x".join(
        str(low) if low == high else f"{low}..{high}"
        for low, high in zip(ranges.min, ranges.max, strict=True)
    )


def _minute(unix_s: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M")


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
