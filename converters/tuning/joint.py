"""A search over all roles of a model: each has its own, and what is chosen has to hold together."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from mmedge.bundle.figures import Figure
from mmedge.bundle.manifest import Manifest
from mmedge.converters.evaluation.dataset import EvaluationSet
from mmedge.converters.evaluation.embedding import EvaluationLabels
from mmedge.converters.evaluation.metrics import METRICS
from mmedge.converters.progress import Progress, ProgressEvent
from mmedge.converters.tuning.pareto import Budget, Trial, choose, front
from mmedge.converters.tuning.role import RoleSearch
from mmedge.converters.tuning.speed import Runner, SpeedTest, installed_backends
from mmedge.converters.tuning.trials import TrialStore
from mmedge.converters.variants.builder import TOLERANCES, BuiltVariant, VariantBuilder
from mmedge.converters.variants.describe import BuiltRole, files_of, judge, judge_together
from mmedge.energy.counter import energy_counter
from mmedge.errors import CalibrationError
from mmedge.files import storage_errors
from mmedge.runtimes.processor import int8_saturates
from mmedge.runtimes.selection.remembered import Choice, remember_choice
from mmedge.runtimes.session import SessionOptions

__all__ = [
    "StartedSearch",
    "choose_together",
    "default_metric",
    "placed",
    "remember_backends",
    "require_told",
    "search_notes",
]

_FEW_SAMPLES = 100


def default_metric(known: EvaluationLabels) -> str:
    """Return what a search keeps to where nothing is asked for: the task that the data can tell."""
    if known.captions is not None:
        return "recall@1"
    return "zero-shot" if len(known.classes) > 1 else "cosine-p1"


def require_told(metric: str, samples: EvaluationSet) -> None:
    """Check that the evaluation data can tell a metric, before anything is made.

    Raises:
        CalibrationError: If it cannot.
    """
    captioned = len(samples.images) if samples.known.captions is not None else 0
    told = [
        name
        for name, known in METRICS.items()
        if known.agreement
        or (name == "zero-shot" and len(samples.known.classes) > 1)
        or (name.startswith("recall@") and captioned > int(name.removeprefix("recall@")))
    ]
    if metric not in told:
        raise CalibrationError(
            f"Metric '{metric}' cannot be told from {samples.about_images}; what can: "
            f"{', '.join(told)}. Recall needs a caption for each picture and more pictures than "
            "are looked at, zero-shot accuracy two labels or more: give such data with --evaluate."
        )


@dataclass(frozen=True)
class StartedSearch:
    """One role, exported and ready to be searched.

    Attributes:
        name: Of the role.
        role: With fp32 alone.
        builder: Makes its variants.
        store: Finished candidates.
        budget: What to keep to.
        calibrated: Whether there is calibration data for the role.
    """

    name: str
    role: BuiltRole
    builder: VariantBuilder
    store: TrialStore
    budget: Budget
    calibrated: bool

    def run(
        self, fp32: Mapping[str, BuiltRole], samples: EvaluationSet, progress: Progress
    ) -> list[Trial]:
        """Try the candidates of this role, the other roles being in fp32.

        Args:
            fp32: All roles, with fp32 alone.
            samples: What fidelity is measured on.
            progress: Told of each candidate.
        """
        reference = self.role.variants[0]
        inputs = self.builder.inputs
        speed = SpeedTest(
            Runner(
                reference.models,
                reference.golden,
                TOLERANCES[reference.recipe.precision].cosine_min,
            ),
            inputs.name,
            next(iter(inputs.feeds())),
            inputs.golden,
            energy_counter() if self.budget.objective == "energy" else None,
            self.builder.worker,
        )
        search = RoleSearch(
            role=self.name,
            budget=self.budget,
            build=self.builder.build,
            judge=lambda variant: judge(self.role, variant, fp32, samples),
            speed=speed,
            store=self.store,
            calibrated=self.calibrated,
            tell=lambda name, there: progress(ProgressEvent(_stage(self.name, name, there), 0, 1)),
            paired=self.budget.objective != "size" and int8_saturates(),
        )
        return search.run(reference)


def _stage(role: str, name: str, there: bool) -> str:
    return f"Take {role} {name} from before" if there else f"Try {role} {name}"


def choose_together(
    tried: Mapping[str, Sequence[Trial]],
    roles: Mapping[str, BuiltRole],
    samples: EvaluationSet,
    budget: Budget,
) -> tuple[dict[str, Trial], Figure | None]:
    """Choose a candidate for each role so that the model as a whole keeps to the budget.

    Each role was judged beside fp32; together their losses may add up.

    Returns:
        The choice by role, and what is lost with all of it; None for a metric of one role alone.
    """
    fronts = {name: front(trials, budget) for name, trials in tried.items()}
    alone = {name: choose(kept, budget.objective) for name, kept in fronts.items()}
    metric = METRICS[budget.metric]
    if metric.agreement or len(tried) < 2:
        return alone, None
    combinations = [
        dict(zip(fronts, combination, strict=True)) for combination in product(*fronts.values())
    ]
    # What each role would take alone comes first; then the cheapest.
    combinations.sort(
        key=lambda picks: (
            picks != alone,
            sum(trial.cost(budget.objective) for trial in picks.values()),
        )
    )
    for picks in combinations:
        built = {name: trial.built for name, trial in picks.items() if trial.built is not None}
        joint = judge_together(built, roles, samples).drops[metric.figure]
        if budget.holds(joint):
            return picks, joint
    return {name: trials[0] for name, trials in tried.items()}, None


def placed(built: BuiltVariant, folder: Path) -> BuiltVariant:
    """Put a variant's files into the folder of its role in a bundle.

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
    """Let `load` on this machine take the backend that the search measured to be fastest.

    Args:
        manifest: Of the finished bundle.
    """
    if len(installed_backends()) < 2:
        return  # there is nothing to choose from, here or at load
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
    """Return what a user should know of a search."""
    notes = []
    for name, role in roles.items():
        record = role.search
        if record is None:
            continue
        if role.default == "fp32":
            notes.append(f"{name} stays in fp32: nothing within the budget gains on it.")
        if record.samples < _FEW_SAMPLES:
            notes.append(
                f"{name}: fidelity was measured on {record.samples} samples; a budget of "
                f"{budget.max_drop:g} wants {_FEW_SAMPLES} or more, better hundreds."
            )
        if record.data.startswith("synthetic"):
            notes.append(
                f"{name}: fidelity was measured on {record.data}. Pass --evaluate with data like "
                "that of the device."
            )
    return notes
