"""time_interleaved(): order, budget and ratios, with calls and a clock that are made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mmedge.errors import InputError
from mmedge.runtimes.selection.interleaved import time_interleaved


class Stage:
    """A clock that only the calls move, and the order in which they were called."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.order: list[str] = []

    def clock(self) -> int:
        return self.now_ns

    def call(self, name: str, *latencies_ms: float) -> Callable[[], None]:
        """Return a call that takes the latencies in turn, the last one for ever."""
        left = list(latencies_ms)

        def run() -> None:
            self.order.append(name)
            self.now_ns += round((left.pop(0) if len(left) > 1 else left[0]) * 1e6)

        return run


def test_ratios_are_to_the_first_contestant() -> None:
    stage = Stage()
    results = time_interleaved(
        {"a": stage.call("a", 10), "b": stage.call("b", 5), "c": stage.call("c", 20)},
        rounds=9,
        clock=stage.clock,
    )
    assert list(results) == ["a", "b", "c"]
    assert [result.ratio for result in results.values()] == [1, 0.5, 2]
    assert [result.latency_p50_ms for result in results.values()] == [10, 5, 20]
    for result in results.values():
        assert result.ratio_low == result.ratio == result.ratio_high
        assert len(result.latencies_ms) == 9


def test_first_and_untimed_runs_do_not_count() -> None:
    stage = Stage()
    # The warm-up, then an untimed run and a timed one in each of three rounds.
    slow_at_first = stage.call("b", 900, 70, 6, 80, 5, 90, 4)
    results = time_interleaved(
        {"a": stage.call("a", 10), "b": slow_at_first}, rounds=3, clock=stage.clock, seed=1
    )
    assert results["b"].latencies_ms == (6, 5, 4)
    assert results["b"].latency_p50_ms == 5
    assert results["b"].latency_min_ms == 4


def test_ratios_are_taken_within_a_round_so_that_drift_cancels() -> None:
    stage = Stage()
    drift = [1.0, 1.0, 1.0, 4.0, 4.0, 9.0, 9.0]  # of both alike, a round at a time
    results = time_interleaved(
        {
            "a": stage.call("a", *(10 * factor for factor in drift)),
            "b": stage.call("b", *(8 * factor for factor in drift)),
        },
        rounds=3,
        clock=stage.clock,
    )
    assert results["b"].latencies_ms == (8, 32, 72)
    assert (results["b"].ratio_low, results["b"].ratio, results["b"].ratio_high) == (0.8, 0.8, 0.8)


def test_the_interval_encloses_the_ratio_of_a_noisy_sample() -> None:
    stage = Stage()
    # Warm-up and untimed runs at 1; the timed ones spread around 10.
    timed = [8.0, 9.0, 10.0, 11.0, 12.0, 10.0, 9.5, 10.5, 10.0, 30.0]
    latencies = [1.0, *(ms for late in timed for ms in (1.0, late))]
    results = time_interleaved(
        {"a": stage.call("a", 10), "b": stage.call("b", *latencies)}, rounds=10, clock=stage.clock
    )
    result = results["b"]
    assert result.ratio == 1.0  # the outlier of 30 does not move the median
    assert 0.8 <= result.ratio_low < 1 < result.ratio_high <= 1.2


def test_every_round_has_each_contestant_twice_in_a_random_order() -> None:
    def order(seed: int) -> list[str]:
        stage = Stage()
        time_interleaved(
            {n: stage.call(n, 1) for n in "abc"}, rounds=8, seed=seed, clock=stage.clock
        )
        assert stage.order[:3] == ["a", "b", "c"]
        return stage.order[3:]

    called = order(0)
    rounds = [called[i : i + 6] for i in range(0, len(called), 6)]
    for each in rounds:
        assert sorted(each) == ["a", "a", "b", "b", "c", "c"]
        assert each[0] == each[1]
        assert each[2] == each[3]
    assert len({tuple(each) for each in rounds}) > 1
    assert order(0) == called
    assert order(1) != called


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (0.1, 4), (None, 20), (60.0, 20)])
def test_no_round_begins_once_the_time_is_up(seconds: float | None, rounds: int) -> None:
    stage = Stage()
    calls = {"a": stage.call("a", 10), "b": stage.call("b", 2)}
    results = time_interleaved(calls, rounds=20, seconds=seconds, clock=stage.clock)
    # 12 ms of warm-up, then 24 ms a round.
    assert len(results["a"].latencies_ms) == rounds
    assert len(results["b"].latencies_ms) == rounds


def test_a_stopped_clock_gives_equal_calls() -> None:
    results = time_interleaved({"a": lambda: None, "b": lambda: None}, rounds=2, clock=lambda: 7)
    assert results["b"].ratio == 1
    assert results["b"].latency_min_ms == 0


def test_errors_of_a_call_are_let_through() -> None:
    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        time_interleaved({"a": fail})


def test_nothing_to_race_is_refused() -> None:
    with pytest.raises(InputError, match="got 0 calls and 30 rounds"):
        time_interleaved({})
    with pytest.raises(InputError, match="got 1 calls and 0 rounds"):
        time_interleaved({"a": lambda: None}, rounds=0)
