"""Engine build plan for a bundle.

Planning reads the manifest and the cache and builds nothing. An engine is built from the portable
layout of a variant; what keeps a variant from becoming one is found before the minutes that a build
takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

from mmedge.bundle.manifest import Variant
from mmedge.bundle.opening import Bundle
from mmedge.errors import BackendError, BackendUnavailableError, EngineBuildError, InputError
from mmedge.runtimes.backends import backend, engine_backends
from mmedge.runtimes.engines.building import EngineBuilder
from mmedge.runtimes.engines.profiles import shape_profiles
from mmedge.runtimes.engines.spec import BuildHost, BuildSettings, EngineKey, EngineRequest
from mmedge.runtimes.engines.store import CachedEngine, EngineCache, LoadedEngine
from mmedge.runtimes.session import BuildProgress
from mmedge.sessions.axes import dynamic_axes
from mmedge.sessions.opening import facts_of, graph_of
from mmedge.specs import Axis, Precision, did_you_mean

__all__ = [
    "EnginePlan",
    "PlanOptions",
    "PlanState",
    "PlannedEngine",
    "build_planned",
    "plan_engines",
    "unbuildable",
]

PlanState: TypeAlias = Literal["build", "cached", "elsewhere", "refused"]
"""Planned state of a variant, see PlannedEngine."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Build options.

    Attributes:
        compute_capabilities: See EngineRequest. "any" becomes those that can run the variant.
        roles: Only these; None for all.
        precisions: Only variants of these precisions or names; None for all.
        axes: Bounds of dynamic axes by name, a set for each optimization profile; what they leave
            out is taken from the manifest, as `mmedge.load` does.
        settings: Flags of the build.
        device: Number of the GPU to build for, where no compute capability is named.
    """

    compute_capabilities: tuple[str, ...] = ()
    roles: tuple[str, ...] | None = None
    precisions: tuple[str, ...] | None = None
    axes: tuple[Mapping[str, Axis], ...] = ()
    settings: BuildSettings = field(default_factory=BuildSettings)
    device: int = 0


@dataclass(frozen=True, slots=True)
class PlannedEngine:
    """One variant of one role, and its planned state.

    Attributes:
        role: Role name.
        variant: Variant name.
        precision: Of the variant.
        state: "build" if it is to be built, "cached" if it lies in the cache, "elsewhere" if it can
            be built, but not on this machine, "refused" if it cannot be built.
        reason: Why it is to be built or cannot be; "" for one that is cached.
        model: The ONNX file, None for one that is refused.
        axes: Bounds of the dynamic axes, a set for each profile.
        key: What the engine is found by, None for one that is not built here.
    """

    role: str
    variant: str
    precision: Precision
    state: PlanState
    reason: str = ""
    model: Path | None = None
    axes: tuple[Mapping[str, Axis], ...] = ()
    key: EngineKey | None = None

    @property
    def label(self) -> str:
        """Display name: role and variant."""
        return f"{self.role}/{self.variant}"


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """Engines to build, and the build machine.

    Attributes:
        backend: That builds.
        version: Of its installed library, None if there is none.
        device: Number of the GPU that is built for, where no compute capability is named.
        engines: One for each variant that was requested, in the bundle's order.
    """

    backend: str
    version: str | None
    device: int
    engines: tuple[PlannedEngine, ...]

    def in_state(self, state: PlanState) -> tuple[PlannedEngine, ...]:
        """Return the engines of one state."""
        return tuple(engine for engine in self.engines if engine.state == state)


@dataclass(frozen=True, slots=True)
class _Wanted:
    bundle: Bundle
    backend: str
    builder: EngineBuilder
    options: PlanOptions
    host: BuildHost | None
    not_here: str
    cache: EngineCache = field(default_factory=EngineCache)


def plan_engines(
    bundle: Bundle,
    backend_name: str,
    options: PlanOptions | None = None,
    *,
    elsewhere: bool = False,
) -> EnginePlan:
    """Return the engines of a bundle that can be built, that exist, or that cannot, with reasons.

    Args:
        bundle: An opened bundle.
        backend_name: That builds.
        options: What is to be built; None for engines of all variants for the GPU of this machine.
        elsewhere: Plan for another machine too, where the library or the GPU is missing here.

    Raises:
        BackendUnavailableError: If the library is not installed, or it is to build for the GPU of
            this machine and there is none; unless `elsewhere`.
        BackendError: If the backend builds no engines, or a model of the bundle is damaged.
        EngineBuildError: If it does not build for a compute capability that is named.
        InputError: If there is no such role, variant or axis.
        StorageError: If others may write the cache's folder.
    """
    options = options or PlanOptions()
    builder = backend(backend_name).builder
    if builder is None:
        raise BackendError(
            f"The backend '{backend_name}' builds no engines: expected one of "
            f"{list(engine_backends())}."
        )
    host, not_here = None, ""
    try:
        host = builder.host(options.compute_capabilities, options.device)
    except BackendUnavailableError as error:
        if not elsewhere:
            raise
        not_here = str(error)
    _check_axes(bundle, options)
    wanted = _Wanted(bundle, backend_name, builder, options, host, not_here)
    engines = tuple(_plan(wanted, *pair) for pair in _chosen(bundle, options))
    version = backend(backend_name).engine_version()
    return EnginePlan(backend_name, version, options.device, engines)


def build_planned(
    plan: EnginePlan,
    engine: PlannedEngine,
    progress: BuildProgress | None = None,
    on_wait: Callable[[str], None] | None = None,
) -> LoadedEngine:
    """Return an engine of a plan, building it on a cache miss.

    Args:
        plan: The plan.
        engine: One of its engines.
        progress: See EngineBuilder.build.
        on_wait: See EngineBuilder.build.

    Raises:
        EngineBuildError: If it is refused by the plan, or the build fails.
        BackendError, StorageError: As EngineBuilder.build.
        KeyboardInterrupt: If it was interrupted.
    """
    model, key, builder = engine.model, engine.key, backend(plan.backend).builder
    if model is None or key is None or builder is None:
        raise EngineBuildError(f"{engine.label} cannot be built here: {engine.reason}")
    return builder.build(model, key, device=plan.device, progress=progress, on_wait=on_wait)


def unbuildable(variant: Variant, backend_name: str) -> str | None:
    """Return why a variant has no engine in a backend on any machine, and the fix.

    None if one can be built, or the backend needs none.
    """
    known = backend(backend_name)
    device = "cpu" if known.builder is None else known.builder.runs_on
    obstacle = known.unsupported(facts_of(variant), device)
    if obstacle is None or not obstacle.convert_to:
        return None if obstacle is None else obstacle.reason
    return (
        f"{obstacle.reason}: convert with `mmedge convert MODEL --target {obstacle.convert_to} "
        f"--precision {variant.precision.value}`"
    )


def _plan(wanted: _Wanted, role: str, variant: Variant) -> PlannedEngine:
    options, builder = wanted.options, wanted.builder
    refused = PlannedEngine(role, variant.name, variant.precision, "refused")
    reason = unbuildable(variant, wanted.backend)
    if reason is not None:
        return replace(refused, reason=reason)
    try:
        targets = builder.targets(options.compute_capabilities, variant.precision.value)
    except EngineBuildError as error:
        return replace(refused, reason=str(error))
    inputs = [entry.spec() for entry in wanted.bundle.role(role).inputs]
    usual = dynamic_axes(wanted.bundle.manifest, role)
    used = {axis for spec in inputs for axis in spec.shape if isinstance(axis, str)}
    axes = tuple(
        {name: bounds for name, bounds in (usual | dict(given)).items() if name in used}
        for given in options.axes or ({},)
    )
    model = graph_of(wanted.bundle, variant, wanted.backend, builder.runs_on)
    planned = replace(refused, model=model, axes=axes)
    if wanted.host is None:
        return replace(planned, state="elsewhere", reason=wanted.not_here)
    profiles = shape_profiles(inputs, axes)
    request = EngineRequest(wanted.backend, targets, profiles, options.settings)
    key = wanted.cache.key_for(model, request, wanted.host)
    found = wanted.cache.find(key)
    if isinstance(found, CachedEngine):
        return replace(planned, state="cached", key=key)
    return replace(planned, state="build", reason=found.reason, key=key)


def _chosen(bundle: Bundle, options: PlanOptions) -> list[tuple[str, Variant]]:
    names = tuple(dict.fromkeys(options.roles or bundle.manifest.roles))
    held = [(role, variant) for role in names for variant in bundle.role(role).variants]
    if options.precisions is None:
        return held
    for wanted in options.precisions:
        if not any(wanted in (variant.name, variant.precision.value) for _, variant in held):
            raise InputError(bundle.no_variant(wanted, names))
    return [
        (role, variant)
        for role, variant in held
        if {variant.name, variant.precision.value} & set(options.precisions)
    ]


def _check_axes(bundle: Bundle, options: PlanOptions) -> None:
    """Check that bounds name axes of the roles: a misspelt one would have no effect."""
    known = {
        axis
        for role in options.roles or bundle.manifest.roles
        for entry in bundle.role(role).inputs
        for axis in entry.shape
        if isinstance(axis, str)
    }
    for name in (name for given in options.axes for name in given):
        if name not in known:
            raise InputError(
                f"{bundle.path}: no input has a dynamic axis '{name}', expected one of "
                f"{sorted(known)}.{did_you_mean(name, known)}"
            )
