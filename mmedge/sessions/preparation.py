"""Which engines can be built of a bundle, for what, and why not the others.

Planning reads the manifest and the cache and builds nothing. An engine is built from the portable
layout of a variant; what keeps a variant from becoming one is told before the minutes that a build
takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from mmedge.bundle.manifest import Variant
from mmedge.bundle.opening import Bundle
from mmedge.errors import BackendUnavailableError, EngineBuildError, InputError
from mmedge.runtimes.cuda.runtime import Device, cuda_version, driver_version
from mmedge.runtimes.session import BuildProgress
from mmedge.runtimes.trt.cache.store import CachedEngine, EngineCache, LoadedEngine
from mmedge.runtimes.trt.engines import (
    BuildSettings,
    EngineKey,
    EngineRequest,
    Flavour,
)
from mmedge.runtimes.trt.flavours import ANY, LoadedFlavour, installed_version, load_flavour
from mmedge.runtimes.trt.opening import find_or_build
from mmedge.runtimes.trt.profiles import shape_profiles
from mmedge.runtimes.trt.targets import check_named, check_needs, resolve
from mmedge.sessions.axes import dynamic_axes
from mmedge.specs import Axis, Precision, did_you_mean

__all__ = [
    "EnginePlan",
    "PlanOptions",
    "PlanState",
    "PlannedEngine",
    "build_planned",
    "default_flavour",
    "plan_engines",
    "why_not",
]

PlanState: TypeAlias = Literal["build", "cached", "elsewhere", "refused"]
"""What is to become of a variant, see PlannedEngine."""

_CONVERT = "convert with `mmedge convert MODEL --target tensorrt --precision {}`"


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What is to be built.

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
    """One variant of one role, and what is to become of it.

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
        """Role and variant, for people."""
        return f"{self.role}/{self.variant}"


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What will be built, and on what.

    Attributes:
        flavour: Of TensorRT.
        library: The TensorRT that builds, None if it is not installed here.
        device: Number of the GPU that is built for, where no compute capability is named.
        engines: One for each variant that was asked for, in the bundle's order.
    """

    flavour: Flavour
    library: LoadedFlavour | None
    device: int
    engines: tuple[PlannedEngine, ...]

    def in_state(self, state: PlanState) -> tuple[PlannedEngine, ...]:
        """Return the engines of one state."""
        return tuple(engine for engine in self.engines if engine.state == state)


@dataclass(frozen=True, slots=True)
class _Wanted:
    bundle: Bundle
    flavour: Flavour
    library: LoadedFlavour | None
    options: PlanOptions
    gpu: tuple[str, str, str]
    not_here: str
    cache: EngineCache = field(default_factory=EngineCache)


def default_flavour() -> Flavour:
    """Return the flavour to build with where none is named.

    TensorRT where it is installed, as on a Jetson and on a server, else TensorRT-RTX.
    """
    return "tensorrt" if installed_version("tensorrt") is not None else "tensorrt-rtx"


def plan_engines(
    bundle: Bundle,
    flavour: Flavour,
    options: PlanOptions | None = None,
    *,
    elsewhere: bool = False,
) -> EnginePlan:
    """Return which engines can be built of a bundle, which are there, and why not the others.

    Args:
        bundle: An opened bundle.
        flavour: Of TensorRT.
        options: What is to be built; None for engines of all variants for the GPU of this machine.
        elsewhere: Plan for another machine too, where the flavour or the GPU is missing here.

    Raises:
        BackendUnavailableError: If the flavour is not installed, or it is to build for the GPU of
            this machine and there is none; unless `elsewhere`.
        BackendError: If a model of the bundle is damaged.
        EngineBuildError: If it does not build for a compute capability that is named.
        InputError: If there is no such role, variant or axis.
        StorageError: If others may write the cache's folder.
    """
    options = options or PlanOptions()
    library: LoadedFlavour | None = None
    gpu, not_here = ("", "", ""), ""
    try:
        library = load_flavour(flavour)
        check_named(library, options.compute_capabilities)
        gpu = gpu if options.compute_capabilities else _this_gpu(library, options.device)
    except BackendUnavailableError as error:
        if not elsewhere:
            raise
        not_here = str(error)
    _check_axes(bundle, options)
    wanted = _Wanted(bundle, flavour, library, options, gpu, not_here)
    engines = tuple(_plan(wanted, *pair) for pair in _chosen(bundle, options))
    return EnginePlan(flavour, library, options.device, engines)


def build_planned(
    plan: EnginePlan,
    engine: PlannedEngine,
    progress: BuildProgress | None = None,
    wait_told: Callable[[str], None] | None = None,
) -> LoadedEngine:
    """Return an engine of a plan, built into the cache if need be.

    Args:
        plan: That it is of.
        engine: One of its engines.
        progress: Told how far the build is.
        wait_told: Told what there is to wait for, where another process builds the same; None
            tells `progress`, as a phase.

    Raises:
        EngineBuildError: If it is refused by the plan, or the build fails.
        BackendError: If the model is damaged.
        StorageError: If the cache's folder cannot be written, which is seen before the build, the
            disk is full, or others may write the folder.
        KeyboardInterrupt: If it was interrupted.
    """
    model, key, library = engine.model, engine.key, plan.library
    if model is None or key is None or library is None:
        raise EngineBuildError(f"{engine.label} cannot be built here: {engine.reason}")
    return find_or_build(
        library,
        model,
        key,
        device=plan.device,
        progress=progress,
        wait_told=wait_told,
        or_in_memory=False,
    )


def why_not(variant: Variant) -> str | None:
    """Return why no engine can be built of a variant on any machine, None if one can."""
    recipe, precision = variant.recipe, variant.precision.value
    if "portable" not in variant.models:
        operators = "its operators are ONNX Runtime's"
        if recipe.get("method") == "DynamicInt8":
            operators = "it computes scales in each call, with ONNX Runtime's operators"
        return f"{operators}: {_CONVERT.format(precision)}"
    if recipe.get("activations") == "uint8":
        return (
            "its activations are unsigned, and TensorRT takes signed, symmetric ones: "
            + _CONVERT.format(precision)
        )
    if recipe.get("method") == "WeightOnly":
        if recipe.get("symmetric") is False:
            return "its weights have zero points, and TensorRT takes symmetric ones: " + (
                _CONVERT.format(precision)
            )
        if recipe.get("bits") == 8:
            return (
                "TensorRT folds blocked 8-bit weights to float: take int8 with signed activations, "
                + _CONVERT.format("int8")
            )
    return None


def _plan(wanted: _Wanted, role: str, variant: Variant) -> PlannedEngine:
    precision = variant.precision
    reason = why_not(variant)
    if reason is not None:
        return PlannedEngine(role, variant.name, precision, "refused", reason)
    try:
        targets = _targets(wanted, precision)
    except EngineBuildError as error:
        return PlannedEngine(role, variant.name, precision, "refused", str(error))
    inputs = [entry.spec() for entry in wanted.bundle.role(role).inputs]
    usual = dynamic_axes(wanted.bundle.manifest, role)
    used = {axis for spec in inputs for axis in spec.shape if isinstance(axis, str)}
    axes = tuple(
        {name: bounds for name, bounds in (usual | dict(given)).items() if name in used}
        for given in wanted.options.axes or ({},)
    )
    model = wanted.bundle.model_path(variant, layouts=("portable",))
    request = EngineRequest(
        wanted.flavour, targets, shape_profiles(inputs, axes), wanted.options.settings
    )
    if wanted.library is None or wanted.not_here:
        told = wanted.not_here
        return PlannedEngine(role, variant.name, precision, "elsewhere", told, model, axes)
    cuda, driver, capability = wanted.gpu
    key = wanted.cache.key_for(
        model,
        request,
        version=wanted.library.version,
        cuda=cuda,
        driver=driver,
        compute_capability=capability,
    )
    found = wanted.cache.find(key)
    cached = isinstance(found, CachedEngine)
    return PlannedEngine(
        role,
        variant.name,
        precision,
        "cached" if cached else "build",
        "" if isinstance(found, CachedEngine) else found.reason,
        model,
        axes,
        key,
    )


def _targets(wanted: _Wanted, precision: Precision) -> tuple[str, ...]:
    """Return what a variant is built for.

    Raises:
        EngineBuildError: If a compute capability that is named cannot compute it.
    """
    named = wanted.options.compute_capabilities
    if wanted.library is None:
        return named
    dtypes = {precision.value}
    targets = resolve(wanted.library, named, dtypes)
    if named == (ANY,) and not targets:
        raise EngineBuildError(f"No GPU that is known here computes {precision.value}.")
    check_needs(wanted.library, targets, dtypes)
    return targets


def _this_gpu(library: LoadedFlavour, device: int) -> tuple[str, str, str]:
    """Return versions of CUDA and driver, and the compute capability, of a GPU of this machine."""
    try:
        properties = Device(device).properties
        return cuda_version(), driver_version(), properties.compute_capability
    except BackendUnavailableError as error:
        way_out = (
            f"Name what to build for: {', '.join(library.capabilities)} or any."
            if library.capabilities
            else "Build on the machine that is to run it, or for desktop GPUs with tensorrt-rtx."
        )
        raise BackendUnavailableError(
            f"Engines are built for the GPU of this machine unless others are named: {error} "
            f"{way_out}"
        ) from error


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
    """Check that bounds are of axes that the roles have: a misspelt one would bound nothing."""
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
