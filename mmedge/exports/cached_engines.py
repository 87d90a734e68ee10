"""Engines of a bundle's graphs for export: cached ones and new builds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mmedge.bundle.opening import Bundle
from mmedge.errors import EngineMismatchError
from mmedge.exports.engine_folder import SuppliedEngine
from mmedge.exports.selection import Selection
from mmedge.exports.triton import TRITON_BACKEND
from mmedge.runtimes.engines.model_hash import model_sha256
from mmedge.runtimes.engines.spec import EngineKey
from mmedge.runtimes.engines.store import EngineCache
from mmedge.runtimes.session import BuildProgress
from mmedge.sessions.preparation import PlannedEngine, PlanOptions, build_planned, plan_engines

__all__ = ["build_engines", "cached_engines", "engines_for_triton"]


def cached_engines(
    bundle: Bundle,
    selection: Selection,
    *,
    cache: EngineCache | None = None,
    backend: str | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> tuple[SuppliedEngine, ...]:
    """Return the engines built from a graph, most recently used first.

    Of several for one backend, version and kind of GPU, which differ in their profiles or flags,
    the one used last is taken. Engines without weights are left out: they need the ONNX file and
    TensorRT's refitter to run.

    Args:
        bundle: An opened bundle.
        selection: The graph.
        cache: Where to look; None takes mmedge's own.
        backend: Only engines of this one; None takes all.
        report: Called with a sentence for each engine that is left out.

    Raises:
        BackendError: If the graph is missing or damaged.
        StorageError: If the cache cannot be read, or others may write it.
    """
    cache = cache or EngineCache()
    model = bundle.model_path(selection.variant, layouts=(selection.layout,))
    sha256 = model_sha256(model)
    found: dict[tuple[str, str, str], SuppliedEngine] = {}
    for entry in cache.entries():
        if entry.record is None or entry.record.key.model_sha256 != sha256:
            continue
        key = entry.record.key
        kind = (key.request.backend, key.version, key.compute_capability)
        if backend not in (None, key.request.backend):
            continue
        if key.request.settings.stripped:
            report(f"{_name(selection, key)} is left out: it has no weights")
        elif kind in found:
            report(f"{_name(selection, key)}: several fit, the most recently used is exported")
        else:
            try:
                found[kind] = SuppliedEngine(cache.load(key).plan, key)
            except EngineMismatchError as error:
                report(f"{_name(selection, key)} is left out: {error}")
    return tuple(found.values())


def engines_for_triton(
    bundle: Bundle, selections: Sequence[Selection], *, report: Callable[[str], None]
) -> dict[str, SuppliedEngine]:
    """Return Triton's engine of each graph, by role.

    Args:
        bundle: An opened bundle.
        selections: The graphs.
        report: Called with a sentence for each engine that is left out, and each need of one.

    Raises:
        EngineMismatchError: If the cache has no engine of a graph.
        BackendError, StorageError: As cached_engines.
    """
    plans = {}
    for selection in selections:
        found = cached_engines(bundle, selection, backend=TRITON_BACKEND, report=report)
        if not found:
            raise EngineMismatchError(
                f"{selection.role}/{selection.variant.name}: no engine of TensorRT in the cache. "
                f"Build it on the machine that serves: mmedge build {bundle.path} --target "
                f"{TRITON_BACKEND}. Or leave --engines out: ONNX Runtime runs the graph."
            )
        plans[selection.role], key = found[0], found[0].key
        report(
            f"{selection.role}: this plan runs in TensorRT {key.version} on GPUs of compute "
            f"capability {key.compute_capability} alone; the server must have both"
        )
    return plans


def build_engines(
    bundle: Bundle,
    selections: Sequence[Selection],
    backend: str,
    *,
    compute_capabilities: Sequence[str] = (),
    progress: Callable[[PlannedEngine], BuildProgress | None] = lambda _: None,
    on_wait: Callable[[str], None] | None = None,
) -> None:
    """Build missing and damaged engines of every graph into the cache.

    Args:
        bundle: An opened bundle.
        selections: The graphs.
        backend: That builds.
        compute_capabilities: See EngineRequest.
        progress: Called with each engine before it is built or found; it returns the callback for
            the build's progress.
        on_wait: See build_planned.

    Raises:
        EngineBuildError: If one of them cannot be built.
        BackendUnavailableError, BackendError, InputError, StorageError: See plan_engines.
    """
    for selection in selections:
        options = PlanOptions(
            compute_capabilities=tuple(compute_capabilities),
            roles=(selection.role,),
            precisions=(selection.variant.name,),
        )
        plan = plan_engines(bundle, backend, options)
        for engine in plan.engines:
            if engine.variant == selection.variant.name:
                build_planned(plan, engine, progress(engine), on_wait)


def _name(selection: Selection, key: EngineKey) -> str:
    return (
        f"{selection.role}/{selection.variant.name}: engine of {key.request.backend} {key.version} "
        f"for {key.compute_capability}"
    )
