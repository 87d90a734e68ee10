"""Resident memory of a process, from the kernel."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from mmedge.errors import ProfileError

__all__ = ["MemoryReading", "parse_memory"]


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """Resident memory at one moment.

    Attributes:
        resident_bytes: Now.
        peak_bytes: Highest since the process started.
        anonymous_bytes: Of resident, not backed by a file; None if not reported.
        source: Where the figures were read.
    """

    resident_bytes: int
    peak_bytes: int
    anonymous_bytes: int | None
    source: str


def parse_memory(text: str) -> MemoryReading:
    """Parse the memory report of a process.

    /proc/self/status comes first: Linux lets ru_maxrss of a fresh process begin at the resident
    set of the process that started it, while VmHWM begins at zero. ru_maxrss serves where there is
    no /proc; the present resident set is then unknown and the peak stands for it.

    Args:
        text: A /proc/PID/status, or "ru_maxrss: N" in the system's own unit.

    Raises:
        ProfileError: If it is neither.
    """
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    try:
        if "ru_maxrss" in fields:
            unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
            peak = int(fields["ru_maxrss"]) * unit
            return MemoryReading(peak, peak, None, "getrusage (peak only)")
        return MemoryReading(
            _kib(fields["VmRSS"]),
            _kib(fields["VmHWM"]),
            _kib(fields["RssAnon"]) if "RssAnon" in fields else None,
            "/proc/self/status",
        )
    except (KeyError, ValueError) as error:
        raise ProfileError(
            f"Memory of a process: got no VmRSS and VmHWM in {text[:200]!r}. "
            "Leave it out with --cold-starts 0."
        ) from error


def _kib(value: str) -> int:
    amount, unit = value.split()
    if unit != "kB":
        raise ValueError(unit)
    return int(amount) * 1024
