"""`mmedge build`: build the engines of a bundle ahead of time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmedge.cli.options import (
    BundleArgument,
    JsonOption,
    PrecisionsOption,
    RolesOption,
    check_target,
    words,
)

if TYPE_CHECKING:
    from mmedge.bundle.opening import Bundle
    from mmedge.cli.progress import Steps
    from mmedge.runtimes.engines.record import EngineRecord
    from mmedge.runtimes.session import BuildProgress
    from mmedge.sessions.preparation import EnginePlan, PlannedEngine, PlanState
    from mmedge.specs import Axis

__all__ = ["begin_build", "build"]

_STATES = {
    "build": "to build here",
    "cached": "in the cache",
    "elsewhere": "elsewhere",
    "refused": "no",
}
_MAX_NODES = 4


def build(  # noqa: PLR0913, PLR0917, one parameter an option
    bundle: BundleArgument,
    target: Annotated[
        str | None,
        typer.Option(
            help="Backend that builds the engines; `mmedge doctor` lists them.",
            show_default="the first that is installed",
        ),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            help="Target GPUs, such as 8.9,12.0 (RTX 40, RTX 50), or any, "
            "for a backend that needs no GPU to build. Repeatable.",
            show_default="the GPU of this machine",
        ),
    ] = None,
    role: RolesOption = None,
    precision: PrecisionsOption = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MIN,OPT,MAX",
            help="Batch size: min,opt,max. Repeatable: one optimization profile each.",
            show_default="1,1,8 for images, 1,1,32 for texts",
        ),
    ] = None,
    sequence: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MIN,OPT,MAX",
            help="Text length in tokens: min,opt,max. Give it once, or once per --batch.",
            show_default="1,16 and the tokenizer's length",
        ),
    ] = None,
    workspace_mib: Annotated[
        int, typer.Option(min=1, help="Maximum workspace on the GPU, in MiB.")
    ] = 1024,
    weight_streaming: Annotated[
        bool,
        typer.Option("--weight-streaming", help="Allow weights to be streamed from the host."),
    ] = False,
    refittable: Annotated[
        bool,
        typer.Option(
            "--refittable",
            help="Build refittable engines (not used by mmedge.load). Needs a GPU.",
        ),
    ] = False,
    stripped: Annotated[
        bool,
        typer.Option(
            "--stripped",
            help="Build engines without weights; load() refits them from the bundle. Needs a GPU.",
        ),
    ] = False,
    device: Annotated[
        int, typer.Option(min=0, help="GPU index, unless --compute-capability is given.")
    ] = 0,
    plan: Annotated[bool, typer.Option("--plan", help="Dry run: show the build plan.")] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Print the layers of each engine with their precision.")
    ] = False,
    json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Build engines of a bundle into the engine cache, where `load` finds them.

    Each variant's graph sets its precision; --plan shows which variants become engines, and how to
    convert the others. Cached engines are not built again.

    Exits with 1 if a build fails; the other engines are still built.
    """
    from mmedge.bundle import open_bundle
    from mmedge.cli.output import print_json
    from mmedge.runtimes.backends import engine_backends
    from mmedge.runtimes.engines.spec import BuildSettings
    from mmedge.sessions.choice import engine_backend
    from mmedge.sessions.preparation import PlanOptions, plan_engines

    check_target(target)
    opened = open_bundle(bundle)
    options = PlanOptions(
        compute_capabilities=words(
            "--compute-capability", ",".join(compute_capability or ()) or None
        )
        or (),
        roles=words("--role", role or None),
        precisions=words("--precision", precision or None),
        axes=_axes(opened, batch or [], sequence or []),
        settings=BuildSettings(
            workspace_bytes=workspace_mib << 20,
            weight_streaming=weight_streaming,
            stripped=stripped,
            refittable=refittable,
        ),
        device=device,
    )
    if plan:
        names = engine_backends() if target is None else (target,)
        plans = [plan_engines(opened, name, options, elsewhere=True) for name in names]
        if json:
            print_json([_document(bundle, made, map(_planned, made.engines)) for made in plans])
        elif not quiet:
            for made in plans:
                _print_plan(made)
        return
    made = plan_engines(opened, target or engine_backend(), options)
    _require_some(bundle, made)
    _build_all(bundle, made, layers=layers, as_json=json, quiet=quiet)


def _axes(
    bundle: Bundle, batches: list[str], sequences: list[str]
) -> tuple[Mapping[str, Axis], ...]:
    """Return the bounds of axes by name, one set per profile."""
    if batches and sequences and len(sequences) not in (1, len(batches)):
        raise typer.BadParameter(
            f"--sequence: given {len(sequences)} times, expected once, or once per --batch "
            f"({len(batches)})."
        )
    shapes = [e.shape for role in bundle.manifest.roles.values() for e in role.inputs]
    first = {shape[0] for shape in shapes if shape and isinstance(shape[0], str)}
    later = {axis for shape in shapes for axis in shape[1:] if isinstance(axis, str)} - first
    count = max(len(batches), len(sequences))
    sets: list[dict[str, Axis]] = [{} for _ in range(count)]
    for option, given, names in (("--batch", batches, first), ("--sequence", sequences, later)):
        if given and not names:
            raise typer.BadParameter(f"{option}: no input of the bundle has such an axis.")
        for index in range(count if given else 0):
            bounds = _bounds(option, given[min(index, len(given) - 1)])
            sets[index].update(dict.fromkeys(sorted(map(str, names)), bounds))
    return tuple(sets)


def _bounds(option: str, text: str) -> Axis:
    from mmedge.specs import Axis

    parts = text.split(",")
    if len(parts) in (1, 3) and all(part.strip().isdecimal() for part in parts):
        numbers = [int(part) for part in parts] * (3 // len(parts))
        if 1 <= numbers[0] <= numbers[1] <= numbers[2]:
            return Axis(*numbers)
    raise typer.BadParameter(
        f"{option}: got {text!r}, expected MIN,OPT,MAX with 1 <= MIN <= OPT <= MAX, or one number."
    )


def _require_some(bundle: Path, plan: EnginePlan) -> None:
    """Raise if no engine can be built, with the reason for each."""
    from mmedge.errors import EngineBuildError

    refused = plan.in_state("refused")
    if len(refused) == len(plan.engines):
        reasons = "; ".join(f"{engine.label}: {engine.reason}" for engine in refused)
        raise EngineBuildError(f"{bundle}: no engine can be built. {reasons}")


def _build_all(bundle: Path, plan: EnginePlan, *, layers: bool, as_json: bool, quiet: bool) -> None:
    from mmedge.cli.output import print_error, print_json
    from mmedge.cli.progress import Steps
    from mmedge.errors import EngineBuildError
    from mmedge.sessions.preparation import build_planned

    rows = []
    with Steps(shown=not quiet) as steps:
        for engine in plan.engines:
            if engine.state == "refused":
                continue
            try:
                found = build_planned(plan, engine, begin_build(steps, engine), steps.say)
            except EngineBuildError as error:  # the others are still built
                rows.append(_Row(engine, error=str(error)))
            else:
                rows.append(_Row(engine, found.record, found.path, built=found.miss is not None))
    if as_json:
        refused = map(_planned, plan.in_state("refused"))
        built = (_planned(row.engine) | _result(row, layers=layers) for row in rows)
        print_json(_document(bundle, plan, (*built, *refused)))
    elif not quiet:
        _print_built(plan, rows)
        if layers:
            _print_layers(rows)
    failed = [row for row in rows if row.error]
    for row in failed:
        print_error(f"{row.engine.label}: {row.error}")
    if failed:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class _Row:
    """Result of one planned engine: its record and path, or why it could not be built."""

    engine: PlannedEngine
    record: EngineRecord | None = None
    path: Path | None = None
    built: bool = False
    error: str = ""


def begin_build(steps: Steps, engine: PlannedEngine) -> BuildProgress | None:
    """Show that an engine is built next.

    Returns:
        The callback for its phases; None in a log, which gets a line at once instead, since a
        build can take minutes.
    """
    name = f"{engine.label}, for {_capabilities(engine)}"
    steps.step(name)
    if steps.animated:
        return steps.part
    steps.say(f"{name} ...")
    return None


def _print_plan(plan: EnginePlan) -> None:
    from mmedge.cli.output import stdout_console
    from mmedge.cli.tables import role_rows, table

    rows: dict[str, list[tuple[str, ...]]] = {}
    for engine in plan.engines:
        cells = (
            engine.variant,
            _STATES[engine.state],
            _capabilities(engine),
            "; ".join(map(_shown_axes, engine.axes)),
            engine.reason if engine.state == "build" else "",
        )
        rows.setdefault(engine.role, []).append(cells)
    console = stdout_console()
    console.print(_heading(plan))
    console.print(table("variant", "engine", "for", "profiles", "why", rows=role_rows(rows)))
    _print_reasons(plan, "elsewhere", "Not on this machine")
    _print_reasons(plan, "refused", "No engine")


def _print_built(plan: EnginePlan, rows: Sequence[_Row]) -> None:
    from mmedge.cli.output import plain, stdout_console
    from mmedge.cli.tables import role_rows, table

    by_label = {row.engine.label: row for row in rows}
    shown: dict[str, list[tuple[str, ...]]] = {}
    for engine in plan.engines:
        cells = (engine.variant, _capabilities(engine), *_figures(by_label.get(engine.label)))
        shown.setdefault(engine.role, []).append(cells)
    numbers = ("size", "time s", "layers")
    columns = ("variant", "for", *numbers, "precisions", "")
    console = stdout_console()
    console.print(_heading(plan))
    console.print(table(*columns, numbers=numbers, rows=role_rows(shown)))
    for row in rows:
        for warning in row.record.warnings if row.record is not None else ():
            console.print(f"Note: {plain(row.engine.label)}: {plain(warning)}")
    _print_reasons(plan, "refused", "No engine")
    if any(row.record is not None for row in rows):
        console.print(
            f"mmedge.load(..., backend='{plan.backend}') finds them on such a GPU. There, `mmedge "
            f"verify BUNDLE --device gpu --backend {plan.backend}` checks their outputs. "
            "`mmedge cache list` shows all engines."
        )


def _print_layers(rows: Sequence[_Row]) -> None:
    from mmedge.cli.output import plain, stdout_console
    from mmedge.cli.tables import table

    console = stdout_console()
    for row in rows:
        if row.record is None:
            continue
        console.print(f"Layers of {plain(row.engine.label)}:")
        if not row.record.layers:
            console.print("  The library does not report them.")
            continue
        layers = (
            (
                layer.name,
                layer.kind,
                layer.precision,
                *(" ".join(dtypes) for dtypes in (layer.inputs, layer.constants, layer.outputs)),
                ", ".join(layer.nodes[:_MAX_NODES])
                + (f", +{len(layer.nodes) - _MAX_NODES}" if len(layer.nodes) > _MAX_NODES else ""),
            )
            for layer in row.record.layers
        )
        columns = ("layer", "kind", "precision", "inputs", "constants", "outputs", "nodes")
        console.print(table(*columns, rows=layers))


def _heading(plan: EnginePlan) -> str:
    from mmedge.runtimes.backends import backend

    return f"{backend(plan.backend).title} {plan.version or '(not installed here)'}"


def _print_reasons(plan: EnginePlan, state: PlanState, title: str) -> None:
    """Print each reason for a state once, with its engines."""
    from mmedge.cli.output import plain, stdout_console

    labels: dict[str, list[str]] = {}
    for engine in plan.in_state(state):
        labels.setdefault(engine.reason, []).append(engine.label)
    for reason, names in labels.items():
        stdout_console().print(f"{title}: {plain(', '.join(names))}: {plain(reason)}")


def _document(
    bundle: Path, plan: EnginePlan, engines: Iterable[dict[str, object]]
) -> dict[str, object]:
    document = {"path": str(bundle), "target": plan.backend, "version": plan.version}
    return document | {"engines": list(engines)}


def _planned(engine: PlannedEngine) -> dict[str, object]:
    return {
        "role": engine.role,
        "variant": engine.variant,
        "precision": engine.precision.value,
        "state": engine.state,
        "reason": engine.reason,
        "compute_capability": engine.key.compute_capability if engine.key else None,
        "profiles": [{name: asdict(axis) for name, axis in axes.items()} for axes in engine.axes],
    }


def _result(row: _Row, *, layers: bool) -> dict[str, object]:
    from mmedge.runtimes.engines.spec import count_precisions

    if row.record is None:
        return {"state": "failed", "reason": row.error}
    record = row.record
    found: dict[str, object] = {
        "state": "built" if row.built else "cached",
        "engine": None if row.path is None else str(row.path),
        "size_bytes": record.plan_size_bytes,
        "duration_s": record.duration_s,
        "precisions": count_precisions(record.layers),
        "warnings": list(record.warnings),
    }
    if layers:
        found["layers"] = [
            asdict(layer) | {"precision": layer.precision} for layer in record.layers
        ]
    return found


def _capabilities(engine: PlannedEngine) -> str:
    """Return an engine's compute capabilities, "8.9 12.0"; "-" if it is not built here."""
    if engine.key is None:
        return "-"
    names = engine.key.compute_capability.split("+")
    return " ".join(sorted(names, key=lambda name: (len(name), name)))


def _shown_axes(axes: Mapping[str, Axis]) -> str:
    ranges = (f"{name} {axis.min}/{axis.opt}/{axis.max}" for name, axis in axes.items())
    return ", ".join(ranges) or "fixed"


def _figures(row: _Row | None) -> tuple[str, ...]:
    from mmedge.cli.output import human_bytes
    from mmedge.runtimes.engines.spec import count_precisions

    if row is None:
        return ("-", "-", "-", "-", "none")
    if row.record is None:
        return ("-", "-", "-", "-", "FAILED")
    record = row.record
    counts = count_precisions(record.layers)
    return (
        human_bytes(record.plan_size_bytes),
        f"{record.duration_s:.1f}",
        str(len(record.layers)) if record.layers else "-",
        ", ".join(f"{count} {name}" for name, count in counts.items()) or "not reported",
        "built" if row.built else "from the cache",
    )
