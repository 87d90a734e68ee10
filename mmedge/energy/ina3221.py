"""INA3221 of a Jetson: voltage and current of each rail, without an energy counter.

Source: Documentation/hwmon/ina3221.rst of the Linux kernel for the files (inN_input millivolts,
currN_input milliamperes, N from 1 to 3), and NVIDIA's Jetson Linux Developer Guide for the rails,
which are named by label since their place differs from board to board.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mmedge.errors import ProfileError

__all__ = ["Rail", "Rails", "find_rails", "rails_missing"]

_INTERVAL_S = 0.02

# The rails that make up a whole module, each counted once: the first set of which all are
# present is used. A rail fed from another (VDDQ_VDD2_1V8AO of AGX Orin, from VIN_SYS_5V0; those
# behind VDD_IN) would count twice, so a rail that no set names is left out.
_MODULES: tuple[tuple[str, ...], ...] = (
    ("VDD_IN",),  # Orin NX and Nano, Xavier NX, TX2: the module's input
    ("POM_5V_IN",),  # Nano
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # Thor
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)


@dataclass(frozen=True, slots=True)
class Rail:
    """One channel.

    Attributes:
        label: As the board names it.
        volts: File of its voltage in millivolts.
        amperes: File of its current in milliamperes.
    """

    label: str
    volts: Path
    amperes: Path

    def power_mw(self) -> float:
        """Return the current power in milliwatts.

        Raises:
            ProfileError: If it cannot be read.
        """
        try:
            return int(self.volts.read_text()) * int(self.amperes.read_text()) / 1000
        except (OSError, ValueError) as error:
            raise ProfileError(
                f"Power rail {self.label!r} ({self.volts}): cannot be read any more ({error})."
            ) from error


@dataclass(frozen=True)
class Rails:
    """The rails of a module; their power is summed over time by the trapezoidal rule."""

    rails: tuple[Rail, ...]
    clock: Callable[[], int] = time.monotonic_ns

    @property
    def what(self) -> str:
        """Display name of what it measures."""
        return f"INA3221: {', '.join(rail.label for rail in self.rails)}"

    @property
    def interval_s(self) -> float:
        """Longest time between two readings, in seconds."""
        return _INTERVAL_S

    def start(self) -> Callable[[], float]:
        """Start measuring; each call of the result returns the millijoules since the last."""
        last_mw, last_ns = self._power_mw(), self.clock()

        def tick() -> float:
            nonlocal last_mw, last_ns
            now_mw, now_ns = self._power_mw(), self.clock()
            energy_mj = (last_mw + now_mw) / 2 * (now_ns - last_ns) / 1e9
            last_mw, last_ns = now_mw, now_ns
            return energy_mj

        return tick

    def _power_mw(self) -> float:
        return sum(rail.power_mw() for rail in self.rails)


def find_rails(sys: Path) -> Rails | None:
    """Return the rails of the module, None if unknown or unreadable."""
    by_label = {rail.label: rail for rail in _channels(sys)}
    for module in _MODULES:
        if all(label in by_label for label in module):
            rails = tuple(by_label[label] for label in module)
            try:
                for rail in rails:
                    rail.power_mw()
            except ProfileError:
                return None
            return Rails(rails)
    return None


def rails_missing(sys: Path) -> str:
    """Return why find_rails returns None, as a sentence."""
    labels = [rail.label for rail in _channels(sys)]
    if not labels:
        return f"INA3221: {sys / 'class/hwmon'} shows none, as it would on a Jetson."
    if any(set(module) <= set(labels) for module in _MODULES):
        return f"INA3221: its rails {', '.join(labels)} are there but cannot be read; run as root."
    return (
        f"INA3221: got the rails {', '.join(labels)}, of which it is not known which make up the "
        "whole module."
    )


def _channels(sys: Path) -> Iterator[Rail]:
    for chip in sorted((sys / "class/hwmon").glob("hwmon*")):
        if _text(chip / "name") != "ina3221":
            continue
        for number in (1, 2, 3):  # 4 to 6 are shunt voltages, 7 is their sum
            label = _text(chip / f"in{number}_label")
            if label:
                yield Rail(label, chip / f"in{number}_input", chip / f"curr{number}_input")


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # unused channel
        return ""
