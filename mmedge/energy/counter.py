"""Energy measurement, if the machine has a readable counter.

Two kinds are supported: RAPL of Intel and AMD processors (/sys/class/powercap), and the INA3221 of
a Jetson (/sys/class/hwmon). Both measure the whole processor or module, other processes and idle
power included. That is right for a comparison (a faster contestant leaves the machine idle sooner)
and too high as an absolute figure.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from mmedge.energy.ina3221 import find_rails, rails_missing
from mmedge.energy.rapl import domains_missing, find_domains
from mmedge.errors import InputError, ProfileError

__all__ = [
    "EnergyCounter",
    "Measurement",
    "energy_counter",
    "energy_per_call_mj",
    "unavailable_reason",
]

_SYS = Path("/sys")
# Much longer than the counters' interval (a few milliseconds), and short enough for all contestants
# to see the same load.
_BLOCK_S = 0.5


class Gauge(Protocol):
    """Energy source: RAPL domains, or the rails of a Jetson."""

    @property
    def what(self) -> str:
        """Display name of the measured part."""

    @property
    def interval_s(self) -> float:
        """Longest time between two readings, in seconds."""

    def start(self) -> Callable[[], float]:
        """Start measuring; each call of the result returns the millijoules since the last."""


class Measurement:
    """The energy of one block.

    Args:
        outcome: Set to the energy when the block succeeds.
    """

    def __init__(self, outcome: Sequence[float]) -> None:
        self._outcome = outcome

    @property
    def energy_mj(self) -> float:
        """Millijoules, idle power included.

        Raises:
            ProfileError: If the block has not ended.
        """
        if not self._outcome:
            raise ProfileError(
                "The measurement is not finished. Read energy_mj after the 'with' block."
            )
        return self._outcome[0]


class EnergyCounter:
    """The energy counter of this machine.

    Args:
        gauge: The energy source.
    """

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge

    @property
    def what(self) -> str:
        """Display name of the measured part: "RAPL: package-0, dram"."""
        return self._gauge.what

    @contextmanager
    def measure(self) -> Iterator[Measurement]:
        """Measure the block.

        A thread reads the counter at the gauge's interval.

        Raises:
            ProfileError: If the counter can no longer be read.
        """
        outcome: list[float] = []
        tick = self._gauge.start()
        ended = threading.Event()
        parts: list[float] = []
        faults: list[ProfileError] = []

        def sample() -> None:
            try:
                while not ended.wait(self._gauge.interval_s):
                    parts.append(tick())
            except ProfileError as error:
                faults.append(error)

        thread = threading.Thread(target=sample, name="mmedge-energy", daemon=True)
        thread.start()
        try:
            yield Measurement(outcome)
        finally:
            ended.set()
            thread.join()
        if faults:
            raise faults[0]
        parts.append(tick())
        outcome.append(math.fsum(parts))


def energy_counter(sys: Path = _SYS) -> EnergyCounter | None:
    """Return the machine's counter, None if none is readable (see `unavailable_reason`).

    Args:
        sys: Where sysfs is mounted.
    """
    gauge: Gauge | None = find_rails(sys) or find_domains(sys)
    return None if gauge is None else EnergyCounter(gauge)


def unavailable_reason(sys: Path = _SYS) -> str:
    """Return why there is no counter, and the fix, as one message; "" if there is one."""
    if energy_counter(sys) is not None:
        return ""
    return (
        f"No energy counter can be read here. {domains_missing(sys)} {rails_missing(sys)} "
        "Or choose by latency or size, which need no counter."
    )


def energy_per_call_mj(
    calls: Mapping[str, Callable[[], object]],
    counter: EnergyCounter,
    *,
    seconds: float,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, float]:
    """Measure the energy per call of each contestant, interleaved.

    In each round every contestant is called repeatedly for about half a second; the order is
    reversed from round to round, so that warm-up of the machine favours none. The result is the
    median over a contestant's blocks. Exceptions of the calls are not caught.

    Args:
        calls: By name; each returns when its outputs are in host memory.
        counter: The counter.
        seconds: Minimum measured time of each contestant; above 0.
        clock: Clock in nanoseconds.

    Returns:
        Millijoules per call by name, in the order of `calls`, idle power included.

    Raises:
        InputError: If there is no call, or no time for one.
        ProfileError: If the counter cannot be read, or did not move.
    """
    if not calls or not seconds > 0:
        raise InputError(
            f"Energy: got {len(calls)} calls and {seconds} seconds, expected at least 1 call and "
            "more than 0 seconds."
        )
    names = list(calls)
    figures: dict[str, list[float]] = {name: [] for name in names}
    for done in range(max(1, math.ceil(seconds / _BLOCK_S - 1e-9))):
        for name in names if done % 2 == 0 else reversed(names):
            figures[name].append(_block(name, calls[name], counter, clock))
    return {name: statistics.median(blocks) for name, blocks in figures.items()}


def _block(
    name: str, call: Callable[[], object], counter: EnergyCounter, clock: Callable[[], int]
) -> float:
    """Return the energy per call, over a block of calls."""
    call()  # warm-up: caches and spinning threads of the previous contestant do not count
    count = 0
    with counter.measure() as measured:
        end_ns = clock() + round(_BLOCK_S * 1e9)
        while count == 0 or clock() < end_ns:
            call()
            count += 1
    if not measured.energy_mj > 0:
        raise ProfileError(
            f"Energy of {name!r}: {counter.what} measured {measured.energy_mj:g} mJ for {count} "
            "calls in half a second, so the counter does not work, as in many virtual machines. "
            "Choose by latency or size instead."
        )
    return measured.energy_mj / count
