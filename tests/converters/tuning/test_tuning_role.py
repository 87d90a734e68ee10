"""Which candidates follow from which outcomes, and what is made again: with fakes for the work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest
from trials_of import built, figure, fp32_trial, quality, speed, trial

from mmedge.bundle.quality import Figure, Quality
from mmedge.bundle.tuning import Speed
from mmedge.converters.evaluation.base import drop
from mmedge.converters.evaluation.embedding import METRICS
from mmedge.converters.methods.recipes import Recipe
from mmedge.converters.tuning.pareto import Budget, Trial, choose, pareto_front
from mmedge.converters.tuning.role import RoleSearch, describe_search, no_candidate_message
from mmedge.converters.tuning.speed import Runner, SpeedTest
from mmedge.converters.tuning.trials import TrialStore
from mmedge.converters.variants.builder import BuiltVariant
from mmedge.errors import BackendError, CalibrationError, QuantizationError

BUDGET = Budget("recall@1", 0.01, "latency")
PLAIN = ["fp16", "int8-dynamic", "int8-static", "int8-static-mse"]
EQUALIZED = ["int8-dynamic-equalized", "int8-static-mse-equalized-corrected"]
GOOD = (0.001, 0.4, 0.9999)


def lost(metric: str, found: Quality | None) -> Figure:
    return figure(0.0) if found is None else drop(metric, found, METRICS)


class Workshop:
    """Makes, judges and times candidates from a table of outcomes.

    An outcome is (drop, share of fp32's time, cosine), or an error to raise.
    """

    def __init__(
        self,
        outcomes: Mapping[str, tuple[float, float, float] | BaseException],
        folder: Path,
        others: tuple[float, float, float] = GOOD,
    ) -> None:
        self.others = others
        self.outcomes = {"fp32": (0.0, 1.0, 1.0), **outcomes}
        self.folder = folder
        self.made: list[str] = []
        self.reports: list[str] = []
        self.there: list[str] = []
        self.energy_mj: float | None = None

    def progress(self, name: str, there: bool) -> None:
        self.reports.append(name)
        self.there += [name] * there

    def build(self, recipe: Recipe) -> BuiltVariant:
        self.made.append(recipe.variant)
        outcome = self.outcomes.get(recipe.variant)
        if isinstance(outcome, BaseException):
            raise outcome
        return built(recipe.variant, self.folder)

    def judge(self, variant: BuiltVariant) -> Quality:
        drop, _, cosine = self._outcome(variant.recipe.variant)
        return quality(drop, cosine)

    def fp32(self) -> Speed:
        return speed(1.0, 0.0, self.energy_mj)

    def candidate(self, runner: Runner) -> Speed:
        (name, *_), *_ = (path.name.split(".") for path in runner.models.values())
        return speed(self._outcome(name)[1], energy_mj=self.energy_mj)

    def _outcome(self, name: str) -> tuple[float, float, float]:
        outcome = self.outcomes.get(name, self.others)
        assert not isinstance(outcome, BaseException)
        return outcome


@contextmanager
def opened(tmp_path: Path) -> Iterator[TrialStore]:
    """The work folder, which stays when the block ends."""
    store = TrialStore(tmp_path / "work", {})
    try:
        yield store
    finally:
        store.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


def run(
    shop: Workshop,
    store: TrialStore,
    budget: Budget = BUDGET,
    *,
    calibrated: bool = True,
    paired: bool = False,
) -> list[Trial]:
    shop.folder = store.role_folder("image_encoder")
    search = RoleSearch(
        role="image_encoder",
        budget=budget,
        build=shop.build,
        judge=shop.judge,
        drop=lambda found: lost(budget.metric, found),
        speed=cast("SpeedTest", shop),
        store=store,
        calibrated=calibrated,
        progress=shop.progress,
        paired=paired,
    )
    return search.run(built("fp32", shop.folder))


def tried(
    tmp_path: Path,
    outcomes: Mapping[str, tuple[float, float, float] | BaseException],
    budget: Budget = BUDGET,
    *,
    calibrated: bool = True,
    paired: bool = False,
) -> list[str]:
    with opened(tmp_path) as store:
        shop = Workshop(outcomes, tmp_path)
        trials = run(shop, store, budget, calibrated=calibrated, paired=paired)
    assert [one.name for one in trials] == shop.reports
    assert trials[0].name == "fp32"
    return [one.name for one in trials[1:]]


def test_where_the_plain_methods_hold_nothing_else_is_tried(tmp_path: Path) -> None:
    assert tried(tmp_path, {}) == PLAIN


def test_without_calibration_only_methods_that_need_none_are_tried(tmp_path: Path) -> None:
    lossy = dict.fromkeys(["fp16", "int8-dynamic"], (0.3, 0.4, 0.9))
    assert tried(tmp_path, lossy, calibrated=False) == ["fp16", "int8-dynamic"]


def test_paired_weights_are_tried_beside_dynamic_int8_where_they_pay(tmp_path: Path) -> None:
    lossy = dict.fromkeys([*PLAIN, "int8-dynamic-paired"], (0.3, 0.4, 0.9))
    names = tried(tmp_path, lossy, paired=True)
    assert names[:3] == ["fp16", "int8-dynamic", "int8-dynamic-paired"]
    assert names[5:7] == ["int8-dynamic-equalized", "int8-dynamic-equalized-paired"]


def test_the_size_objective_tries_small_recipes(tmp_path: Path) -> None:
    names = tried(tmp_path, {}, Budget("recall@1", 0.01, "size"))
    assert {"int8-weight-g128", "int4-g128", "int4-g64-hqq", "int4-g128-gptq"} < set(names)


SMALLER = ["int4-g128-gptq", "int4-g128-gptq-at25", "int4-g128-gptq-at20"]


@pytest.mark.parametrize(("held", "last"), [(0, 0), (1, 1), (2, 2), (3, 2)])
def test_size_goes_below_four_bits_while_that_holds(held: int, last: int, tmp_path: Path) -> None:
    lossy = dict.fromkeys(SMALLER[held:], (0.3, 0.4, 0.9))
    names = tried(tmp_path, lossy, Budget("recall@1", 0.01, "size"))
    assert [name for name in names if "gptq" in name] == SMALLER[: last + 1]
    assert not [name for name in names if "-at" in name and "keep" in name]


def test_nothing_goes_below_four_bits_for_speed_or_without_data(tmp_path: Path) -> None:
    assert not [name for name in tried(tmp_path / "a", {}) if "int4" in name]
    size = Budget("recall@1", 0.01, "size")
    names = tried(tmp_path / "b", {}, size, calibrated=False)
    assert "int4-g128" in names
    assert not [name for name in names if "gptq" in name]


def test_embeddings_that_moved_call_for_equalization(tmp_path: Path) -> None:
    moved = dict.fromkeys(PLAIN, (0.0, 0.4, 0.99))
    assert tried(tmp_path, moved) == PLAIN + EQUALIZED


def test_a_half_of_the_budget_used_calls_for_equalization(tmp_path: Path) -> None:
    near = dict.fromkeys(PLAIN, (0.006, 0.4, 0.9999))
    assert tried(tmp_path, near) == PLAIN + EQUALIZED


@pytest.mark.parametrize(("share", "equalized"), [(0.8, True), (0.45, False)])
def test_a_costlier_variant_does_not_replace_int8(
    share: float, equalized: bool, tmp_path: Path
) -> None:
    outcomes = dict.fromkeys(PLAIN, (0.3, 0.4, 0.9)) | {"fp16": (0.0, share, 1.0)}
    assert (EQUALIZED[0] in tried(tmp_path, outcomes)) == equalized


def test_a_hardly_faster_variant_does_not_end_the_search(tmp_path: Path) -> None:
    slow = dict.fromkeys(PLAIN, (0.0, 0.95, 0.9999))
    assert tried(tmp_path, slow)[: len(PLAIN + EQUALIZED)] == PLAIN + EQUALIZED


def test_the_best_candidate_is_refined_until_the_budget_holds(tmp_path: Path) -> None:
    lossy: dict[str, tuple[float, float, float]] = dict.fromkeys(PLAIN + EQUALIZED, (0.3, 0.4, 0.9))
    lossy["fp16"] = (0.0, 1.1, 1.0)
    lossy["int8-static-mse"] = (0.03, 0.4, 0.99)
    lossy["int8-static-mse-keep1"] = (0.02, 0.45, 0.99)
    lossy["int8-static-mse-keep2"] = (0.015, 0.5, 0.99)
    lossy["int8-static-mse-keep4"] = (0.008, 0.55, 0.99)
    refined = [f"int8-static-mse-keep{count}" for count in (1, 2, 4)]
    assert tried(tmp_path, lossy) == PLAIN + EQUALIZED + refined


def test_no_layers_are_excluded_once_that_costs_more_than_fp32(tmp_path: Path) -> None:
    lossy: dict[str, tuple[float, float, float]] = dict.fromkeys(PLAIN + EQUALIZED, (0.3, 0.4, 0.9))
    lossy["int8-dynamic"] = (0.03, 0.4, 0.99)
    lossy["int8-dynamic-keep1"] = (0.02, 0.8, 0.99)
    lossy["int8-dynamic-keep2"] = (0.02, 1.2, 0.99)
    names = tried(tmp_path, lossy)
    assert names[len(PLAIN + EQUALIZED) :][:2] == ["int8-dynamic-keep1", "int8-dynamic-keep2"]
    assert "int8-dynamic-keep4" not in names


def test_where_nothing_holds_distillation_comes_last(tmp_path: Path) -> None:
    shop = Workshop({"fp16": (0.0, 1.0, 1.0)}, tmp_path, others=(0.3, 0.4, 0.9))
    with opened(tmp_path) as store:
        names = [one.name for one in run(shop, store)]
    assert names[-1].endswith("-distilled")
    assert sum(name.endswith("-distilled") for name in names) == 1
    assert [name for name in names if name.endswith("-keep16")]


@pytest.mark.parametrize("error", [QuantizationError("no such op"), BackendError("crashed")])
def test_a_failed_candidate_is_reported_and_the_search_goes_on(
    error: Exception, tmp_path: Path
) -> None:
    with opened(tmp_path) as store:
        trials = run(Workshop({"int8-static": error}, tmp_path), store)
    failed = next(one for one in trials if one.name == "int8-static")
    assert (failed.built, failed.drop, failed.speed) == (None, None, None)
    assert failed.failure == str(error)
    assert [one.name for one in trials[1:]] == PLAIN
    record = describe_search(trials, BUDGET, choose(pareto_front(trials, BUDGET), "latency"))
    reports = next(one for one in record.candidates if one.variant == "int8-static")
    assert (reports.verdict, reports.reason) == ("dropped", str(error))


def test_data_that_cannot_be_used_ends_the_search(tmp_path: Path) -> None:
    shop = Workshop({"int8-static": CalibrationError("no samples")}, tmp_path)
    with opened(tmp_path) as store, pytest.raises(CalibrationError, match="no samples"):
        run(shop, store)


def test_finished_candidates_are_not_made_again(tmp_path: Path) -> None:
    lossy = dict.fromkeys(PLAIN, (0.02, 0.4, 0.99))
    with opened(tmp_path) as store:
        first = run(Workshop({**lossy, "bf16": BackendError("none")}, tmp_path), store)
    again = Workshop(lossy, tmp_path)
    with opened(tmp_path) as store:
        second = run(again, store)
    assert again.made == []
    assert [one.name for one in second] == [one.name for one in first]
    assert [one.drop for one in second] == [one.drop for one in first]
    assert [one.speed for one in second] == [one.speed for one in first]
    wider = Workshop(lossy, tmp_path)
    with opened(tmp_path) as store:
        third = run(wider, store, Budget("recall@1", 0.05, "latency"))
    assert wider.made == []
    assert len(third) <= len(first)


def test_a_crash_of_the_engine_is_tried_again_by_the_next_search(tmp_path: Path) -> None:
    errors = {"int8-static": BackendError("out of memory"), "fp16": QuantizationError("no")}
    with opened(tmp_path) as store:
        run(Workshop(errors, tmp_path), store)
    again = Workshop({}, tmp_path)
    with opened(tmp_path) as store:
        trials = run(again, store)
    assert again.made == ["int8-static"]
    assert [one.name for one in trials if one.failure] == ["fp16"]


def test_an_interrupted_search_goes_on_where_it_was(tmp_path: Path) -> None:
    shop = Workshop({"int8-static": KeyboardInterrupt()}, tmp_path)
    with opened(tmp_path) as store, pytest.raises(KeyboardInterrupt):
        run(shop, store)
    assert shop.made == ["fp16", "int8-dynamic", "int8-static"]
    again = Workshop({}, tmp_path)
    with opened(tmp_path) as store:
        trials = run(again, store)
    assert again.made == ["int8-static", "int8-static-mse"]
    assert again.there == ["fp32", "fp16", "int8-dynamic"]
    assert [one.name for one in trials[1:]] == PLAIN


def test_a_candidate_without_energy_is_made_again_where_energy_counts(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        run(Workshop({}, tmp_path), store)
    shop = Workshop({}, tmp_path)
    shop.energy_mj = 50.0
    with opened(tmp_path) as store:
        trials = run(shop, store, Budget("recall@1", 0.01, "energy"))
    assert shop.made[: len(PLAIN)] == PLAIN
    assert all(one.speed is not None and one.speed.energy_mj == 50 for one in trials)


def test_nothing_found_names_the_closest_of_each_role() -> None:
    lossy = [fp32_trial(), trial("int8-static", 0.3, 0.4), trial("int8-dynamic", 0.02, 0.5)]
    failed = [fp32_trial(), trial("bf16", None, failure="no kernel")]
    message = no_candidate_message({"image_encoder": lossy, "text_encoder": failed}, BUDGET)
    assert message is not None
    assert "image_encoder: int8-dynamic loses 0.0200" in message
    assert "int8-static" not in message
    assert "--max-drop" in message
    assert "\n" not in message
    larger = [fp32_trial(), trial("fp16", 0.0, 1.2, size_bytes=4_000_000)]
    message = no_candidate_message({"image_encoder": lossy, "text_encoder": larger}, BUDGET)
    assert "text_encoder: none of 1 gains" in str(message)
    assert "no candidate could be made" in str(
        no_candidate_message({"text_encoder": failed}, BUDGET)
    )


def test_one_role_that_gains_is_enough() -> None:
    good = [fp32_trial(), trial("int8-dynamic", 0.001, 0.4)]
    searches = {"image_encoder": good, "text_encoder": [fp32_trial()]}
    assert no_candidate_message(searches, BUDGET) is None


def test_the_record_has_settings_and_measurements() -> None:
    trials = [fp32_trial(), trial("int8-dynamic", 0.001, 0.4), trial("bf16", None, failure="no")]
    record = describe_search(trials, BUDGET, trials[1])
    assert (record.metric, record.max_drop, record.objective) == ("recall@1", 0.01, "latency")
    assert (record.data, record.samples) == ("held-out: 200", 200)
    assert record.energy_counter is None
    assert [one.variant for one in record.candidates] == ["fp32", "int8-dynamic", "bf16"]
    assert [one.verdict for one in record.candidates] == ["front", "chosen", "dropped"]
