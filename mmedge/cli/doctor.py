"""`mmedge doctor`: report on this machine and the variants of a bundle that it can run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmedge.cli.options import JsonOption

if TYPE_CHECKING:
    from rich.text import Text

    from mmedge.bundle import Bundle
    from mmedge.machine.gpus import Gpu
    from mmedge.machine.report import Machine
    from mmedge.runtimes.backends import EngineFacts
    from mmedge.sessions.readiness import RunOption

__all__ = ["doctor"]

_STYLES = {"ready": "green", "build": "yellow", "needs": "red", "no": "dim"}


def doctor(
    bundle: Annotated[
        Path | None,
        typer.Argument(help="Bundle to check against this machine."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Describe this machine: GPU, driver, CUDA, JetPack, engines, memory, power mode.

    With a bundle: which variants run here, what the others need, and the command that installs it.
    Exits with 1 if a role of the bundle has no variant that can run here.
    """
    from mmedge.bundle import open_bundle
    from mmedge.cli.output import print_error, print_json
    from mmedge.machine.report import look_at_machine
    from mmedge.sessions.readiness import judge, runs_here

    opened = open_bundle(bundle) if bundle is not None else None
    machine = look_at_machine()
    options = judge(opened, machine) if opened is not None else ()
    if json:
        document: dict[str, object] = {"machine": _document(machine)}
        if opened is not None:
            document |= {
                "path": str(opened.path),
                "runs_here": runs_here(options),
                "variants": [asdict(option) for option in options],
            }
        print_json(document)
    else:
        _print_machine(machine)
        if opened is not None:
            _print_bundle(opened, options)
    if opened is not None and not runs_here(options):
        lacking = [
            role
            for role in opened.manifest.roles
            if not any(
                option.role == role and option.state in ("ready", "build") for option in options
            )
        ]
        print_error(
            f"{opened.path}: nothing here can run {' or '.join(lacking)}. See above for what is "
            "missing and how to install it."
        )
        raise typer.Exit(1)


def _document(machine: Machine) -> dict[str, object]:
    document = asdict(machine)
    document["cache"] = str(machine.cache)
    return document


def _print_machine(machine: Machine) -> None:
    from rich.text import Text

    from mmedge.cli.output import plain, stdout_console
    from mmedge.cli.tables import facts

    console = stdout_console()
    for title, lines in (("Machine", _hardware(machine)), ("Software", _software(machine))):
        console.print(Text(title, style="bold"))
        console.print(facts(lines))
    for note in machine.notes:
        console.print(Text(f"! {plain(note)}", style="yellow"))


def _hardware(machine: Machine) -> Iterator[tuple[str, str]]:
    from mmedge.cli.output import human_bytes

    yield "system", machine.system + (", in a container" if machine.container else "")
    processor = machine.processor
    share = f"{processor.allowed} of {processor.online}"
    features = f"; {', '.join(processor.features)}" if processor.features else ""
    yield "processor", f"{processor.name} ({processor.architecture}), {share} cores{features}"
    if machine.memory_bytes is not None:
        free = f", {human_bytes(machine.free_bytes)} free" if machine.free_bytes is not None else ""
        yield "memory", f"{human_bytes(machine.memory_bytes)}{free}"
    jetson = machine.jetson
    if jetson is not None:
        yield "board", jetson.model
        release = f"L4T {jetson.l4t}" if jetson.l4t else "L4T unknown"
        yield "JetPack", f"{jetson.jetpack or 'unknown'} ({release})"
        yield "power mode", jetson.power_mode or "unknown (nvpmodel -q)"
    for index, gpu in enumerate(machine.gpus):
        yield f"GPU {index}", _gpu(gpu)
    if not machine.gpus:
        yield "GPU", "no NVIDIA GPU: CUDA and TensorRT need one"
    else:
        yield "CUDA", _cuda(machine)
    yield "energy", machine.energy or "no counter"


def _gpu(gpu: Gpu) -> str:
    from mmedge.cli.output import human_bytes

    parts = [gpu.name, f"compute capability {gpu.compute_capability or 'unknown'}"]
    if gpu.integrated:
        parts.append("shares the memory")
    elif gpu.memory_bytes is not None:
        free = f", {human_bytes(gpu.free_bytes)} free" if gpu.free_bytes is not None else ""
        parts.append(human_bytes(gpu.memory_bytes) + free)
    return ", ".join(parts)


def _cuda(machine: Machine) -> str:
    cuda = machine.cuda
    parts = [f"driver {cuda.driver}"] if cuda.driver else []
    parts += [f"serves CUDA {cuda.serves}"] if cuda.serves else []
    parts += [f"toolkit {cuda.toolkit}"] if cuda.toolkit else []
    parts.append(f"cuda-bindings {cuda.bindings}" if cuda.bindings else "no cuda-bindings")
    return ", ".join(parts)


def _software(machine: Machine) -> Iterator[tuple[str, str]]:
    from mmedge.cli.output import human_bytes

    python = machine.python
    kind = ""
    if python.virtual:
        kind = " (virtual environment" + (
            ", sees the system's packages)" if python.sees_system else ")"
        )
    yield "mmedge", f"{machine.mmedge}, Python {python.version}{kind}"
    for engine in machine.engines:
        yield engine.name, _engine(engine).removeprefix(f"{engine.name} ")
    free = ""
    if machine.cache_free_bytes is not None:
        free = f", {human_bytes(machine.cache_free_bytes)} free"
    yield "cache", f"{machine.cache}{free}"


def _engine(engine: EngineFacts) -> str:
    if engine.version is None:
        return (
            f"not in this Python; {engine.elsewhere} is on the system"
            if engine.elsewhere
            else "not installed"
        )
    if engine.fault:
        return f"{engine.version}, does not start"
    from mmedge.runtimes.backends import backend

    offers = ", ".join(engine.offers)
    if offers and backend(engine.name).builder is not None:
        offers = f"builds for {offers}"
    place = f"; loaded from {Path(engine.module).parent}" if engine.module else ""
    return f"{engine.version}{f': {offers}' if offers else ''}{place}"


def _print_bundle(bundle: Bundle, options: tuple[RunOption, ...]) -> None:
    from rich.text import Text

    from mmedge.cli.output import plain, stdout_console
    from mmedge.cli.tables import role_rows, table

    console = stdout_console()
    heads = list(dict.fromkeys((option.backend, option.device) for option in options))
    obstacles = list(
        dict.fromkeys((option.reason, option.command) for option in options if option.reason)
    )
    title = plain(f"{bundle.manifest.name} ({bundle.path})")
    console.print(Text(f"\n{title}", style="bold"))
    cells = {
        (option.role, option.variant, (option.backend, option.device)): option for option in options
    }
    rows: dict[str, list[tuple[str | Text, ...]]] = {
        role: [
            (
                variant.name,
                *(_cell(cells[role, variant.name, head], obstacles) for head in heads),
            )
            for variant in entry.variants
        ]
        for role, entry in bundle.manifest.roles.items()
    }
    columns = (f"{name}\n{device}" for name, device in heads)
    console.print(table("variant", *columns, rows=role_rows(rows)))
    for number, (reason, command) in enumerate(obstacles, 1):
        said = f"{reason[0].upper()}{reason[1:]}{':' if command else '.'}"
        console.print(Text(f"({number}) {plain(said)}"))
        if command:
            console.print(Text(f"      {plain(command)}"), soft_wrap=True)


def _cell(option: RunOption, obstacles: list[tuple[str, str]]) -> Text:
    from rich.text import Text

    mark = f" ({obstacles.index((option.reason, option.command)) + 1})" if option.reason else ""
    return Text(f"{option.state}{mark}", style=_STYLES[option.state])
