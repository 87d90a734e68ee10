"""Pareto selection of search candidates from their measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmedge.bundle.quality import Figure, Quality
from mmedge.bundle.tuning import Objective, Speed, Verdict
from mmedge.converters.methods.recipes import Recipe
from mmedge.converters.variants.builder import BuiltVariant
from mmedge.errors import ConversionError

__all__ = [
    "Budget",
    "Judgement",
    "Trial",
    "choose",
    "format_drop",
    "gains",
    "judge_trials",
    "pareto_front",
    "within",
]

# Minimum gain in speed or size over fp32.
_GAIN = 0.97
# Costs nearer than this are equal: the one of higher fidelity is chosen.
_TIE = 0.03


@dataclass(frozen=True, slots=True)
class Budget:
    """Accuracy budget of a search.

    Attributes:
        metric: A name of the evaluation's metrics.
        max_drop: Largest allowed drop from fp32.
        objective: What is to be made small.
    """

    metric: str
    max_drop: float
    objective: Objective

    def holds(self, drop: Figure) -> bool:
        """Return whether a loss is within the budget."""
        return drop.value <= self.max_drop + 1e-12


@dataclass(frozen=True)
class Trial:
    """A candidate and its measurements.

    Attributes:
        recipe: How it is made.
        built: None where it could not be made.
        quality: Against fp32 on held-out data; None for fp32 without a task.
        drop: What it loses of the metric; None where it could not be made.
        size_bytes: Of its files.
        speed: None where it was not timed.
        failure: Why it could not be made; "" where it was.
        duration_s: Wall time to make and measure it.
    """

    recipe: Recipe
    built: BuiltVariant | None
    quality: Quality | None
    drop: Figure | None
    size_bytes: int | None
    speed: Speed | None
    failure: str = ""
    duration_s: float = 0.0

    @property
    def name(self) -> str:
        """The variant's name."""
        return self.recipe.variant

    @property
    def cosine_mean(self) -> float:
        """Mean cosine with fp32; 1 for fp32."""
        known = None if self.quality is None else self.quality.value("cosine_mean")
        return 1.0 if known is None else known

    def loss(self) -> tuple[float, float]:
        """Return the sort key of fidelity: the drop, then the cosine."""
        return (0.0 if self.drop is None else max(self.drop.value, 0.0), 1.0 - self.cosine_mean)

    def cost(self, objective: Objective) -> float:
        """Return the objective to minimise; infinite where it was not measured."""
        if objective == "size":
            return float("inf") if self.size_bytes is None else float(self.size_bytes)
        if self.speed is None:
            return float("inf")
        if objective == "energy":
            return float("inf") if self.speed.energy_mj is None else self.speed.energy_mj
        # A ratio within its own rounds compares what ran at different times.
        return self.speed.ratio.value


@dataclass(frozen=True, slots=True)
class Judgement:
    """Decision on a candidate, with the reason."""

    verdict: Verdict
    reason: str


def within(trial: Trial, budget: Budget) -> bool:
    """Return whether a candidate was built and is within the budget."""
    return trial.drop is not None and budget.holds(trial.drop)


def pareto_front(trials: Sequence[Trial], budget: Budget) -> list[Trial]:
    """Return the Pareto front of fidelity and cost within the budget.

    Args:
        trials: fp32 first.
        budget: Accuracy budget.

    Returns:
        Cheapest first; always includes fp32, last unless a candidate is lossless.
    """
    fp32, *others = trials
    pool = [fp32, *(t for t in others if within(t, budget) and gains(t, fp32))]
    kept = [
        trial
        for trial in pool
        if trial is fp32 or not any(_beats(other, trial, budget.objective) for other in pool)
    ]
    return sorted(kept, key=lambda trial: (trial.cost(budget.objective), trial.loss()))


def choose(kept: Sequence[Trial], objective: Objective) -> Trial:
    """Return the cheapest candidate; the most accurate of those about as cheap."""
    least = kept[0].cost(objective)
    alike = [trial for trial in kept if trial.cost(objective) <= least * (1 + _TIE)]
    return min(alike, key=Trial.loss)


def judge_trials(
    trials: Sequence[Trial], budget: Budget, chosen: Trial | None = None
) -> list[Judgement]:
    """Return the decision on every candidate.

    Args:
        trials: fp32 first, in the order in which they were tried.
        budget: Accuracy budget.
        chosen: On the Pareto front; None takes the best of it.

    Raises:
        ConversionError: If `chosen` is not on the Pareto front.
    """
    kept = pareto_front(trials, budget)
    chosen = chosen or choose(kept, budget.objective)
    if chosen not in kept:
        raise ConversionError(f"{chosen.name} was chosen, but is not on the Pareto front.")
    return [_judge(trial, trials[0], kept, chosen, budget) for trial in trials]


def format_drop(drop: Figure) -> str:
    """Return a loss with four decimals, or enough to show that it is not zero."""
    return f"{drop.value:.4f}" if abs(drop.value) >= 5e-5 else f"{drop.value:.1e}"


def _judge(
    trial: Trial, fp32: Trial, kept: Sequence[Trial], chosen: Trial, budget: Budget
) -> Judgement:
    if trial is chosen:
        if trial is fp32 and chosen is choose(kept, budget.objective):
            return Judgement("chosen", "no candidate within the budget is faster or smaller")
        if trial is fp32:
            return Judgement("chosen", "what gains on it is not within the budget with other roles")
        return Judgement("chosen", f"within the budget, {_gain(trial, fp32, budget.objective)}")
    if trial is fp32:
        return Judgement("front", "the reference")
    if trial in kept:
        if trial.cost(budget.objective) < chosen.cost(budget.objective):
            if chosen is choose(kept, budget.objective):
                return Judgement("front", f"{chosen.name} costs about as much and loses less")
            return Judgement("front", "within the budget alone, not with the other roles' choice")
        return Judgement("front", f"within the budget, nearer to fp32 than {chosen.name}")
    return Judgement("dropped", _drop_reason(trial, fp32, kept, budget))


def _drop_reason(trial: Trial, fp32: Trial, kept: Sequence[Trial], budget: Budget) -> str:
    if trial.failure or trial.drop is None:
        return trial.failure or "not measured"
    if not within(trial, budget):
        return f"loses {format_drop(trial.drop)} of {budget.metric}, more than {budget.max_drop:g}"
    if not gains(trial, fp32):
        return f"no gain: {_gain(trial, fp32, 'latency')}"
    better = next(other for other in kept if _beats(other, trial, budget.objective))
    what = {"latency": "faster", "size": "smaller", "energy": "more frugal"}[budget.objective]
    return f"{better.name} is {what} and loses no more"


def gains(trial: Trial, fp32: Trial) -> bool:
    """Return whether a candidate is at least a few per cent faster or smaller than fp32."""
    faster = (
        trial.speed is not None
        and trial.speed.ratio.value <= _GAIN
        and trial.speed.ratio.high < 1.0
    )
    sizes = trial.size_bytes, fp32.size_bytes
    smaller = sizes[0] is not None and sizes[1] is not None and sizes[0] <= _GAIN * sizes[1]
    return faster or smaller


def _gain(trial: Trial, fp32: Trial, objective: Objective) -> str:
    parts = []
    if trial.speed is not None:
        parts.append(f"{trial.speed.ratio.value:.2f} of fp32's time")
    if trial.size_bytes is not None and fp32.size_bytes:
        parts.append(f"{trial.size_bytes / fp32.size_bytes:.2f} of its size")
    if objective == "energy" and trial.speed is not None and trial.speed.energy_mj is not None:
        parts.append(f"{trial.speed.energy_mj:.3g} mJ a call")
    return ", ".join(parts) or "not measured"


def _beats(other: Trial, trial: Trial, objective: Objective) -> bool:
    """Return whether another candidate is no worse in both and better in one."""
    if other is trial:
        return False
    theirs = (other.cost(objective), other.loss())
    ours = (trial.cost(objective), trial.loss())
    return theirs[0] <= ours[0] and theirs[1] <= ours[1] and theirs != ours
