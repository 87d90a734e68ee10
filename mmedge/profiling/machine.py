"""Machine facts of a profile, and noise checks."""

from __future__ import annotations

import os
import platform

from mmedge.machine.host import Host
from mmedge.machine.report import read_memory, read_processor
from mmedge.profiling.result import Latency, Machine
from mmedge.profiling.timing import harness_overhead_ns
from mmedge.runtimes.backends import BACKENDS
from mmedge.runtimes.processor import allowed_processors

__all__ = ["cpu_share", "load_average", "load_warning", "noise", "read_machine"]

_IQR_LIMIT = 0.25
_BUSY = 0.5  # load average for each allowed CPU
_PACKAGES = ("mmedge", "numpy", "pillow", "tokenizers")


def load_average() -> tuple[float, float, float] | None:
    """Return the load over 1, 5 and 15 minutes, None if the system does not report it."""
    return os.getloadavg() if hasattr(os, "getloadavg") else None


def load_warning(load: tuple[float, float, float] | None) -> str:
    """Return a warning if other work competes for the CPUs of this process, else "".

    Args:
        load: Load averages from before the measurement.
    """
    cpus = len(allowed_processors())
    if load is None or load[0] <= _BUSY * cpus:
        return ""
    return (
        f"The machine is busy: load average {load[0]:.2f} on {cpus} CPUs before the measurement. "
        "Latencies may be too high; ratios are less affected."
    )


def read_machine(
    load_before: tuple[float, float, float] | None, host: Host | None = None
) -> Machine:
    """Describe a machine.

    Args:
        load_before: The load average from before the measurement.
        host: The machine; None is this one.
    """
    host = host or Host()
    processor = read_processor(host)
    cpufreq = f"sys/devices/system/cpu/cpu{host.processors[0]}/cpufreq"
    frequency = host.text(f"{cpufreq}/scaling_cur_freq")
    versions = {package: host.package(package) for package in _PACKAGES}
    versions |= {name: host.engine_version(name) for name in BACKENDS}
    return Machine(
        cpu_model=processor.name,
        processors_online=processor.online,
        processors_allowed=host.processors,
        governor=host.text(f"{cpufreq}/scaling_governor") or None,
        frequency_mhz=int(frequency) / 1000 if frequency.isdigit() else None,
        load_average_before=load_before,
        load_average_after=load_average(),
        memory_total_bytes=read_memory(host)[0],
        platform=platform.platform(),
        versions={
            "python": host.python.version,
            **{name: found.removeprefix(f"{name} ") for name, found in versions.items() if found},
        },
        harness_overhead_ns=harness_overhead_ns(),
    )


def cpu_share(latency: Latency, threads: int) -> float:
    """Return the CPU time used, as a share of what `threads` threads could use."""
    return latency.cpu_ms / (latency.mean_ms * threads) if latency.mean_ms else 1.0


def noise(latency: Latency, *, threads: int, device: str) -> tuple[str, ...]:
    """Return the reasons to doubt a sample.

    Args:
        latency: The sample.
        threads: Threads of the run.
        device: Device of the run; CPU utilisation means nothing on a GPU.

    Returns:
        One reason each, none when the sample looks quiet.
    """
    reasons: list[str] = []
    if latency.relative_iqr > _IQR_LIMIT:
        reasons.append(
            f"high variance: interquartile range {latency.relative_iqr:.0%} of the median "
            f"(limit {_IQR_LIMIT:.0%})"
        )
    # A single computing thread is always busy; several wait for each other in serial parts.
    expected = 0.9 if threads == 1 else 0.6
    share = cpu_share(latency, threads)
    if device == "cpu" and share < expected:
        reasons.append(
            f"CPU utilisation {share:.0%} of {threads} thread{'s' * (threads > 1)} (expected "
            f"{expected:.0%}): other work ran, or the run waits"
        )
    return tuple(reasons)
