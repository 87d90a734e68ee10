"""profile(): measure a bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from mmedge.bundle.manifest import Variant
from mmedge.bundle.opening import Bundle, open_bundle
from mmedge.errors import ProfileError
from mmedge.files.atomic import temporary_file
from mmedge.models.registry import model_class
from mmedge.profiling.baseline import Baselines, resolve_baseline
from mmedge.profiling.cells import choose_variants, measure_cell, plan_cells, thread_counts
from mmedge.profiling.cold import ColdTask, measure_cold
from mmedge.profiling.config import Budget, ProfileConfig
from mmedge.profiling.gates import check_names, evaluate, parse_gate, runs_needed
from mmedge.profiling.inputs import Inputs, frame_jpeg, sample_of
from mmedge.profiling.machine import load_average, load_warning, read_machine
from mmedge.profiling.metrics import CellKey, cell_names, expected_names, metrics, stage_names
from mmedge.profiling.result import (
    BundleFacts,
    Cell,
    Profile,
    StageBreakdown,
    VariantFigures,
)
from mmedge.profiling.stages import measure_stages
from mmedge.runtimes.selection.limits import time_limit
from mmedge.runtimes.session import SessionOptions
from mmedge.sessions.opening import session_options
from mmedge.sessions.verification import replay_variants

__all__ = ["Plan", "Progress", "profile"]

_COLD_START_S = 2.0  # estimate for the plan only


@dataclass(frozen=True, slots=True)
class Plan:
    """Planned measurements and expected time.

    Attributes:
        cells: Measurements of one role, variant, batch, thread count and length.
        calls: Measurements of an end-to-end call and its stages.
        cold_starts: Processes to start.
        expected_s: Wall time, without loading and for runs that `min_runs` does not prolong.
        warnings: Reasons to wait: a busy machine.
    """

    cells: int
    calls: int
    cold_starts: int
    expected_s: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """Next measurement.

    Attributes:
        step: From 0.
        steps: How many there are.
        what: In words.
    """

    step: int
    steps: int
    what: str


def profile(
    bundle: Bundle | Path | str,
    config: ProfileConfig | None = None,
    *,
    on_plan: Callable[[Plan], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Profile:
    """Measure a bundle on this machine.

    Args:
        bundle: A bundle, or where it lies.
        config: What to measure and for how long; None for the defaults.
        on_plan: Called once, before anything is measured.
        on_progress: Called before each measurement.

    Returns:
        Every figure, gates applied; a gate that failed does not raise.

    Raises:
        BundleError: If the bundle cannot be opened.
        InputError: If it has no role of a name that was requested.
        ProfileError: If something requested cannot be measured, or a gate cannot be read or names
            a figure that will not be there; raised before anything is measured where possible.
        BackendError: If the engine or the device is missing, or fails.
        TimeLimitError: If a graph takes too long for its golden inputs; nothing is measured then.
    """
    config = config or ProfileConfig()
    if not isinstance(bundle, Bundle):
        bundle = open_bundle(bundle)
    run = _Run(bundle, config, on_progress or (lambda _: None))
    if on_plan is not None:
        on_plan(run.plan())
    return run.profile()


class _Run:
    """One run of `profile`: everything is resolved first, then measured in order."""

    def __init__(
        self, bundle: Bundle, config: ProfileConfig, on_progress: Callable[[Progress], None]
    ) -> None:
        self._bundle, self._config, self._on_progress = bundle, config, on_progress
        self._load_before = load_average()
        self._gates = tuple(parse_gate(expression) for expression in config.gates)
        self._chosen = choose_variants(bundle, config)
        self._inputs = Inputs.of(bundle)
        self._keys = plan_cells(self._chosen, self._inputs, config)
        self._baselines: Baselines = (
            resolve_baseline(config.baseline, bundle, self._chosen, config.backend)
            if config.baseline
            else {}
        )
        self._staged = [
            (role, variant)
            for role, variants in self._chosen.items()
            for variant in variants
            if config.stages and self._stage_names(role)
        ]
        check_names(self._gates, self._expected())
        self._done = 0
        pairs = sum(map(len, self._chosen.values()))
        self._steps = len(self._keys) + len(self._staged) + pairs * bool(config.cold_starts)

    def _stage_names(self, role: str) -> tuple[str, ...]:
        manifest = self._bundle.manifest
        names = model_class(manifest.kind.type).stage_names(manifest, role)
        return (*names, "other") if names else ()

    def _expected(self) -> frozenset[str]:
        return expected_names(
            self._keys,
            cold_starts=self._config.cold_starts > 0,
            staged={
                (role, variant.name): self._stage_names(role) for role, variant in self._staged
            },
            compared=frozenset(self._baselines),
            judged=frozenset(
                (role, variant.name)
                for role, variants in self._chosen.items()
                for variant in variants
                if _cosines(variant) != (None, None)
            ),
        )

    def plan(self) -> Plan:
        budget, measured = self._config.budget, len(self._keys) + len(self._staged)
        starts = self._config.cold_starts * sum(map(len, self._chosen.values()))
        warning = load_warning(self._load_before)
        return Plan(
            cells=len(self._keys),
            calls=len(self._staged),
            cold_starts=starts,
            expected_s=measured * (budget.warmup_seconds + budget.seconds) + starts * _COLD_START_S,
            warnings=(warning,) if warning else (),
        )

    def profile(self) -> Profile:
        self._check_that_graphs_end()
        cells = tuple(self._cell(key) for key in self._keys)
        stages = tuple(self._stages(role, variant) for role, variant in self._staged)
        with temporary_file(Path(tempfile.gettempdir()), "mmedge-profile", "jpg") as frame:
            frame.write_bytes(frame_jpeg())
            variants = tuple(
                self._variant(role, variant, frame)
                for role, ladder in self._chosen.items()
                for variant in ladder
            )
        manifest = self._bundle.manifest
        made = Profile(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            bundle=BundleFacts(
                name=manifest.name,
                path=str(self._bundle.path),
                family=manifest.family,
                source=manifest.provenance.source,
                created=manifest.provenance.created,
            ),
            machine=read_machine(self._load_before),
            config=self._config,
            cells=cells,
            variants=variants,
            stages=stages,
        )
        return made.model_copy(
            update={
                "gates": evaluate(self._gates, metrics(made)),
                "warnings": self._warnings(made),
            }
        )

    def _check_that_graphs_end(self) -> None:
        limit_s = time_limit()
        if limit_s is not None:
            name = self._config.backend
            options = session_options(name, self._config.device, None)
            pairs = [(role, each) for role, ladder in self._chosen.items() for each in ladder]
            replay_variants(self._bundle, pairs, name, options, limit_s)
            for (role, _), opponent in self._baselines.items():
                if not isinstance(opponent.model, Path):
                    other, variant = opponent.model
                    replay_variants(other, [(role, variant)], name, options, limit_s)

    def _announce(self, what: str) -> None:
        self._on_progress(Progress(self._done, self._steps, what))
        self._done += 1

    def _budget(self, names: tuple[str, ...]) -> Budget:
        """Return the budget of a cell, raised to the runs that its gates need."""
        budget = self._config.budget
        needed = max(budget.min_runs, runs_needed(self._gates, names))
        if needed > budget.max_runs:
            raise ProfileError(
                f"{names[0]} needs {needed} runs, the limit is {budget.max_runs}. Raise --max-runs."
            )
        return budget.model_copy(update={"min_runs": needed})

    def _cell(self, key: CellKey) -> Cell:
        first = next(other for other in self._keys if other.role == key.role)
        self._announce(str(key))
        budget = self._budget(cell_names(key, first))
        opponent = self._baselines.get((key.role, key.variant))
        return measure_cell(key, self._inputs, self._config, budget, opponent)

    def _stages(self, role: str, variant: Variant) -> StageBreakdown:
        self._announce(f"{role}.{variant.name} end to end")
        budget = self._budget(stage_names(role, variant.name))
        options = SessionOptions(device=self._config.device, threads=thread_counts(self._config)[0])
        sample = sample_of(self._bundle, role)
        return measure_stages(self._bundle, role, variant, sample, options, self._config, budget)

    def _variant(self, role: str, variant: Variant, frame: Path) -> VariantFigures:
        cold = memory = None
        if self._config.cold_starts:
            self._announce(f"{role}.{variant.name} in fresh processes")
            task = ColdTask(
                bundle=self._bundle,
                role=role,
                variant=variant.name,
                backend=self._config.backend,
                device=self._config.device,
                threads=thread_counts(self._config)[0],
                frame=frame,
            )
            cold, memory = measure_cold(task, self._config.cold_starts)
        cosine_mean, cosine_p1 = _cosines(variant)
        return VariantFigures(
            role=role,
            variant=variant.name,
            precision=variant.precision.value,
            size_bytes=variant.size_bytes,
            cosine_mean=cosine_mean,
            cosine_p1=cosine_p1,
            cold_start=cold,
            memory=memory,
        )

    def _warnings(self, made: Profile) -> tuple[str, ...]:
        warnings: list[str] = []
        machine = made.machine
        if busy := load_warning(machine.load_average_before):
            warnings.append(busy)
        processors = len(machine.processors_allowed)
        warnings += (
            f"{threads} threads share {processors} CPU{'s' * (processors > 1)}."
            for threads in thread_counts(self._config)
            if threads > processors
        )
        if machine.governor not in (None, "performance"):
            warnings.append(
                f"CPU frequency governor '{machine.governor}': the frequency follows the load. Set "
                "'performance' for repeatable results."
            )
        noisy = [(str(CellKey.of(cell)), cell.noise) for cell in made.cells if cell.noise]
        noisy += [
            (f"{item.role}.{item.variant} end to end", item.noise)
            for item in made.stages
            if item.noise
        ]
        if noisy:
            name, reasons = noisy[0]
            warnings.append(
                f"{len(noisy)} of {len(made.cells) + len(made.stages)} measurements are noisy "
                f"(marked ~). First: {name}: {'; '.join(reasons)}."
            )
        return tuple(warnings)


def _cosines(variant: Variant) -> tuple[float | None, float | None]:
    """Return mean and first percentile of the cosine with fp32, which is 1 for fp32 itself."""
    if variant.quality is not None:
        return variant.quality.value("cosine_mean"), variant.quality.value("cosine_p1")
    return (1.0, 1.0) if variant.precision.value == "fp32" else (None, None)
