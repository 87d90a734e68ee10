"""`mmedge build`: the engines of a bundle, built ahead."""

from __future__ import annotations

from collections.abc import Mapping
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
    from mmedge.errors import EngineBuildError
    from mmedge.runtimes.engines.store import LoadedEngine
    from mmedge.sessions.preparation import EnginePlan, PlannedEngine
    from mmedge.specs import Axis

__all__ = ["build"]


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
            help="GPUs that the engines are to run on, such as 8.9,12.0 (RTX 40, RTX 50), or any, "
            "for a backend that needs no GPU to build. May be given several times.",
            show_default="the GPU of this machine",
        ),
    ] = None,
    role: RolesOption = None,
    precision: PrecisionsOption = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MIN,OPT,MAX",
            help="Samples a call: min, opt, max. Given several times, there is an "
            "optimization profile for each.",
            show_default="1,1,8 for images, 1,1,32 for texts",
        ),
    ] = None,
    sequence: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MIN,OPT,MAX",
            help="Tokens a text, likewise: as often as --batch, or once.",
            show_default="1,16 and the tokenizer's length",
        ),
    ] = None,
    workspace_mib: Annotated[
        int, typer.Option(min=1, help="The most scratch memory that a kernel may use on the GPU.")
    ] = 1024,
    weight_streaming: Annotated[
        bool,
        typer.Option("--weight-streaming", help="Weights may stay on the host and be streamed in."),
    ] = False,
    refittable: Annotated[
        bool,
        typer.Option(
            "--refittable",
            help="Your own programs can exchange weights; load takes no such engine. Needs a GPU.",
        ),
    ] = False,
    stripped: Annotated[
        bool,
        typer.Option(
            "--stripped",
            help="Leave the weights out; load puts them in from the bundle. Needs a GPU.",
        ),
    ] = False,
    device: Annotated[
        int, typer.Option(min=0, help="Number of the GPU to build for, where none is named.")
    ] = 0,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only tell what would be built, for what, and why not.")
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Print the layers of each engine and their precision.")
    ] = False,
    json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")] = False,
) -> None:
    """Build engines of a bundle into the engine cache, where `load` finds them.

    The precision stands in each variant's graph; --plan shows which variants become engines, and
    how to convert the others. What is in the cache already is not built again.

    Exits with 1 if a build fails; the others are built all the same.
    """
    from mmedge.bundle import open_bundle
    from mmedge.cli.engine_tables import plan_document, print_plan
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
            print_json([plan_document(bundle, made) for made in plans])
        elif not quiet:
            for made in plans:
                print_plan(made)
        return
    made = plan_engines(opened, target or engine_backend(), options)
    _require_some(bundle, made)
    _build_all(bundle, made, layers=layers, as_json=json, quiet=quiet)


def _axes(
    bundle: Bundle, batches: list[str], sequences: list[str]
) -> tuple[Mapping[str, Axis], ...]:
    """Return the bounds of axes by name, a set for each profile."""
    if batches and sequences and len(sequences) not in (1, len(batches)):
        raise typer.BadParameter(
            f"--sequence: given {len(sequences)} times, expected once, or as often as --batch "
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
    """Refuse to do nothing: where not one engine can be built, say why of each."""
    from mmedge.errors import EngineBuildError

    refused = plan.in_state("refused")
    if len(refused) == len(plan.engines):
        told = "; ".join(f"{engine.label}: {engine.reason}" for engine in refused)
        raise EngineBuildError(f"{bundle}: no engine can be built. {told}")


def _build_all(bundle: Path, plan: EnginePlan, *, layers: bool, as_json: bool, quiet: bool) -> None:
    from mmedge.cli.engine_tables import BuiltRow, build_document, print_built, print_layers
    from mmedge.cli.output import print_error, print_json
    from mmedge.cli.progress import Steps

    wanted = [engine for engine in plan.engines if engine.state != "refused"]
    with Steps(shown=not quiet) as steps:
        rows = [BuiltRow.of(engine, _build(plan, engine, steps)) for engine in wanted]
    if as_json:
        print_json(build_document(bundle, plan, rows, layers=layers))
    elif not quiet:
        print_built(plan, rows)
        if layers:
            print_layers(rows)
    failed = [row for row in rows if row.error]
    for row in failed:
        print_error(f"{row.engine.label}: {row.error}")
    if failed:
        raise typer.Exit(1)


def _build(
    plan: EnginePlan, engine: PlannedEngine, steps: Steps
) -> LoadedEngine | EngineBuildError:
    """Return an engine, or why it cannot be built: the others are to be built all the same."""
    from mmedge.cli.engine_tables import begin_build
    from mmedge.errors import EngineBuildError
    from mmedge.sessions.preparation import build_planned

    try:
        return build_planned(plan, engine, begin_build(steps, engine), steps.say)
    except EngineBuildError as error:
        return error
