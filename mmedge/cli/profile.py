"""`mmedge profile`: measure latency, memory, size and stages on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmedge.cli.options import BundleArgument, PrecisionsOption, RolesOption, words

if TYPE_CHECKING:
    from rich.text import Text

    from mmedge.bundle import NodeTable
    from mmedge.bundle.manifest import Role
    from mmedge.cli.progress import Steps
    from mmedge.profiling import Cell, Plan, Profile, ProfileConfig

__all__ = ["profile"]


def profile(  # noqa: PLR0913, PLR0917, typer's options
    bundle: BundleArgument,
    role: RolesOption = None,
    precision: PrecisionsOption = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, e.g. 1,8.")] = "1",
    threads: Annotated[
        str | None,
        typer.Option(help="Thread counts, e.g. 1,2.", show_default="number of CPUs"),
    ] = None,
    sequence: Annotated[
        str | None,
        typer.Option(
            help="Text lengths in tokens: numbers, 'golden' (of the golden texts), 'max'.",
            show_default="golden,max",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Device: cpu, cuda or cuda:N; gpu is the same as cuda.")
    ] = "cpu",
    backend: Annotated[
        str | None,
        typer.Option(
            help="Backend that runs the graphs; `mmedge doctor` lists them.",
            show_default="the one that computed the golden outputs",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Quick: 0.5 s per measurement, 1 cold start, texts of true length."
        ),
    ] = False,
    seconds: Annotated[
        float | None,
        typer.Option(help="Minimum time per measurement, in seconds.", show_default="3.0"),
    ] = None,
    min_runs: Annotated[int | None, typer.Option(help="Minimum runs.", show_default="20")] = None,
    max_runs: Annotated[
        int | None, typer.Option(help="Maximum runs.", show_default="20000")
    ] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Warm-up time, in seconds.", show_default="0.5")
    ] = None,
    cold_starts: Annotated[
        int | None, typer.Option(help="Cold starts per variant (0 to skip).", show_default="3")
    ] = None,
    stages: Annotated[bool, typer.Option(help="Break end-to-end latency down by stage.")] = True,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Baseline to compare with, interleaved: BUNDLE, BUNDLE:VARIANT, :VARIANT of this "
            "bundle, or an ONNX file with the same inputs.",
            show_default="none",
        ),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit with 1 if this holds, e.g. 'image_encoder.p95_ms > 20' or "
            "'image_encoder.int8.b8.t2.p50_ms >= 50'. Repeatable.",
            show_default="never",
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write a JSON report (- for stdout).", show_default="no")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write an HTML report.", show_default="no")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Measure latency, throughput, cold start, memory and stages of every variant.

    A percentile is shown if 5 or more runs are expected beyond it (p95: 100 runs). A --fail-if on a
    percentile raises the number of runs accordingly.

    Exits with 1 if a gate fails; the reports are written all the same.
    """
    from mmedge.cli.output import print_json
    from mmedge.cli.progress import Steps
    from mmedge.profiling import QUICK
    from mmedge.profiling import profile as measure
    from mmedge.runtimes.backends import DEFAULT_BACKEND
    from mmedge.sessions.opening import device_name

    budget = {
        "seconds": seconds,
        "min_runs": min_runs,
        "max_runs": max_runs,
        "warmup_seconds": warmup,
    }
    config = _config(
        QUICK if quick else {},
        {
            "roles": words("--role", role),
            "precisions": words("--precision", precision),
            "batches": words("--batch", batch),
            "threads": words("--threads", threads),
            "sequences": words("--sequence", sequence),
            "device": device_name(device),
            "backend": backend or DEFAULT_BACKEND,
            "budget": budget,
            "cold_starts": cold_starts,
            "stages": stages,
            "baseline": baseline,
            "gates": tuple(fail_if or ()),
        },
    )
    printed = json is not None and str(json) == "-"
    json_file = None if printed else json
    for path in (json_file, html):
        if path is not None:
            _check_writable(path)
    tables, roles = _report_inputs(bundle, config) if html is not None else ((), {})
    # Draw nothing during a measurement: drawing would disturb it.
    with Steps(shown=not quiet, live=False) as steps:
        made = measure(
            bundle,
            config,
            on_plan=None if quiet else lambda plan: _print_plan(config, plan, steps),
            on_progress=lambda now: steps.step(now.what, now.step, now.steps),
        )
    if printed:
        print_json(made.model_dump(mode="json"))
    elif not quiet:
        _print(made)
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


def _config(preset: Mapping[str, Any], options: Mapping[str, Any]) -> ProfileConfig:
    """Return the configuration; an option that is given (not None) overrides the preset."""
    from pydantic import ValidationError

    from mmedge.profiling import ProfileConfig

    given = {name: value for name, value in options.items() if value is not None}
    budget = {name: value for name, value in options["budget"].items() if value is not None}
    given["budget"] = {**preset.get("budget", {}), **budget}
    try:
        return ProfileConfig.model_validate({**preset, **given})
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
    """Check before the measurement that the report can be written."""
    import tempfile

    from mmedge.errors import StorageError
    from mmedge.files import storage_errors

    if path.is_dir():
        raise StorageError(f"Cannot write {path}: it is a folder. Name a file in it.")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def _print_plan(config: ProfileConfig, plan: Plan, steps: Steps) -> None:
    from mmedge.cli.output import print_warning

    parts = [f"{plan.cells} measurements"]
    parts += [f"{plan.calls} end-to-end calls with their stages"] if plan.calls else []
    parts += [f"{plan.cold_starts} cold starts"] if plan.cold_starts else []
    budget = config.budget
    minutes, seconds = divmod(round(plan.expected_s), 60)
    steps.say(
        f"Plan: {', '.join(parts)}. Expected time: {f'{minutes} min ' if minutes else ''}"
        f"{seconds} s; longer for runs over {1000 * budget.seconds / budget.min_runs:.0f} ms, "
        f"since each measurement takes at least {budget.min_runs} runs."
    )
    for warning in plan.warnings:
        print_warning(warning)


def _report_inputs(
    bundle: Path, config: ProfileConfig
) -> tuple[tuple[NodeTable, ...], Mapping[str, Role]]:
    """Read the bundle's search and node tables before anything is measured.

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
    """Exit with 1 if a gate failed, showing the value and the limit."""
    from mmedge.cli.output import print_error

    failed = [gate for gate in made.gates if gate.failed]
    for gate in failed:
        print_error(
            f"Gate '{gate.expression}' failed: {gate.metric} is {gate.got:.6g}, "
            f"which is {gate.op} {gate.limit:g}."
        )
    if failed:
        raise typer.Exit(1)


def _print(profile: Profile) -> None:
    """Print a profile in 80 columns, unless names are longer."""
    from rich.text import Text

    from mmedge.cli.output import plain, stdout_console
    from mmedge.cli.tables import print_part, table

    console = stdout_console()
    machine, load = profile.machine, profile.machine.load_average_before
    console.print(Text(plain(f"{profile.bundle.name}: {profile.bundle.path}"), style="bold"))
    console.print(
        plain(
            f"{machine.cpu_model}, {len(machine.processors_allowed)} of "
            f"{machine.processors_online} CPUs, load {f'{load[0]:.2f}' if load else 'unknown'}; "
            f"{profile.cells[0].placement.engine} on {profile.config.device}"
        )
    )
    console.print(Text("Latency per run in ms; - too few runs; ~ noisy", style="dim"))
    for role in dict.fromkeys(cell.role for cell in profile.cells):
        cells = [cell for cell in profile.cells if cell.role == role]
        columns, numbers, rows = _latencies(cells)
        print_part(role, table(*columns, numbers=numbers, rows=rows, dense=True))
        if any(cell.baseline for cell in cells):
            numbers = ("batch", "thr", "tok", "pairs", "ratio", "95 % interval")
            compared = table(
                "variant", "baseline", *numbers, numbers=numbers, rows=_ratios(cells), dense=True
            )
            print_part(f"{role}, time relative to the baseline (below 1 is faster)", compared)
    numbers = ("size", "cold", "CPU", "load", "peak", "steady", "cosine")
    print_part(
        "Size (MB), cold start, its CPU time and load (ms), memory (MB), cosine with fp32",
        table("role", "variant", *numbers, numbers=numbers, rows=_variants(profile), dense=True),
    )
    if profile.stages:
        numbers = ("ms", "share")
        print_part(
            "Stages of an end-to-end call at batch 1, medians (ms)",
            table("call", *numbers, numbers=numbers, rows=_stages(profile), dense=True),
        )
    placements = {f"{cell.role}.{cell.variant}": cell.placement for cell in profile.cells}
    lines = (f"{name}: {placement.summary}" for name, placement in placements.items())
    print_part("Placement", plain("\n".join(lines)))
    if profile.warnings:
        print_part("Warnings", plain("\n".join(f"- {each}" for each in profile.warnings)))
    if profile.gates:
        print_part("Gates", Text("\n").join(_gates(profile)))


def _number(value: float | None, divisor: float = 1.0) -> str:
    from mmedge.cli.tables import ABSENT
    from mmedge.reports.charts import number

    return ABSENT if value is None else number(value / divisor)


def _noisy(name: str, noise: Sequence[str]) -> str:
    return f"{name} ~" if noise else name


def _latencies(
    cells: Sequence[Cell],
) -> tuple[tuple[str, ...], tuple[str, ...], Iterator[tuple[str, ...]]]:
    """Return headings, the numeric ones, and rows."""
    from mmedge.profiling.statistics import PERCENTILES

    names = [f"p{percent}" for percent in PERCENTILES]
    tokens = any(cell.sequence is not None for cell in cells)
    numbers = ("batch", "thr", *(["tok"] if tokens else []), "n", *names, "per s")

    def rows() -> Iterator[tuple[str, ...]]:
        for cell in cells:
            found = cell.latency.percentiles
            yield (
                _noisy(cell.variant, cell.noise),
                str(cell.batch),
                str(cell.threads),
                *([str(cell.sequence)] if tokens else []),
                str(cell.latency.n),
                *(_number(found[name].value_ms if name in found else None) for name in names),
                _number(cell.throughput_per_s),
            )

    return ("variant", *numbers), numbers, rows()


def _ratios(cells: Sequence[Cell]) -> Iterator[tuple[str, ...]]:
    for cell in cells:
        if cell.baseline is not None:
            ratio = cell.baseline.ratio
            yield (
                cell.variant,
                cell.baseline.name,
                str(cell.batch),
                str(cell.threads),
                str(cell.sequence or "-"),
                str(ratio.pairs),
                f"{ratio.median:.3f}",
                f"{ratio.low:.3f} to {ratio.high:.3f}",
            )


def _variants(profile: Profile) -> Iterator[tuple[str, ...]]:
    for item in profile.variants:
        cold, memory = item.cold_start, item.memory
        yield (
            item.role,
            item.variant,
            _number(item.size_bytes, 1e6),
            _number(cold.first_embedding_ms.median if cold else None),
            _number(cold.cpu_ms.median if cold else None),
            _number(cold.load_ms.median if cold else None),
            _number(memory.peak_bytes if memory else None, 1e6),
            _number(memory.steady_bytes if memory else None, 1e6),
            "-" if item.cosine_mean is None else f"{item.cosine_mean:.5f}",
        )


def _stages(profile: Profile) -> Iterator[tuple[str, ...]]:
    for item in profile.stages:
        call = f"{item.role} {item.variant}, {item.input}"
        yield _noisy(call, item.noise), _number(item.end_to_end.median_ms), ""
        # Stages are measured separately, so noise can make their sum exceed the call.
        whole = sum(item.stages_ms.values())
        for name, value in item.stages_ms.items():
            yield f"  {name}", _number(value), f"{value / whole:.0%}" if whole else "-"


def _gates(profile: Profile) -> Iterator[Text]:
    from rich.text import Text

    from mmedge.cli.output import plain

    for gate in profile.gates:
        result = ("FAILED", "bold red") if gate.failed else ("ok    ", "green")
        limit = f"got {_number(gate.got)}, fails if {gate.op} {gate.limit:g}"
        yield Text.assemble(result, f" {plain(gate.metric)}: {limit}")
