"""What `mmedge build` prints of a plan, of what was built, and of the layers of engines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmedge.cli.output import human_bytes, plain, stdout_console
from mmedge.cli.tables import role_rows, table
from mmedge.runtimes.backends import backend
from mmedge.runtimes.engines.spec import count_precisions

if TYPE_CHECKING:
    from mmedge.cli.progress import Steps
    from mmedge.errors import EngineBuildError
    from mmedge.runtimes.engines.record import EngineRecord
    from mmedge.runtimes.engines.store import LoadedEngine
    from mmedge.runtimes.session import BuildProgress
    from mmedge.sessions.preparation import EnginePlan, PlannedEngine
    from mmedge.specs import Axis

__all__ = [
    "BuiltRow",
    "begin_build",
    "build_document",
    "capabilities",
    "plan_document",
    "print_built",
    "print_layers",
    "print_plan",
]

_STATES = {
    "build": "to build here",
    "cached": "in the cache",
    "elsewhere": "elsewhere",
    "refused": "no",
}
_MAX_NODES = 4


@dataclass(frozen=True, slots=True)
class BuiltRow:
    """What came of one planned engine.

    Attributes:
        engine: As planned.
        record: Of the engine, None if the build failed.
        path: Where it lies, None if it failed or the cache could not be written.
        built: Whether it was built just now.
        error: Why it failed, "" if it did not.
    """

    engine: PlannedEngine
    record: EngineRecord | None = None
    path: Path | None = None
    built: bool = False
    error: str = ""

    @classmethod
    def of(cls, engine: PlannedEngine, found: LoadedEngine | EngineBuildError) -> BuiltRow:
        """Return the row of an engine that was found or built, or of a build that failed.

        The plan itself, which may be large, is let go.
        """
        if isinstance(found, Exception):
            return cls(engine, error=str(found))
        return cls(engine, found.record, found.path, built=found.miss is not None)


def begin_build(steps: Steps, engine: PlannedEngine) -> BuildProgress | None:
    """Show that an engine is built next.

    Returns:
        The callback for its phases; None in a log, which gets a line at once instead, since a
        build can take minutes.
    """
    name = f"{engine.label}, for {capabilities(engine)}"
    steps.step(name)
    if steps.animated:
        return steps.part
    steps.say(f"{name} ...")
    return None


def print_plan(plan: EnginePlan) -> None:
    """Print what would be built, for what, and why not the others."""
    console = stdout_console()
    console.print(_heading(plan))
    rows: dict[str, list[tuple[str, ...]]] = {}
    for engine in plan.engines:
        cells = (
            engine.variant,
            _STATES[engine.state],
            capabilities(engine),
            "; ".join(map(_axes, engine.axes)),
            engine.reason if engine.state == "build" else "",
        )
        rows.setdefault(engine.role, []).append(cells)
    console.print(table("variant", "engine", "for", "profiles", "why", rows=role_rows(rows)))
    for reason, engines in _by_reason(plan.in_state("elsewhere")).items():
        _print_reason("Not on this machine", reason, engines)
    for reason, engines in _by_reason(plan.in_state("refused")).items():
        _print_reason("No engine", reason, engines)


def print_built(plan: EnginePlan, rows: Sequence[BuiltRow]) -> None:
    """Print what was built and found, with how many layers compute in which precision."""
    console = stdout_console()
    console.print(_heading(plan))
    numbers = ("size", "time s", "layers")
    by_label = {row.engine.label: row for row in rows}
    shown: dict[str, list[tuple[str, ...]]] = {}
    for engine in plan.engines:
        cells = (engine.variant, capabilities(engine), *_figures(by_label.get(engine.label)))
        shown.setdefault(engine.role, []).append(cells)
    columns = ("variant", "for", *numbers, "precisions", "")
    console.print(table(*columns, numbers=numbers, rows=role_rows(shown)))
    for row in rows:
        for warning in row.record.warnings if row.record is not None else ():
            console.print(f"Note: {plain(row.engine.label)}: {plain(warning)}")
    for reason, engines in _by_reason(plan.in_state("refused")).items():
        _print_reason("No engine", reason, engines)
    if any(row.record is not None for row in rows):
        console.print(
            f"mmedge.load(..., backend='{plan.backend}') finds them on such a GPU. There, `mmedge "
            f"verify BUNDLE --device gpu --backend {plan.backend}` checks their outputs. "
            "`mmedge cache list` shows all engines."
        )


def print_layers(rows: Iterable[BuiltRow]) -> None:
    """Print the layers of each engine: what they compute in, and of which nodes they were made."""
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


def plan_document(bundle: Path, plan: EnginePlan) -> dict[str, object]:
    """Return a plan as JSON."""
    return _document(bundle, plan) | {"engines": [_planned(engine) for engine in plan.engines]}


def build_document(
    bundle: Path, plan: EnginePlan, rows: Sequence[BuiltRow], *, layers: bool
) -> dict[str, object]:
    """Return what was built as JSON.

    Args:
        bundle: Its folder.
        plan: What was planned.
        rows: What came of it.
        layers: Whether to list every layer.
    """
    built = [_planned(row.engine) | _result(row, layers=layers) for row in rows]
    refused = [_planned(engine) for engine in plan.in_state("refused")]
    return _document(bundle, plan) | {"engines": built + refused}


def _document(bundle: Path, plan: EnginePlan) -> dict[str, object]:
    return {"path": str(bundle), "target": plan.backend, "version": plan.version}


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


def _result(row: BuiltRow, *, layers: bool) -> dict[str, object]:
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


def _heading(plan: EnginePlan) -> str:
    return f"{backend(plan.backend).title} {plan.version or '(not installed here)'}"


def _by_reason(engines: Iterable[PlannedEngine]) -> dict[str, list[PlannedEngine]]:
    found: dict[str, list[PlannedEngine]] = {}
    for engine in engines:
        found.setdefault(engine.reason, []).append(engine)
    return found


def _print_reason(what: str, reason: str, engines: Iterable[PlannedEngine]) -> None:
    labels = ", ".join(engine.label for engine in engines)
    stdout_console().print(f"{what}: {plain(labels)}: {plain(reason)}")


def capabilities(engine: PlannedEngine) -> str:
    """Return what an engine is for, "8.9 12.0"; "-" where nothing is built here."""
    if engine.key is None:
        return "-"
    names = engine.key.compute_capability.split("+")
    return " ".join(sorted(names, key=lambda name: (len(name), name)))


def _axes(axes: Mapping[str, Axis]) -> str:
    told = (f"{name} {axis.min}/{axis.opt}/{axis.max}" for name, axis in axes.items())
    return plain(", ".join(told)) or "fixed"


def _figures(row: BuiltRow | None) -> tuple[str, ...]:
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
