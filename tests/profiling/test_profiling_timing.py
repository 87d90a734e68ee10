"""The clock agrees with an outside one, and calls are interleaved."""

from __future__ import annotations

import gc
import statistics
import time

import numpy as np
import pytest

from mmedge.profiling.config import Budget
from mmedge.profiling.timing import harness_overhead_ns, measure
from mmedge.runtimes.fake import FakeSession
from mmedge.specs import TensorSpec

AT_ONCE = Budget(seconds=0, warmup_seconds=0, min_runs=5)


def sleeping_session(latency_ms: float) -> FakeSession:
    spec = TensorSpec("x", np.dtype("float32"), ("batch", 2))
    return FakeSession((spec,), (spec,), latency_ms=latency_ms)


def test_a_run_of_known_length_agrees_with_an_outside_clock() -> None:
    session = sleeping_session(20.0)
    feed = {"x": np.ones((1, 2), np.float32)}
    budget = AT_ONCE.model_copy(update={"min_runs": 12})
    start = time.monotonic_ns()
    (samples,) = measure([lambda: session.run(feed)], budget)
    outside_ns = time.monotonic_ns() - start
    assert len(session.calls) == 12 + 3  # three for warm-up
    # A sleep may take longer than it should, never less.
    assert min(samples.wall_ns) >= 20e6
    # What was reported, and three runs of warm-up, fit into what passed outside. How much less it
    # may be is the machine's business; benchmarks/outside_clock.py measures that.
    assert sum(samples.wall_ns) + 3 * 20e6 <= outside_ns


def test_of_each_run_all_is_counted_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ns = 0

    def clock() -> int:
        nonlocal now_ns
        now_ns += 1_000  # every look at the clock costs a microsecond
        return now_ns

    def run(length_ns: int) -> None:
        nonlocal now_ns
        now_ns += length_ns

    monkeypatch.setattr(time, "perf_counter_ns", clock)
    lengths = iter([0] * 3 + [7_000_000, 9_000_000, 8_000_000, 7_000_000, 7_000_000])
    (samples,) = measure([lambda: run(next(lengths))], AT_ONCE)
    assert samples.wall_ns == [7_001_000, 9_001_000, 8_001_000, 7_001_000, 7_001_000]


def test_a_sleeping_run_shows_no_cpu_time() -> None:
    session = sleeping_session(20.0)
    feed = {"x": np.ones((1, 2), np.float32)}
    (samples,) = measure([lambda: session.run(feed)], AT_ONCE)
    assert len(samples.cpu_ns) == 5
    assert statistics.median(samples.cpu_ns) < 20e6


def test_calls_are_taken_in_turn_after_the_warm_up() -> None:
    order: list[str] = []
    first, second = measure([lambda: order.append("A"), lambda: order.append("B")], AT_ONCE)
    assert order == ["A", "B"] * (3 + 5)
    assert len(first.wall_ns) == len(second.wall_ns) == 5


def test_seconds_go_on_past_the_fewest_runs_and_max_runs_ends_it() -> None:
    budget = Budget(seconds=60, warmup_seconds=0, min_runs=1, max_runs=40)
    (samples,) = measure([lambda: None], budget)
    assert len(samples.wall_ns) == 40
    budget = Budget(seconds=0.02, warmup_seconds=0, min_runs=1)
    (samples,) = measure([lambda: None], budget)
    assert len(samples.wall_ns) > 40


def test_a_call_that_fails_passes_its_error_on_and_leaves_the_collector_on() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        measure([fail], AT_ONCE)
    assert gc.isenabled()


def test_the_collector_rests_while_runs_are_timed() -> None:
    seen: list[bool] = []
    measure([lambda: seen.append(gc.isenabled())], AT_ONCE)
    assert not any(seen)


def test_the_harness_adds_next_to_nothing() -> None:
    # The median of an empty call; a microsecond is 20 times what was seen.
    assert 0 < harness_overhead_ns() < 20_000
