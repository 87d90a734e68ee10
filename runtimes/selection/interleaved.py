"""Interleaved benchmark: calls alternate, so that load drift cancels out.

In every round each contestant has one turn, in random order, and is compared with the first one
within that round: both saw the same load and the same clock frequency. A turn is one run that is
not timed and one that is. The first lets the contestant take back the caches, and lets the worker
threads of the one before it stop spinning, which would otherwise hold the processors that this one
needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mmedge.errors import InputError
from mmedge.specs import Array

__all__ = ["InterleavedTiming", "time_interleaved"]

_LEAST_ROUNDS = 3
_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class InterleavedTiming:
    """Timing of one contestant.

    Attributes:
        latency_p50_ms: Median wall-clock time of its timed runs.
        latency_min_ms: The fastest of them.
        ratio: Median over the rounds of its time over the first contestant's: below 1 where it is
            faster, 1 for the first itself.
        ratio_low: Lower end of the ratio's 95 % interval, by bootstrap over the rounds.
        ratio_high: Upper end.
        latencies_ms: Its timed runs, one a round.
    """

    latency_p50_ms: float
    latency_min_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    latencies_ms: tuple[float, ...]


def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 30,
    seconds: float | None = None,
    seed: int = 0,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, InterleavedTiming]:
    """Time calls interleaved, and compare each with the first.

    What a call raises is let through.

    Args:
        calls: By name; each returns when its outputs are in host memory.
        rounds: How many, at most; at least 1.
        seconds: No further round begins after so long, once there were 3; None for no limit.
        seed: Of the order within the rounds and of the bootstrap.
        clock: Nanoseconds.

    Returns:
        One result for each call, in the order of `calls`.

    Raises:
        InputError: If there is no call or no round.
    """
    if not calls or rounds < 1:
        raise InputError(
            f"Benchmark: got {len(calls)} calls and {rounds} rounds, expected at least 1 of each."
        )
    random = np.random.default_rng(seed)
    names = list(calls)
    begun_ns = clock()
    for call in calls.values():
        call()  # warm-up: allocation and compilation do not count
    times_ns: dict[str, list[int]] = {name: [] for name in names}
    for done in range(rounds):
        if seconds is not None and done >= _LEAST_ROUNDS and clock() - begun_ns > seconds * 1e9:
            break
        for index in random.permutation(len(names)):
            name = names[index]
            calls[name]()
            start_ns = clock()
            calls[name]()
            times_ns[name].append(clock() - start_ns)
    by_name = {name: np.asarray(taken, np.float64) / 1e6 for name, taken in times_ns.items()}
    first = by_name[names[0]]
    drawn = random.integers(0, len(first), (_RESAMPLES, len(first)))
    return {name: _result(latencies_ms, first, drawn) for name, latencies_ms in by_name.items()}


def _result(latencies_ms: Array, first_ms: Array, drawn: Array) -> InterleavedTiming:
    """Summarize one contestant.

    Args:
        latencies_ms: (R,) its times.
        first_ms: (R,) those of the first contestant.
        drawn: (B, R) rounds of each bootstrap sample.
    """
    # A clock that does not advance must not cause a division by zero.
    tick_ms = 1e-6
    ratios = np.maximum(latencies_ms, tick_ms) / np.maximum(first_ms, tick_ms)
    low, high = np.quantile(np.median(ratios[drawn], axis=1), (0.025, 0.975))
    return InterleavedTiming(
        latency_p50_ms=float(np.median(latencies_ms)),
        latency_min_ms=float(latencies_ms.min()),
        ratio=float(np.median(ratios)),
        ratio_low=float(low),
        ratio_high=float(high),
        latencies_ms=tuple(map(float, latencies_ms)),
    )
