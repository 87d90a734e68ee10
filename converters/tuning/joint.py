"""Joint precision search over all roles of a model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

from mmedge.bundle.manifest import Manifest
from mmedge.bundle.quality import Figure
from mmedge.converters.evaluation.base import Evaluation
from mmedge.converters.families.base import RoleSpec
from mmedge.converters.graphs.export import export_role
from mmedge.converters.methods.recipes import FP32
from mmedge.converters.provenance import tool_versions
from mmedge.converters.tuning.pareto import Budget, Trial, choose, pareto_front
from mmedge.converters.tuning.role import RoleSearch, describe_search
from mmedge.converters.tuning.speed import Runner, SpeedTest, installed_backends
from mmedge.converters.tuning.trials import TrialStore
from mmedge.converters.variants.builder import BuiltVariant, VariantBuilder, lay_out
from mmedge.converters.variants.describe import BuiltRole, files_of, judge
from mmedge.converters.variants.job import Job
from mmedge.energy.counter import energy_counter
from mmedge.files import storage_errors
from mmedge.runtimes.processor import allowed_processors, int8_saturates, processor_name
from mmedge.runtimes.selection.remembered import Choice, remember_choice
from mmedge.runtimes.session import SessionOptions

__all__ = [
    "StartedSearch",
    "add_pareto_front",
    "choose_together",
    "placed",
    "remember_backends",
    "search_key",
    "search_notes",
]

_FEW_SAMPLES = 100


@dataclass(frozen=True)
class StartedSearch:
    """One role, exported and ready to be searched.

    Attributes:
        name: Of the role.
        role: The role with only fp32 built.
        builder: Makes its variants.
        store: Finished candidates.
        budget: Accuracy budget.
        calibrated: Whether there is calibration data for the role.
    """

    name: str
    role: BuiltRole
    builder: VariantBuilder
    store: TrialStore
    budget: Budget
    calibrated: bool

    @classmethod
    def start(
        cls,
        job: Job,
        name: str,
        spec: RoleSpec,
        store: TrialStore,
        budget: Budget,
        before: Mapping[str, BuiltVariant],
        stack: ExitStack,
    ) -> StartedSearch:
        """Export a role, or reuse a stored one, and measure fp32.

        Args:
            job: The conversion.
            name: Of the role.
            spec: The role.
            store: Finished candidates.
            budget: Accuracy budget.
            before: fp32 of the roles before it.
            stack: Closes what makes the variants.
        """
        portable = store.role_folder(name) / "fp32.onnx"
        job.stage(f"Export {name}")
        known = store.load(name, FP32, partial(job.evaluation.drop, budget.metric))
        stored = None if known is None else known.built
        if stored is None:
            export_role(name, spec, portable)
        models = lay_out(portable) if stored is None else stored.models
        builder = job.builder(name, spec, models, before)
        stack.callback(builder.close)
        built = stored or builder.build(FP32)
        role = BuiltRole(spec, builder.inputs.golden, (built,))
        calibrated = job.calibration(name, spec) is not None
        return cls(name, role, builder, store, budget, calibrated)

    def run(self, fp32: Mapping[str, BuiltRole], job: Job) -> list[Trial]:
        """Try the candidates of this role with the other roles in fp32.

        Args:
            fp32: All roles with only fp32 built.
            job: The conversion.
        """
        evaluation = job.evaluation
        reference = self.role.variants[0]
        inputs = self.builder.inputs
        speed = SpeedTest(
            Runner.of(reference),
            next(iter(evaluation.feeds(self.role.spec, inputs.reference))),
            inputs.golden,
            energy_counter() if self.budget.objective == "energy" else None,
            self.builder.worker,
        )
        search = RoleSearch(
            role=self.name,
            budget=self.budget,
            build=self.builder.build,
            judge=lambda variant: judge(self.name, variant, fp32, evaluation),
            drop=partial(evaluation.drop, self.budget.metric),
            speed=speed,
            store=self.store,
            calibrated=self.calibrated,
            progress=lambda name, there: job.stage(_stage(self.name, name, there)),
            paired=self.budget.objective != "size" and int8_saturates(),
        )
        return search.run(reference)


def _stage(role: str, name: str, there: bool) -> str:
    return f"Reuse {role} {name}" if there else f"Try {role} {name}"


def choose_together(
    tried: Mapping[str, Sequence[Trial]],
    roles: Mapping[str, BuiltRole],
    evaluation: Evaluation,
    budget: Budget,
) -> tuple[dict[str, Trial], Figure | None]:
    """Choose a candidate for each role so that the whole model stays within the budget.

    Each role was evaluated with the others in fp32; combined losses may add up.

    Returns:
        The choice by role, and the combined loss; None for a metric of a single role.
    """
    fronts = {name: pareto_front(trials, budget) for name, trials in tried.items()}
    alone = {name: choose(kept, budget.objective) for name, kept in fronts.items()}
    metric = evaluation.metrics[budget.metric]
    if metric.agreement or len(tried) < 2:
        return alone, None
    reference = {name: role.reference for name, role in roles.items()}
    combinations = [
        dict(zip(fronts, combination, strict=True)) for combination in product(*fronts.values())
    ]
    # The best choice of each role comes first; then the cheapest.
    combinations.sort(
        key=lambda picks: (
            picks != alone,
            sum(trial.cost(budget.objective) for trial in picks.values()),
        )
    )
    for picks in combinations:
        ours = {name: t.built.collected for name, t in picks.items() if t.built is not None}
        joint = evaluation.together(reference, ours)[metric.figure]
        if budget.holds(joint):
            return picks, joint
    return {name: trials[0] for name, trials in tried.items()}, None


def search_key(job: Job) -> dict[str, object]:
    """Return the cache key of a search's candidates."""
    data = {
        what: None if dataset is None else dataset.sha256()
        for what, dataset in (
            ("calibration", job.data.calibration),
            ("evaluation", job.data.evaluation),
        )
    }
    return {
        "format": 3,  # of what the store holds
        "space": job.space,
        "weights_sha256": job.weights_sha256,
        **data,
        "template": job.config.template,
        "seed": job.config.seed,
        "explain": job.config.explain,
        "tools": tool_versions(),
        "processor": processor_name(),
        "processors": list(allowed_processors()),
    }


def add_pareto_front(
    job: Job,
    role: BuiltRole,
    trials: Sequence[Trial],
    budget: Budget,
    chosen: Trial,
    joint: Figure | None,
) -> BuiltRole:
    """Put the Pareto front of a search into the bundle.

    Args:
        job: The conversion.
        role: The role with only fp32 built.
        trials: Its candidates.
        budget: Accuracy budget.
        chosen: What is loaded.
        joint: What all roles together lose, or None.
    """
    record = describe_search(trials, budget, chosen, joint=joint)
    kept = {one.variant for one in record.candidates if one.verdict != "dropped"}
    variants = tuple(
        placed(trial.built, job.folder)
        for trial in trials
        if trial.built is not None and trial.name in kept
    )
    return replace(
        role,
        variants=variants,
        default=chosen.name,
        search=record,
        qualities={trial.name: trial.quality for trial in trials if trial.built is not None},
    )


def placed(built: BuiltVariant, folder: Path) -> BuiltVariant:
    """Link or copy a variant's files into its role's folder in a bundle.

    They stay where they are too, as links where the file system has them, so that a search whose
    bundle is killed at the last moment need not make them again.

    Args:
        built: Its files lie in a folder named after the role.
        folder: The bundle.
    """
    old = next(iter(built.models.values())).parent
    new = folder / old.name
    nodes = set() if built.nodes is None else {built.nodes}
    with storage_errors(new):
        new.mkdir(exist_ok=True)
        for path in files_of(built) | nodes:
            if not (new / path.name).exists():
                _link(path, new / path.name)
    return replace(
        built,
        models={layout: new / model.name for layout, model in built.models.items()},
        nodes=None if built.nodes is None else new / built.nodes.name,
    )


def _link(path: Path, place: Path) -> None:
    try:
        os.link(path, place)
    except OSError:
        shutil.copyfile(path, place)


def remember_backends(manifest: Manifest) -> None:
    """Record the measured fastest backend for `load` on this machine.

    Args:
        manifest: Of the finished bundle.
    """
    if len(installed_backends()) < 2:
        return  # only one backend to choose from
    for role in manifest.roles.values():
        for candidate in () if role.search is None else role.search.candidates:
            held = next((v for v in role.variants if v.name == candidate.variant), None)
            if held is None or candidate.speed is None:
                continue
            speed = candidate.speed
            remember_choice(
                [manifest.files[path].sha256 for path in held.files],
                SessionOptions(),
                Choice(
                    speed.backend,
                    "measured to be the fastest when the bundle was made",
                    {speed.backend: speed.latency_ms},
                ),
            )


def search_notes(budget: Budget, roles: Mapping[str, BuiltRole]) -> list[str]:
    """Return notes on a search."""
    notes = []
    for name, role in roles.items():
        record = role.search
        if record is None:
            continue
        if role.default == "fp32":
            notes.append(f"{name} stays in fp32: no candidate in the budget is faster or smaller.")
        if record.samples < _FEW_SAMPLES:
            notes.append(
                f"{name}: fidelity was measured on {record.samples} samples; a budget of "
                f"{budget.max_drop:g} needs {_FEW_SAMPLES} or more, better hundreds."
            )
        if record.data.startswith("synthetic"):
            notes.append(
                f"{name}: fidelity was measured on {record.data}. Pass --evaluate with data like "
                "that of the device."
            )
    return notes
