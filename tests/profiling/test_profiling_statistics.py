"""What a sample supports, and the intervals around it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedge.errors import ProfileError
from mmedge.profiling.statistics import (
    PERCENTILES,
    median_ratio,
    quantile_interval,
    required_samples,
    summarize,
)


def samples(n: int) -> list[int]:
    return [int(x) for x in np.random.default_rng(n).gamma(9.0, 1e6, n)]


@pytest.mark.parametrize(("percent", "needed"), [(50, 10), (90, 50), (95, 100), (99, 500)])
def test_a_percentile_appears_from_five_expected_samples_beyond_it(
    percent: int, needed: int
) -> None:
    assert required_samples(percent) == needed
    fewer, enough = samples(needed - 1), samples(needed)
    assert f"p{percent}" not in summarize(fewer, fewer).percentiles
    assert f"p{percent}" in summarize(enough, enough).percentiles


def test_with_so_many_samples_the_largest_one_bounds_the_percentile() -> None:
    # The reason that the rule gives: no sample beyond the true percentile in under 1 % of cases.
    assert all((p / 100) ** required_samples(p) < 0.01 for p in PERCENTILES)


def test_percentiles_are_numpys_in_milliseconds() -> None:
    wall = samples(1000)
    latency = summarize(wall, [2 * x for x in wall])
    for percent in PERCENTILES:
        expected = np.percentile(wall, percent) / 1e6
        assert latency.percentiles[f"p{percent}"].value_ms == pytest.approx(expected, abs=1e-6)
    assert latency.n == 1000
    assert latency.mean_ms == pytest.approx(np.mean(wall) / 1e6)
    assert latency.cpu_ms == pytest.approx(2 * latency.mean_ms)
    assert (latency.min_ms, latency.max_ms) == (latency.curve_ms[0], latency.curve_ms[-1])
    assert list(latency.curve_ms) == sorted(latency.curve_ms)


def test_no_sample_is_an_error() -> None:
    with pytest.raises(ProfileError, match="got 0 runs"):
        summarize([], [])


@settings(deadline=None, max_examples=30)
@given(st.integers(10, 3000), st.sampled_from(PERCENTILES))
def test_the_interval_is_the_tightest_that_the_binomial_allows(n: int, percent: int) -> None:
    if n < required_samples(percent):
        return
    p = percent / 100
    low, high = quantile_interval(np.arange(1, n + 1), p)  # the ranks themselves

    def below(k: int) -> float:
        """P(X <= k), X binomial(n, p), by math.comb: another way than the code takes."""
        if n > 900:  # floats end there
            return math.nan
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))

    assert 1 <= low <= n * p + 1
    assert n * p <= high <= n
    if n <= 900:
        assert below(int(low) - 1) <= 0.025 + 1e-9 < below(int(low)) + 2e-9
        assert below(int(high) - 1) >= 0.975 - 1e-9 > below(int(high) - 2) - 2e-9


def test_the_interval_of_a_quantile_has_its_nominal_coverage() -> None:
    random = np.random.default_rng(7)
    truth = -math.log(1 - 0.9)  # p90 of the exponential distribution
    hits = 0
    for _ in range(1000):
        low, high = quantile_interval(np.sort(random.exponential(size=60)), 0.9)
        hits += low <= truth <= high
    assert hits >= 940  # 95 %, and a binomial standard deviation of 0.7 %


def test_a_sample_without_an_interval_is_refused() -> None:
    with pytest.raises(ProfileError, match="sample of 20 has no"):
        quantile_interval(list(range(20)), 0.99)


def test_the_ratio_of_pairs_survives_a_drift_that_the_times_do_not() -> None:
    random = np.random.default_rng(3)
    drift = np.linspace(1.0, 5.0, 200)  # the machine becomes five times as slow meanwhile
    theirs = drift * random.normal(10e6, 1e5, 200)
    ours = drift * random.normal(4e6, 4e4, 200)
    ratio = median_ratio([int(x) for x in ours], [int(x) for x in theirs])
    assert ratio.pairs == 200
    assert ratio.low <= 0.4 <= ratio.high
    assert ratio.high - ratio.low < 0.01


def test_a_ratio_needs_as_many_pairs_as_a_median() -> None:
    with pytest.raises(ProfileError, match="needs 10 interleaved pairs: got 9"):
        median_ratio([1] * 9, [2] * 9)
