"""Energy measurement, if the machine has a readable counter.

Two kinds are known: RAPL, which Intel's and AMD's processors keep and Linux shows under
/sys/class/powercap, and the INA3221 of a Jetson, which Linux shows under /sys/class/hwmon. Both
count the whole processor or module: whatever else runs counts too, and so does what an idle
machine takes, which is not subtracted. That is right for a comparison (who is done sooner leaves
the machine idle sooner) and too high for an absolute claim.
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

__all__ = ["EnergyCounter", "Measurement", "energy_counter", "energy_per_call_mj", "why_not"]

_SYS = Path("/sys")
# Counters update every millisecond (RAPL) or every few (INA3221): a block must be much longer
# than that, and short enough for all contestants to see the same load.
_BLOCK_S = 0.5


class Gauge(Protocol):
    """Energy source: RAPL domains, or the rails of a Jetson."""

    @property
    def what(self) -> str:
        """Display name of what it measures."""

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
        """Millijoules, including the idle machine's.

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
        gauge: What is read.
    """

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge

    @property
    def what(self) -> str:
        """What it measures: "RAPL: package-0, dram"."""
        return self._gauge.what

    @contextmanager
    def measure(self) -> Iterator[Measurement]:
        """Measure the block.

        A thread reads the counter meanwhile, as often as its kind needs.

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
    """Return the machine's counter, None if none is readable (see `why_not`).

    Args:
        sys: Where sysfs is mounted.
    """
    gauge: Gauge | None = find_rails(sys) or find_domains(sys)
    return None if gauge is None else EnergyCounter(gauge)


def why_not(sys: Path = _SYS) -> str:
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

    Each round gives every contestant a block of about half a second, in which it is called over and
    over; the order turns around from round to round, so that a machine that warms up favours
    nobody. A contestant's figure is the median over its blocks.

    What a call raises is let through.

    Args:
        calls: By name; each returns when its outputs are in host memory.
        counter: What `energy_counter` returned.
        seconds: Measured time of each contestant, at least; above 0.
        clock: Nanoseconds.

    Returns:
        Millijoules of one call, by name, in the order of `calls`. Idle power is part of it.

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
    return {name: statistics.median(known) for name, known in figures.items()}


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
            f"Energy of {name!r}: {counter.what} gave {measured.energy_mj:g} mJ for {count} calls "
            "in half a second, so it does not count. Virtual machines often show such a counter. "
            "Choose by latency or size instead."
        )
    return measured.energy_mj / count
