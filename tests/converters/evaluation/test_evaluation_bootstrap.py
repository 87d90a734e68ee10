"""Intervals: what they cover, what they are by hand, and that pairing pays."""

from __future__ import annotations

import numpy as np
import pytest

from mmedge.converters.evaluation import bootstrap
from mmedge.converters.evaluation.bootstrap import mean_figure, mean_figures, percentile_figure
from mmedge.errors import ShapeError


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=400)
    figure = mean_figure(values)
    error = values.std() / np.sqrt(400)
    assert figure.value == pytest.approx(values.mean())
    assert figure.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert figure.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_intervals_have_their_nominal_coverage() -> None:
    rng = np.random.default_rng(1)
    share, trials = 0.8, 200
    covered = 0
    for _ in range(trials):
        figure = mean_figure(rng.random(60) < share)
        covered += figure.low <= share <= figure.high
    # The percentile interval of 60 zeros and ones is a little narrow: 0.90 to 0.98 in theory.
    assert 0.88 <= covered / trials <= 0.99


def test_the_interval_of_a_percentile_covers_it() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(100):
        figure = percentile_figure(rng.random(200), 10)
        covered += figure.low <= 0.1 <= figure.high
    assert covered >= 86


def test_a_percentile_is_numpys_and_so_is_each_draws() -> None:
    values = np.random.default_rng(3).normal(size=37)
    draws = np.concatenate(list(bootstrap._draws(37, seed=5)))
    for percent in (0, 1, 40, 100):
        figure = percentile_figure(values, percent, seed=5)
        assert figure.value == pytest.approx(np.percentile(values, percent))
        each = [np.percentile(np.repeat(values, counts), percent) for counts in draws]
        low, high = np.percentile(each, [2.5, 97.5])
        assert (figure.low, figure.high) == pytest.approx((low, high))


def test_the_interval_of_a_minimum_opens_upwards_only() -> None:
    values = np.random.default_rng(4).random(20)
    figure = percentile_figure(values, 0)
    assert figure.low == figure.value == values.min() < figure.high


def test_every_draw_has_as_many_samples_and_all_draws_differ() -> None:
    draws = np.concatenate(list(bootstrap._draws(30, seed=0)))
    assert draws.shape == (bootstrap.RESAMPLES, 30)
    assert set(draws.sum(axis=1).tolist()) == {30}
    assert len(np.unique(draws, axis=0)) == bootstrap.RESAMPLES


def test_many_samples_are_drawn_in_blocks_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(6).random(50)
    whole = mean_figure(values), percentile_figure(values, 1)
    monkeypatch.setattr(bootstrap, "_BLOCK", 120)
    for figure, expected in zip(
        (mean_figure(values), percentile_figure(values, 1)), whole, strict=True
    ):
        assert (figure.low, figure.high) == pytest.approx((expected.low, expected.high))


def test_a_paired_difference_is_known_better_than_its_parts() -> None:
    rng = np.random.default_rng(7)
    before = rng.random(200)
    after = before - 0.01 + 0.01 * rng.normal(size=200)
    figures = mean_figures({"before": before, "after": after, "lost": before - after})
    lost = figures["lost"]
    assert 0 < lost.low < 0.01 < lost.high < 0.02
    one, other = (figures[name].high - figures[name].low for name in ("before", "after"))
    assert lost.high - lost.low < np.hypot(one, other) / 10
    alone = mean_figure(before - after)
    assert (lost.low, lost.high) == pytest.approx((alone.low, alone.high))


def test_equal_values_leave_no_doubt() -> None:
    for values in (np.full(7, 0.1), np.ones(1)):
        figure = mean_figure(values)
        assert figure.low == pytest.approx(figure.value, abs=1e-12)
        assert figure.high == pytest.approx(figure.value, abs=1e-12)


def test_no_values_are_an_error() -> None:
    assert mean_figures({}) == {}
    for values in (np.zeros(0), np.zeros((2, 2))):
        with pytest.raises(ShapeError, match="at least one"):
            mean_figure(values)
        with pytest.raises(ShapeError, match="at least one"):
            percentile_figure(values, 1)
    with pytest.raises(ShapeError, match="one shape"):
        mean_figures({"a": np.zeros(2), "b": np.zeros(3)})
