"""What becomes of candidates, by their figures alone."""

from __future__ import annotations

import pytest
from trials_of import fp32_trial, speed, trial

from mmedge.bundle.tuning import Objective
from mmedge.converters.tuning.pareto import (
    Budget,
    Trial,
    choose,
    judge_trials,
    pareto_front,
    within,
)
from mmedge.errors import ConversionError

BUDGET = Budget("recall@1", 0.01, "latency")
SIZE = Budget("recall@1", 0.01, "size")
ENERGY = Budget("recall@1", 0.01, "energy")


def names(trials: list[Trial], budget: Budget = BUDGET) -> list[str]:
    return [one.name for one in pareto_front(trials, budget)]


def verdicts(trials: list[Trial], budget: Budget = BUDGET) -> dict[str, tuple[str, str]]:
    judged = judge_trials(trials, budget)
    return {one.name: (j.verdict, j.reason) for one, j in zip(trials, judged, strict=True)}


def test_fp32_alone_is_chosen() -> None:
    assert verdicts([fp32_trial()]) == {
        "fp32": ("chosen", "no candidate within the budget is faster or smaller"),
    }


def test_the_front_is_not_dominated_and_sorted_by_cost() -> None:
    trials = [
        fp32_trial(),
        trial("fp16", 0.001, 0.8),
        trial("int8-dynamic", 0.005, 0.4),
        trial("int8-static", 0.008, 0.5),
        trial("int8-static-mse", 0.5, 0.3),
        trial("bf16", None, failure="no kernel for bfloat16"),
    ]
    assert names(trials) == ["int8-dynamic", "fp16", "fp32"]
    judged = verdicts(trials)
    assert judged["fp32"] == ("front", "the reference")
    assert judged["int8-dynamic"][0] == "chosen"
    assert judged["int8-dynamic"][1].startswith("within the budget, 0.40 of fp32's time, 1.00 of")
    assert judged["fp16"] == ("front", "within the budget, nearer to fp32 than int8-dynamic")
    assert judged["int8-static"] == ("dropped", "int8-dynamic is faster and loses no more")
    assert judged["int8-static-mse"] == ("dropped", "loses 0.5000 of recall@1, more than 0.01")
    assert judged["bf16"] == ("dropped", "no kernel for bfloat16")


@pytest.mark.parametrize(
    ("drop", "kept"), [(0.01, True), (0.01 + 1e-9, False), (-0.02, True), (None, False)]
)
def test_the_budget_is_the_most_that_may_be_lost(drop: float | None, kept: bool) -> None:
    assert within(trial("int8-dynamic", drop, 0.5), BUDGET) is kept


def test_a_budget_of_zero_takes_a_lossless_variant() -> None:
    trials = [fp32_trial(), trial("int8-dynamic", 0.0, 0.5), trial("fp16", 0.001, 0.4)]
    assert names(trials, Budget("recall@1", 0.0, "latency")) == ["int8-dynamic", "fp32"]


@pytest.mark.parametrize(
    ("ratio", "width", "size_bytes", "gains"),
    [
        (0.98, 0.001, 1000, False),  # two per cent are not worth a loss
        (0.96, 0.001, 1000, True),
        (0.90, 0.15, 1000, False),  # its interval reaches beyond fp32
        (1.00, 0.001, 960, True),
        (1.00, 0.001, 980, False),
    ],
)
def test_a_variant_that_gains_too_little_is_dropped(
    ratio: float,
    width: float,
    size_bytes: int,
    gains: bool,
) -> None:
    one = trial("int8-dynamic", 0.001, None, size_bytes)
    one = Trial(one.recipe, None, one.quality, one.drop, size_bytes, speed(ratio, width), "", 0.0)
    judged = verdicts([fp32_trial(), one], SIZE)["int8-dynamic"]
    assert judged[1].startswith("no gain: ") is not gains


def test_smaller_and_slower_is_no_gain_for_latency_and_one_for_size() -> None:
    trials = [fp32_trial(), trial("int4", 0.001, 1.2, 250)]
    assert verdicts(trials)["int4"] == ("dropped", "fp32 is faster and loses no more")
    judged = verdicts(trials, SIZE)["int4"]
    assert judged == ("chosen", "within the budget, 1.20 of fp32's time, 0.25 of its size")


def test_of_costs_about_equal_the_nearer_to_fp32_is_chosen() -> None:
    trials = [
        fp32_trial(),
        trial("int8-static", 0.009, 0.400),
        trial("int8-dynamic", 0.002, 0.405),
        trial("fp16", 0.001, 0.45),
    ]
    kept = pareto_front(trials, BUDGET)
    assert choose(kept, "latency").name == "int8-dynamic"
    judged = verdicts(trials)
    assert judged["int8-static"] == ("front", "int8-dynamic costs about as much and loses less")
    assert judged["fp16"][1] == "within the budget, nearer to fp32 than int8-dynamic"


def test_the_cosine_breaks_ties_of_equal_drops() -> None:
    trials = [
        fp32_trial(),
        trial("int8-static", 0.0, 0.40, cosine=0.97),
        trial("int8-dynamic", 0.0, 0.40, cosine=0.99),
    ]
    judged = verdicts(trials)
    assert judged["int8-dynamic"][0] == "chosen"
    assert judged["int8-static"][0] == "dropped"


def test_a_gain_of_the_task_counts_as_no_loss() -> None:
    assert trial("int8-dynamic", -0.02, 0.5, cosine=0.99).loss() == (0.0, pytest.approx(0.01))


def test_exact_equals_are_both_kept_and_one_is_chosen() -> None:
    trials = [fp32_trial(), trial("int8-static", 0.001, 0.4), trial("int8-dynamic", 0.001, 0.4)]
    judged = [verdict for verdict, _ in verdicts(trials).values()]
    assert sorted(judged) == ["chosen", "front", "front"]


def test_an_untimed_variant_cannot_be_chosen_for_latency() -> None:
    trials = [fp32_trial(), trial("bf16", 0.0001, None, 500)]
    assert choose(pareto_front(trials, BUDGET), "latency").name == "fp32"
    assert verdicts(trials)["bf16"][0] == "dropped"
    assert choose(pareto_front(trials, SIZE), "size").name == "bf16"


def test_energy_chooses_by_energy() -> None:
    trials = [
        fp32_trial(energy_mj=100.0),
        trial("int8-static", 0.001, 0.4, energy_mj=60.0),
        trial("int8-dynamic", 0.002, 0.5, energy_mj=50.0),
    ]
    judged = verdicts(trials, ENERGY)
    assert judged["int8-dynamic"][0] == "chosen"
    assert judged["int8-dynamic"][1].endswith("50 mJ a call")
    assert judged["int8-static"][0] == "front"


def test_energy_that_was_not_measured_gains_nothing() -> None:
    trials = [fp32_trial(), trial("int8-dynamic", 0.001, 0.4)]
    assert choose(pareto_front(trials, ENERGY), "energy").name == "fp32"


def test_the_best_pair_may_differ_from_the_best_alone() -> None:
    trials = [fp32_trial(), trial("fp16", 0.001, 0.8), trial("int8-dynamic", 0.005, 0.4)]
    judged = judge_trials(trials, BUDGET, trials[1])
    assert [one.verdict for one in judged] == ["front", "chosen", "front"]
    assert judged[2].reason == "within the budget alone, not with the other roles' choice"
    judged = judge_trials(trials, BUDGET, trials[0])
    assert judged[0].verdict == "chosen"
    assert "other roles" in judged[0].reason


def test_a_choice_that_is_not_of_the_front_is_refused() -> None:
    trials = [fp32_trial(), trial("int8-dynamic", 0.5, 0.4)]
    with pytest.raises(
        ConversionError, match="int8-dynamic was chosen, but is not on the Pareto front"
    ):
        judge_trials(trials, BUDGET, trials[1])


@pytest.mark.parametrize("objective", ["latency", "size", "energy"])
def test_every_candidate_has_a_reason_and_one_is_chosen(objective: Objective) -> None:
    trials = [
        fp32_trial(energy_mj=9.0),
        *(
            trial(f"int4-keep{index}", index / 300, 1 - index / 9, 1000 - 90 * index, energy_mj=9.0)
            for index in range(1, 8)
        ),
        trial("bf16", None),
    ]
    judged = judge_trials(trials, Budget("recall@1", 0.01, objective))
    assert all(one.reason for one in judged)
    assert [one.verdict for one in judged].count("chosen") == 1
