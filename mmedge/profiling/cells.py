"""Measurement grid, and the measurement of one cell."""

from __future__ import annotations

from collections.abc import Mapping

from mmedge.bundle.manifest import Variant
from mmedge.bundle.opening import Bundle
from mmedge.errors import InputError, ProfileError
from mmedge.profiling.baseline import Opponent
from mmedge.profiling.config import Budget, ProfileConfig
from mmedge.profiling.inputs import Inputs
from mmedge.profiling.machine import noise
from mmedge.profiling.metrics import CellKey
from mmedge.profiling.result import BaselineFigures, Cell, PlacementFacts
from mmedge.profiling.statistics import median_ratio, required_samples, summarize
from mmedge.profiling.timing import Call, measure
from mmedge.runtimes.processor import allowed_processors
from mmedge.runtimes.session import Session, SessionOptions
from mmedge.sessions.axes import dynamic_axes
from mmedge.sessions.opening import open_variant, takes
from mmedge.specs import Array

__all__ = ["choose_variants", "measure_cell", "plan_cells", "thread_counts"]


def thread_counts(config: ProfileConfig) -> tuple[int, ...]:
    """Return the thread counts to measure: those given, else the number of CPUs."""
    return config.threads or (len(allowed_processors()),)


def choose_variants(bundle: Bundle, config: ProfileConfig) -> dict[str, list[Variant]]:
    """Return the variants to measure, by role, in the bundle's order.

    A precision takes every variant that has it, a name that variant alone. A role that has none
    of what was requested is left out, as long as another has it, and so is a variant without a
    layout for the backend.

    Raises:
        InputError: If the bundle has no role of a name that was requested.
        ProfileError: If no role has a precision that was requested, or the backend takes none of
            what has it.
    """
    roles = config.roles or tuple(bundle.manifest.roles)
    chosen: dict[str, list[Variant]] = {}
    met: set[str] = set()
    for role in dict.fromkeys(roles):
        for variant in bundle.role(role).variants:
            names = {variant.name, variant.precision.value}
            if config.precisions is None or names & set(config.precisions):
                chosen.setdefault(role, []).append(variant)
                met |= names
    unmet = [wanted for wanted in config.precisions or () if wanted not in met]
    if unmet:
        raise ProfileError(bundle.no_variant(unmet[0], roles))
    taken = {
        role: [variant for variant in variants if takes(variant, config.backend, config.device)]
        for role, variants in chosen.items()
    }
    if not any(taken.values()):
        raise ProfileError(
            f"{bundle.path}: backend '{config.backend}' runs none of "
            f"{sorted({variant.name for variants in chosen.values() for variant in variants})} on "
            f"'{config.device}'. Name another precision, backend or device."
        )
    return {role: variants for role, variants in taken.items() if variants}


def plan_cells(
    chosen: Mapping[str, list[Variant]], inputs: Inputs, config: ProfileConfig
) -> tuple[CellKey, ...]:
    """Return every cell to measure, role by role and variant by variant.

    Raises:
        ProfileError: If a sequence length does not fit a role.
    """
    return tuple(
        CellKey(role, variant.name, batch, threads, sequence)
        for role, variants in chosen.items()
        for variant in variants
        for threads in dict.fromkeys(thread_counts(config))
        for batch in dict.fromkeys(config.batches)
        for sequence in inputs.sequences(role, config.sequences)
    )


def measure_cell(
    key: CellKey, inputs: Inputs, config: ProfileConfig, budget: Budget, opponent: Opponent | None
) -> Cell:
    """Measure one cell, interleaved with its baseline if it has one.

    The sessions are opened for this cell and closed after it, so that no idle thread pool and no
    arena of another cell is in the way.

    Raises:
        ProfileError: If the graph, or the baseline, cannot be fed so.
        BackendError: If the engine fails.
    """
    bundle = inputs.bundle
    # One engine for all batches of a profile, if the backend builds engines.
    axes = dynamic_axes(bundle.manifest, key.role, batch=max(config.batches))
    options = SessionOptions(device=config.device, threads=key.threads, axes=axes)
    feed = inputs.feed(key.role, key.batch, key.sequence)
    variant = bundle.variant(key.role, key.variant)
    with open_variant(bundle, variant, backend_name=config.backend, options=options) as session:
        ours = _call(session, feed, str(key))
        if opponent is None:
            (samples,) = measure([ours], budget)
            figures = None
        else:
            with opponent.open(config.backend, options) as other:
                theirs = _call(other, feed, f"baseline {opponent.name} of {key}")
                needed = required_samples(50)
                budget = budget.model_copy(update={"min_runs": max(budget.min_runs, needed)})
                samples, others = measure([ours, theirs], budget)
            figures = BaselineFigures(
                name=opponent.name,
                latency=summarize(others.wall_ns, others.cpu_ns),
                ratio=median_ratio(samples.wall_ns, others.wall_ns),
            )
        placement = session.placement
    latency = summarize(samples.wall_ns, samples.cpu_ns)
    return Cell(
        role=key.role,
        variant=key.variant,
        batch=key.batch,
        threads=key.threads,
        sequence=key.sequence,
        latency=latency,
        throughput_per_s=key.batch * 1000.0 / latency.mean_ms,
        placement=PlacementFacts(
            backend=placement.backend,
            device=placement.device,
            engine=placement.engine,
            providers=dict(placement.providers),
            exceptions=dict(placement.exceptions),
        ),
        baseline=figures,
        noise=noise(latency, threads=key.threads, device=placement.device),
    )


def _call(session: Session, feed: Mapping[str, Array], what: str) -> Call:
    """Return the timed call, after a trial run on this feed."""
    dtypes = {spec.name: spec.dtype for spec in session.inputs}  # fp16 graphs may have fp16 inputs
    ready = {name: array.astype(dtypes.get(name, array.dtype)) for name, array in feed.items()}
    try:
        session.run(ready)
    except InputError as error:
        raise ProfileError(f"{what} cannot be measured: {error}") from error
    return lambda: session.run(ready)
