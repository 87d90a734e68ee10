"""`mmedge profile`: how fast, how large, and where the time goes, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmedge.cli.options import BundleArgument, PrecisionsOption, RolesOption, words

if TYPE_CHECKING:
    from mmedge.bundle import NodeTable
    from mmedge.bundle.manifest import Role
    from mmedge.profiling import Profile, ProfileConfig, Progress

__all__ = ["profile"]


def profile(  # noqa: PLR0913, PLR0917, typer's options
    bundle: BundleArgument,
    role: RolesOption = None,
    precision: PrecisionsOption = None,
    batch: Annotated[str, typer.Option(help="Samples a run, e.g. 1,8.")] = "1",
    threads: Annotated[
        str | None, typer.Option(help="Threads, e.g. 1,2.", show_default="one a processor")
    ] = None,
    sequence: Annotated[
        str,
        typer.Option(
            help="Tokens a text: numbers, 'golden' (as the bundle's golden texts), 'max'."
        ),
    ] = "golden,max",
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; gpu is another word for cuda.")
    ] = "cpu",
    backend: Annotated[
        str | None,
        typer.Option(
            help="Backend that runs the graphs; `mmedge doctor` lists them.",
            show_default="the one that computed the golden outputs",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Measure each cell at least so long.")] = 3.0,
    min_runs: Annotated[int, typer.Option(help="And at least so many runs.")] = 20,
    max_runs: Annotated[int, typer.Option(help="But no more than these.")] = 20_000,
    warmup: Annotated[float, typer.Option(help="Seconds of runs thrown away first.")] = 0.5,
    cold_starts: Annotated[
        int, typer.Option(help="Fresh processes a variant, for cold start and memory; 0 for none.")
    ] = 3,
    stages: Annotated[bool, typer.Option(help="Say where the end-to-end time goes.")] = True,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Compare, interleaved, with BUNDLE, BUNDLE:VARIANT, :VARIANT of this bundle, or "
            "an ONNX file that takes the same inputs.",
            show_default="nothing",
        ),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit with 1 where this holds, e.g. 'image_encoder.p95_ms > 20' or "
            "'image_encoder.int8.b8.t2.p50_ms >= 50'. May be given several times.",
            show_default="never",
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write everything as JSON; - prints it.", show_default="no")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write one page with plots.", show_default="no")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")] = False,
) -> None:
    """Measure latency, throughput, cold start, memory and stages of every variant.

    A percentile is shown where 5 or more runs are expected beyond it (p95: 100).
    A --fail-if on a percentile makes its cell run that often.

    Exits with 1 if a gate fails; the reports are written all the same.
    """
    from mmedge.profiling import profile as measure
    from mmedge.runtimes.backends import DEFAULT_BACKEND
    from mmedge.sessions.opening import device_name

    config = _config(
        {
            "roles": words("--role", role),
            "precisions": words("--precision", precision),
            "batches": words("--batch", batch),
            "threads": words("--threads", threads),
            "sequences": words("--sequence", sequence),
            "device": device_name(device),
            "backend": backend or DEFAULT_BACKEND,
            "budget": {
                "seconds": seconds,
                "min_runs": min_runs,
                "max_runs": max_runs,
                "warmup_seconds": warmup,
            },
            "cold_starts": cold_starts,
            "stages": stages,
            "baseline": baseline,
            "gates": tuple(fail_if or ()),
        }
    )
    printed = json is not None and str(json) == "-"
    json_file = None if printed else json
    for path in (json_file, html):
        if path is not None:
            _check_writable(path)
    tables, roles = _told(bundle, config) if html is not None else ((), {})
    with _progress(shown=not quiet) as on_progress:
        made = measure(bundle, config, on_progress=on_progress)
    _print(made, as_json=printed, quiet=quiet)
    _write(made, json_file, html, tables, roles)
    _apply_gates(made)


# The option behind each field of the config, for messages.
_OPTIONS = {
    "roles": "--role",
    "precisions": "--precision",
    "batches": "--batch",
    "sequences": "--sequence",
    "warmup_seconds": "--warmup",
    "gates": "--fail-if",
}


def _config(fields: Mapping[str, object]) -> ProfileConfig:
    from pydantic import ValidationError

    from mmedge.profiling import ProfileConfig

    try:
        return ProfileConfig.model_validate(fields)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        names = [str(step) for step in fault["loc"] if isinstance(step, str)]
        field = next((name for name in reversed(names) if name in _fields()), names[0])
        option = _OPTIONS.get(field, f"--{field.replace('_', '-')}")
        raise typer.BadParameter(f"{option}: got {fault['input']!r}. {fault['msg']}.") from error


def _fields() -> frozenset[str]:
    from mmedge.profiling import Budget, ProfileConfig

    return frozenset((*ProfileConfig.model_fields, *Budget.model_fields))


def _check_writable(path: Path) -> None:
    """Find out before the measurement, not after it, that a report cannot be written."""
    import tempfile

    from mmedge.errors import StorageError
    from mmedge.files import storage_errors

    if path.is_dir():
        raise StorageError(f"Cannot write {path}: it is a folder. Name a file in it.")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


@contextmanager
def _progress(*, shown: bool) -> Iterator[Callable[[Progress], None]]:
    """Show what is being measured; nothing is drawn while it is, which would disturb it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield lambda _: None
        return
    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.description}"))
    with Bar(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=None)

        def on_progress(progress: Progress) -> None:
            bar.update(
                task, completed=progress.step, total=progress.steps, description=progress.what
            )
            bar.refresh()

        yield on_progress


def _print(made: Profile, *, as_json: bool, quiet: bool) -> None:
    from mmedge.cli.output import print_json, stdout_console
    from mmedge.cli.profile_text import print_profile

    if as_json:
        print_json(made.model_dump(mode="json"))
    elif not quiet:
        print_profile(made, stdout_console())


def _told(bundle: Path, config: ProfileConfig) -> tuple[tuple[NodeTable, ...], Mapping[str, Role]]:
    """Read, before anything is measured, what the bundle tells of its variants and how they came.

    Returns:
        Node tables of the variants and, by name, the roles that are measured.
    """
    from mmedge.bundle import open_bundle
    from mmedge.profiling.cells import choose_variants

    opened = open_bundle(bundle)
    chosen = choose_variants(opened, config)
    found = [opened.nodes(variant) for ladder in chosen.values() for variant in ladder]
    roles = {name: opened.role(name) for name in chosen}
    return tuple(table for table in found if table is not None), roles


def _write(
    made: Profile,
    json_file: Path | None,
    html: Path | None,
    tables: Sequence[NodeTable],
    roles: Mapping[str, Role],
) -> None:
    from mmedge.files import write_atomic
    from mmedge.reports.profile import render_profile

    if json_file is not None:
        write_atomic(json_file, (made.model_dump_json(indent=2) + "\n").encode())
    if html is not None:
        write_atomic(html, render_profile(made, tables, roles=roles).encode())


def _apply_gates(made: Profile) -> None:
    """Exit with 1 where a gate failed, naming what was got and the limit."""
    from mmedge.cli.output import print_error

    failed = [gate for gate in made.gates if gate.failed]
    for gate in failed:
        print_error(
            f"Gate '{gate.expression}' failed: {gate.metric} is {gate.got:.6g}, "
            f"which is {gate.op} {gate.limit:g}."
        )
    if failed:
        raise typer.Exit(1)
