"""Interleaved timing: all calls in each round, in random order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from mmedge.specs import Array

__all__ = ["ratio", "time_interleaved"]


def time_interleaved(
    turns: Mapping[str, Callable[[], object]], rounds: int
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return wall and CPU seconds of every call in each round, (rounds,).

    Args:
        turns: The calls by name; each is made twice before the first round.
        rounds: How often each is timed.
    """
    for call in turns.values():
        call()
        call()
    wall = {name: np.empty(rounds) for name in turns}
    cpu = {name: np.empty(rounds) for name in turns}
    order = list(turns)
    rng = np.random.default_rng(0)
    for index in range(rounds):
        for name in rng.permutation(order):  # no call always runs after the same one
            call = turns[name]
            started, started_cpu = time.perf_counter(), time.process_time()
            call()
            wall[name][index] = time.perf_counter() - started
            cpu[name][index] = time.process_time() - started_cpu
    return wall, cpu


def ratio(pairs: Array) -> dict[str, float]:
    """Return the median of ratios, one of each round, with its 95 % interval (bootstrap)."""
    draws = np.random.default_rng(0).choice(pairs, (2000, len(pairs)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {
        "median": round(float(np.median(pairs)), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }
