"""Timing of single runs, with several calls interleaved."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

from mmedge.profiling.config import Budget

__all__ = ["Call", "Samples", "harness_overhead_ns", "measure"]

# The timed call. It returns when the outputs are in host memory, so it waits for the device.
Call = Callable[[], object]

_WARMUP_RUNS = 3


@dataclass(slots=True)
class Samples:
    """Wall-clock and CPU time of every run of one call, in the order of the runs."""

    wall_ns: list[int] = field(default_factory=list)
    cpu_ns: list[int] = field(default_factory=list)


def measure(calls: Sequence[Call], budget: Budget) -> tuple[Samples, ...]:
    """Run calls in turn, A B A B ..., and time each run.

    Interleaving gives every call its share of whatever the machine does meanwhile, so that ratios
    between them hold where the times themselves drift. The clock is `time.perf_counter_ns`; CPU
    time is read outside the timed stretch. Garbage collection waits until the end.

    Args:
        calls: What to time, at least one.
        budget: How long; it counts for all calls together, min_runs for each.

    Returns:
        The samples of each call, in the order of `calls`; all of the same length.
    """
    samples = tuple(Samples() for _ in calls)
    with _no_collection():
        start, rounds = time.perf_counter(), 0
        while rounds < _WARMUP_RUNS or time.perf_counter() - start < budget.warmup_seconds:
            for call in calls:
                call()
            rounds += 1
        start, rounds = time.perf_counter(), 0
        while rounds < budget.max_runs and (
            rounds < budget.min_runs or time.perf_counter() - start < budget.seconds
        ):
            for call, sample in zip(calls, samples, strict=True):
                _time_once(call, sample)
            rounds += 1
    return samples


def _time_once(call: Call, samples: Samples) -> None:
    cpu = time.process_time_ns()
    start = time.perf_counter_ns()
    call()
    stop = time.perf_counter_ns()
    samples.wall_ns.append(stop - start)
    samples.cpu_ns.append(time.process_time_ns() - cpu)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable garbage collection inside timed runs, as timeit does."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def harness_overhead_ns() -> float:
    """Return the clock's overhead per run: the median time of an empty call."""
    samples = Samples()
    with _no_collection():
        for _ in range(2_000):
            _time_once(_nothing, samples)
    return float(median(samples.wall_ns))


def _nothing() -> None:
    pass
