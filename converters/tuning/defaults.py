"""Default variant of each role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmedge.bundle.tuning import Objective, Speed
from mmedge.converters.config import recipes
from mmedge.converters.graphs.worker import Worker
from mmedge.converters.report import RoleDefault
from mmedge.converters.tuning.pareto import Budget, Trial, choose, pareto_front, within
from mmedge.converters.tuning.speed import Runner, SpeedTest
from mmedge.converters.variants.builder import BuiltVariant
from mmedge.converters.variants.describe import BuiltRole, files_of
from mmedge.converters.variants.job import Job
from mmedge.errors import BackendError, ConversionError
from mmedge.specs import did_you_mean, first_sample

__all__ = ["choose_defaults", "searched_default"]

_ROUNDS, _SECONDS, _CLEAR_ROUNDS = 12, 2.0, 3


def choose_defaults(job: Job, roles: Mapping[str, BuiltRole]) -> dict[str, RoleDefault]:
    """Choose the default of every role of a bundle with named precisions.

    It is the one that `config.default` names; else the fastest variant within the accuracy budget
    that gains on fp32, and where no graph is for this machine's CPU, the smallest one.

    Args:
        job: The conversion.
        roles: Every role with its variants and their qualities.

    Raises:
        ConversionError: If `config.default` names no variant of a role.
    """
    objective: Objective = "latency" if "cpu" in job.config.targets else "size"
    budget = Budget(job.evaluation.default_metric(), job.config.max_drop, objective)
    with Worker() as worker:
        return {name: _choose(job, name, role, budget, worker) for name, role in roles.items()}


def searched_default(fp32: Trial, chosen: Trial, budget: Budget) -> RoleDefault:
    """Describe the default chosen by a search."""
    return _describe(fp32, chosen, budget)


def _choose(job: Job, name: str, role: BuiltRole, budget: Budget, worker: Worker) -> RoleDefault:
    kept = {recipe.variant for recipe in recipes(job.config, name)}
    named = _named(
        job.config.default_of(name), name, [v for v in role.variants if v.recipe.variant in kept]
    )
    worth_timing = budget.objective == "latency" and (len(kept) > 1 or named)
    speeds = _speeds(role, worker) if worth_timing else [None] * len(role.variants)
    trials = [
        _trial(job, role, variant, budget, speed)
        for variant, speed in zip(role.variants, speeds, strict=True)
    ]
    fp32, pool = trials[0], [trial for trial in trials if trial.name in kept]
    if named is not None:
        return _describe(fp32, next(t for t in pool if t.name == named), budget)
    good = [trial for trial in pool if within(trial, budget)]
    if not good:
        return _describe(fp32, min(pool, key=Trial.loss), budget)
    if fp32 in good:
        return _describe(fp32, choose(pareto_front(good, budget), budget.objective), budget)
    ranked = sorted(good, key=lambda trial: trial.cost(budget.objective))
    return _describe(fp32, choose(ranked, budget.objective), budget)


def _named(default: str | None, role: str, variants: Sequence[BuiltVariant]) -> str | None:
    """Return the variant with a name or precision."""
    if default is None:
        return None
    for variant in variants:
        if default in (variant.recipe.variant, variant.recipe.precision.value):
            return variant.recipe.variant
    names = [variant.recipe.variant for variant in variants]
    raise ConversionError(
        f"--default: {role} has no variant '{default}', expected one of {', '.join(names)}."
        + did_you_mean(default, names)
    )


def _speeds(role: BuiltRole, worker: Worker) -> list[Speed | None]:
    """Time every variant on one golden sample, fp32 first."""
    fp32, *others = map(Runner.of, role.variants)
    feed = first_sample(role.spec.inputs, role.golden)
    test = SpeedTest(
        fp32,
        feed,
        role.golden,
        worker=worker,
        rounds=_ROUNDS,
        seconds=_SECONDS,
        clear_rounds=_CLEAR_ROUNDS,
    )
    try:
        reference, timed = test.compare(others)
    except BackendError:  # no backend here agrees with fp32's golden outputs
        return [None] * len(role.variants)
    return [reference, *timed]


def _trial(
    job: Job, role: BuiltRole, built: BuiltVariant, budget: Budget, speed: Speed | None
) -> Trial:
    quality = role.qualities[built.recipe.variant]
    return Trial(
        recipe=built.recipe,
        built=built,
        quality=quality,
        drop=job.evaluation.drop(budget.metric, quality),
        size_bytes=sum(path.stat().st_size for path in files_of(built)),
        speed=speed,
    )


def _describe(fp32: Trial, chosen: Trial, budget: Budget) -> RoleDefault:
    assert chosen.drop is not None  # noqa: S101, it was made
    return RoleDefault(
        variant=chosen.name,
        size_bytes=chosen.size_bytes or 0,
        fp32_size_bytes=fp32.size_bytes or 0,
        speed=chosen.speed,
        metric=budget.metric,
        drop=chosen.drop,
        within=within(chosen, budget),
    )
