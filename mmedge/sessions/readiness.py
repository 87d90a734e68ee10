"""Readiness of a bundle's variants on a machine, with reasons and commands to fix them.

Decided from what is known of the machine and from the manifest alone; no graph is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mmedge.bundle.manifest import Variant
from mmedge.bundle.opening import Bundle
from mmedge.errors import MmedgeError
from mmedge.machine.report import Machine
from mmedge.runtimes.backends import BACKENDS, backend
from mmedge.runtimes.session import SessionOptions
from mmedge.sessions.opening import facts_of, graph_of, with_axes

__all__ = ["RunOption", "State", "columns", "judge", "runs_here"]

State: TypeAlias = Literal["ready", "build", "needs", "no"]
"""ready: runs now. build: runs once its engine is built, which takes minutes. needs: something has
to be installed. no: not on this machine, or not with this variant."""

IsPrepared: TypeAlias = Callable[[Bundle, Variant, str, str], bool]


@dataclass(frozen=True, slots=True)
class RunOption:
    """One variant in one backend on one device.

    Attributes:
        role: Role name.
        variant: Variant name.
        backend: Name in mmedge.runtimes.BACKENDS.
        device: "cpu" or "cuda".
        state: Whether it runs.
        reason: Why it does not, or not yet; "" if it is ready.
        command: What mends it, "" where nothing to type does.
    """

    role: str
    variant: str
    backend: str
    device: str
    state: State
    reason: str = ""
    command: str = ""


def columns(machine: Machine) -> tuple[tuple[str, str], ...]:
    """Return the backends and devices to show as columns for a machine.

    What its hardware can never have is left out, unless it is installed.
    """
    return tuple(
        (name, device)
        for name in BACKENDS
        for device in backend(name).devices_on(machine.hardware, machine.engine(name))
    )


def judge(
    bundle: Bundle, machine: Machine, *, is_prepared: IsPrepared | None = None
) -> tuple[RunOption, ...]:
    """Return the readiness of every variant in every backend of `columns`.

    Args:
        bundle: An opened bundle.
        machine: From look_at_machine.
        is_prepared: Returns whether the engine of a variant is in the cache of a backend, by the
            names of backend and device; None asks the backends of this process.
    """
    places = columns(machine)
    return tuple(
        _judge(bundle, role, variant, machine, place, is_prepared or _is_prepared)
        for role, entry in bundle.manifest.roles.items()
        for variant in entry.variants
        for place in places
    )


def runs_here(options: tuple[RunOption, ...]) -> bool:
    """Return whether every role has a variant that runs, possibly after an engine build."""
    roles = {option.role for option in options}
    return roles == {option.role for option in options if option.state in ("ready", "build")}


def _judge(
    bundle: Bundle,
    role: str,
    variant: Variant,
    machine: Machine,
    place: tuple[str, str],
    is_prepared: IsPrepared,
) -> RunOption:
    name, device = place
    known = backend(name)
    obstacle = known.explain(facts_of(variant), device, machine.hardware, machine.engine(name))
    if obstacle is not None:
        command = obstacle.command
        if obstacle.convert_to:
            source = bundle.manifest.provenance.source
            command = f"mmedge convert {source} --target {obstacle.convert_to} -o NAME.mmedge"
            command += "  # on the workstation"
        return RunOption(role, variant.name, name, device, obstacle.state, obstacle.reason, command)
    if known.builder is not None and not is_prepared(bundle, variant, name, device):
        reason = "its engine has to be built first, minutes on a small machine"
        command = f"mmedge build {bundle.path} --target {name}"
        return RunOption(role, variant.name, name, device, "build", reason, command)
    return RunOption(role, variant.name, name, device, "ready")


def _is_prepared(bundle: Bundle, variant: Variant, name: str, device: str) -> bool:
    options = with_axes(bundle, variant, SessionOptions(device=device))
    try:
        return backend(name).is_prepared(graph_of(bundle, variant, name, device), options)
    except MmedgeError:
        return False
