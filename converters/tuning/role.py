"""Precision search of one role: a ladder of measured candidates and their Pareto front.

What is tried depends on what was found. First the plain methods, dynamic int8 with paired weights
as well where the processor's int8 sums saturate, and for size as many layers at 2 bits as the
budget bears; where the plain methods lose much, the same after equalization; where the
cheapest lose too much, the best of these with its most sensitive layers excluded, one, two,
four, ... of them; and where nothing else is within the budget, distillation. Fidelity is measured
on held-out data, speed on this machine, alternating with fp32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from mmedge.bundle.quality import Figure, Quality
from mmedge.bundle.tuning import Candidate, Objective, SearchRecord
from mmedge.converters.methods.recipes import FP32, Recipe, parse_recipe
from mmedge.converters.tuning.pareto import (
    Budget,
    Trial,
    choose,
    format_drop,
    gains,
    judge_trials,
    pareto_front,
    within,
)
from mmedge.converters.tuning.speed import Runner, SpeedTest
from mmedge.converters.tuning.trials import TrialStore
from mmedge.converters.variants.builder import BuiltVariant
from mmedge.converters.variants.describe import files_of
from mmedge.energy.counter import energy_counter
from mmedge.errors import BackendError, CalibrationError, ConversionError
from mmedge.runtimes.processor import allowed_processors, processor_name

__all__ = ["RoleSearch", "describe_search", "no_candidate_message"]

# Embeddings this near to fp32's leave neighbours as they are: see docs/search.md.
_CLOSE_COSINE = 0.999
# A candidate over the budget has to cost this much less than one within to be worth refining.
_WORTH_REFINING = 0.9
_ABOUT_AS_CHEAP = 1.25
_EXCLUDED = (1, 2, 4, 8, 16)
_PLAIN: dict[Objective, tuple[str, ...]] = {
    "latency": ("fp16", "int8-dynamic", "int8-static", "int8-static-mse"),
    "energy": ("fp16", "int8-dynamic", "int8-static", "int8-static-mse"),
    "size": (
        "fp16",
        "int8-dynamic",
        "int8-static-mse",
        "int8-weight-g128",
        "int4-g128",
        "int4-g64-hqq",
    ),
}
# Below 4 bits, as long as the previous one is within the budget.
_SMALLER = ("int4-g128-gptq", "int4-g128-gptq-at25", "int4-g128-gptq-at20")
_EQUALIZABLE = ("int8-dynamic", "int8-static")
_EQUALIZED = ("int8-dynamic-equalized", "int8-static-mse-equalized-corrected")


@dataclass(frozen=True)
class RoleSearch:
    """The search for one role.

    Attributes:
        role: Its name.
        budget: Accuracy budget.
        build: Makes a variant and runs it on everything.
        judge: Compares a variant with fp32, the other roles in fp32.
        drop: Returns what a quality loses of the budget's metric.
        speed: Times a candidate.
        store: Finished candidates.
        calibrated: Whether there is calibration data for the role.
        progress: Called with a candidate's name at its start, and whether an earlier search stored
            it.
        paired: Whether to try weights with exact sums in 16 bits: the processor's fast
            int8 sums saturate, and time or energy is at stake.
    """

    role: str
    budget: Budget
    build: Callable[[Recipe], BuiltVariant]
    judge: Callable[[BuiltVariant], Quality | None]
    drop: Callable[[Quality | None], Figure]
    speed: SpeedTest
    store: TrialStore
    calibrated: bool
    progress: Callable[[str, bool], None]
    paired: bool = False

    def run(self, fp32: BuiltVariant) -> list[Trial]:
        """Try the candidates of the ladder.

        Args:
            fp32: The role in fp32.

        Returns:
            Every candidate in the order in which it was tried, fp32 first.

        Raises:
            CalibrationError: If the data cannot measure the metric.
        """
        trials = [self._try(FP32, fp32)]
        for recipe in self._ladder(trials):
            trials.append(self._try(recipe))  # noqa: PERF401, the ladder reads the list
        return trials

    def _ladder(self, trials: Sequence[Trial]) -> Iterator[Recipe]:
        """Yield the next candidate; `trials` holds all earlier ones."""
        yield from self._paired(self._known(_PLAIN[self.budget.objective]))
        if not self.calibrated:
            return
        if self.budget.objective == "size":
            yield from self._smaller(trials)
        if not self._close(trials):
            yield from self._paired(self._known(_EQUALIZED))
        yield from self._refined(trials)
        if not any(within(trial, self.budget) for trial in self._worthwhile(trials)):
            yield parse_recipe("int8-static-mse-equalized-distilled")

    def _smaller(self, trials: Sequence[Trial]) -> Iterator[Recipe]:
        """Yield 4 bits, then more and more layers at 2 bits, until the loss is too large."""
        for name in _SMALLER:
            yield parse_recipe(name)
            if not within(trials[-1], self.budget):
                return

    def _refined(self, trials: Sequence[Trial]) -> Iterator[Recipe]:
        """Yield cheap candidates over the budget with more and more excluded layers."""
        objective = self.budget.objective
        # Candidates within the budget; at worst, fp32.
        least = min(trial.cost(objective) for trial in trials if within(trial, self.budget))
        best = self._best(trials, _WORTH_REFINING * least)
        if best is None:
            return
        for excluded in _EXCLUDED:
            yield parse_recipe(f"{best.name}-keep{excluded}")
            if within(trials[-1], self.budget) or trials[-1].cost(objective) > least:
                return

    def _known(self, names: Sequence[str]) -> Iterator[Recipe]:
        for name in names:
            recipe = parse_recipe(name)
            if self.calibrated or not recipe.needs_calibration:
                yield recipe

    def _paired(self, recipes: Iterator[Recipe]) -> Iterator[Recipe]:
        """Yield recipes, and dynamic int8 with paired weights as well where that is faster."""
        for recipe in recipes:
            yield recipe
            if self.paired and recipe.variant.startswith("int8-dynamic"):
                yield parse_recipe(f"{recipe.variant}-paired")

    def _close(self, trials: Sequence[Trial]) -> bool:
        """Return whether a candidate that improves the objective is near enough to fp32.

        A task metric may hold while the embeddings have moved, which hurts an index. And it
        has to be about as cheap as plain int8, which equalization improves: fp16 is enough for
        nearly every model, at half the size.
        """
        objective = self.budget.objective
        int8 = [
            trial.cost(objective)
            for trial in trials
            if trial.drop is not None and trial.name.startswith(_EQUALIZABLE)
        ]
        limit = _ABOUT_AS_CHEAP * min(int8, default=float("inf"))
        return any(
            trial.loss()[0] <= self.budget.max_drop / 2
            and trial.cosine_mean >= _CLOSE_COSINE
            and trial.cost(objective) <= limit
            for trial in self._worthwhile(trials)
        )

    def _worthwhile(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the candidates that cost clearly less than fp32."""
        objective = self.budget.objective
        limit = 0.9 * trials[0].cost(objective)
        return [t for t in trials[1:] if t.drop is not None and t.cost(objective) <= limit]

    def _best(self, trials: Sequence[Trial], limit: float) -> Trial | None:
        """Return the most accurate candidate over the budget, below a cost, that has layers."""
        over = [
            trial
            for trial in trials[1:]
            if trial.drop is not None
            and not within(trial, self.budget)
            and trial.cost(self.budget.objective) <= limit
            and trial.name.startswith(("int8", "int4"))
            and "-at" not in trial.name  # excluded layers would have to be stored elsewhere
        ]
        return min(over, key=Trial.loss, default=None)

    def _try(self, recipe: Recipe, built: BuiltVariant | None = None) -> Trial:
        known = self.store.load(self.role, recipe, self.drop)
        there = known is not None and self._complete(known)
        self.progress(recipe.variant, there)
        if known is not None and there:
            if recipe == FP32:
                self.speed.fp32()
            return known
        started = time.monotonic()
        try:
            built = built or self.build(recipe)
        except (ConversionError, BackendError) as error:
            if recipe == FP32 or isinstance(error, CalibrationError):
                raise
            failed = Trial(recipe, None, None, None, None, None, str(error)[:1000] or "failed")
            trial = replace(failed, duration_s=time.monotonic() - started)
            if isinstance(error, BackendError):
                return trial  # not stored: the missing resource may be available the next time
        else:
            quality = self.judge(built)
            runner = Runner.of(built)
            trial = Trial(
                recipe=built.recipe,
                built=built,
                quality=quality,
                drop=self.drop(quality),
                size_bytes=sum(path.stat().st_size for path in files_of(built)),
                speed=self.speed.fp32() if recipe == FP32 else self.speed.candidate(runner),
                duration_s=time.monotonic() - started,
            )
        self.store.save(self.role, trial)
        return trial

    def _complete(self, trial: Trial) -> bool:
        """Return whether a stored candidate has all measurements of this search."""
        needs_energy = self.budget.objective == "energy" and trial.speed is not None
        return not needs_energy or (trial.speed is not None and trial.speed.energy_mj is not None)


def describe_search(
    trials: Sequence[Trial], budget: Budget, chosen: Trial, *, joint: object = None
) -> SearchRecord:
    """Return a role's search for the manifest.

    Args:
        trials: fp32 first.
        budget: Accuracy budget.
        chosen: What is loaded.
        joint: What all roles together lose (a Figure), or None.
    """
    judgements = judge_trials(trials, budget, chosen)
    counter = energy_counter() if budget.objective == "energy" else None
    measured = next((t.quality for t in trials if t.quality is not None), None)
    return SearchRecord.model_validate(
        {
            "metric": budget.metric,
            "max_drop": budget.max_drop,
            "objective": budget.objective,
            "processor": processor_name(),
            "threads": len(allowed_processors()),
            "data": "nothing" if measured is None else measured.data,
            "samples": 1 if measured is None else measured.samples,
            "joint_drop": joint,
            "energy_counter": counter.what if counter is not None else None,
            "candidates": [
                Candidate(
                    variant=trial.name,
                    drop=trial.drop,
                    cosine_mean=None if trial.built is None else trial.cosine_mean,
                    size_bytes=trial.size_bytes,
                    speed=trial.speed,
                    verdict=judgement.verdict,
                    reason=judgement.reason[:1000],
                    duration_s=round(trial.duration_s, 3),
                )
                for trial, judgement in zip(trials, judgements, strict=True)
            ],
        }
    )


def no_candidate_message(searches: dict[str, list[Trial]], budget: Budget) -> str | None:
    """Return the message for a search without a gain for any role, None otherwise."""
    if any(
        choose(pareto_front(t, budget), budget.objective) is not t[0] for t in searches.values()
    ):
        return None
    closest = "; ".join(f"{role}: {_closest(trials)}" for role, trials in searches.items())
    return (
        f"No candidate loses at most {budget.max_drop:g} of {budget.metric} and improves on fp32. "
        f"Closest: {closest}. Raise --max-drop, give more calibration data, or choose another "
        "--objective; tried candidates are stored, and the next search resumes from them."
    )


def _closest(trials: Sequence[Trial]) -> str:
    """Return the most accurate candidate that improves on fp32."""
    fp32, *others = trials
    made = [trial for trial in others if trial.drop is not None]
    best = min((trial for trial in made if gains(trial, fp32)), key=Trial.loss, default=None)
    if best is None or best.drop is None:
        return f"none of {len(made)} gains" if made else "no candidate could be made"
    return f"{best.name} loses {format_drop(best.drop)}"
