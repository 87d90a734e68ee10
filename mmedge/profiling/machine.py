"""The machine that was measured on, and whether it was quiet."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mmedge.profiling.result import Latency, Machine
from mmedge.profiling.timing import harness_overhead_ns
from mmedge.runtimes.processor import allowed_processors, processor_name

__all__ = ["cpu_share", "load_average", "noise", "read_machine"]

_IQR_LIMIT = 0.25
_PACKAGES = ("mmedge", "numpy", "onnxruntime", "openvino", "pillow", "tokenizers")


def load_average() -> tuple[float, float, float] | None:
    """Return the load over 1, 5 and 15 minutes, None where the system does not tell."""
    return os.getloadavg() if hasattr(os, "getloadavg") else None


def read_machine(load_before: tuple[float, float, float] | None) -> Machine:
    """Describe this machine.

    Args:
        load_before: The load average from before the measurement.
    """
    allowed = allowed_processors()
    cpufreq = Path(f"/sys/devices/system/cpu/cpu{allowed[0]}/cpufreq")
    frequency = _read(cpufreq / "scaling_cur_freq")
    pages = os.sysconf_names.keys() & {"SC_PHYS_PAGES", "SC_PAGE_SIZE"}
    return Machine(
        cpu_model=processor_name(),
        processors_online=os.cpu_count() or 1,
        processors_allowed=allowed,
        governor=_read(cpufreq / "scaling_governor"),
        frequency_mhz=int(frequency) / 1000 if frequency and frequency.isdigit() else None,
        load_average_before=load_before,
        load_average_after=load_average(),
        memory_total_bytes=(
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if len(pages) == 2 else None
        ),
        platform=platform.platform(),
        versions={"python": platform.python_version(), **_versions()},
        harness_overhead_ns=harness_overhead_ns(),
    )


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:  # not every kernel or container shows it
        return None


def _versions() -> dict[str, str]:
    installed = {package: _version(package) for package in _PACKAGES}
    return {package: found for package, found in installed.items() if found is not None}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_share(latency: Latency, threads: int) -> float:
    """Return which part of the CPU time that `threads` threads could use was used."""
    return latency.cpu_ms / (latency.mean_ms * threads) if latency.mean_ms else 1.0


def noise(latency: Latency, *, threads: int, device: str) -> tuple[str, ...]:
    """Tell why a sample is to be doubted.

    Args:
        latency: The sample.
        threads: Threads that were to work.
        device: Where; the CPU's share says nothing about a GPU.

    Returns:
        One reason each, none when the sample looks quiet.
    """
    reasons: list[str] = []
    if latency.relative_iqr > _IQR_LIMIT:
        reasons.append(
            f"the middle half of the runs spans {latency.relative_iqr:.0%} of the median "
            f"(limit {_IQR_LIMIT:.0%})"
        )
    # One thread that computes is busy all the time; several wait for one another in serial parts.
    expected = 0.9 if threads == 1 else 0.6
    share = cpu_share(latency, threads)
    if device == "cpu" and share < expected:
        workers = "1 thread" if threads == 1 else f"{threads} threads"
        reasons.append(
            f"{share:.0%} of the CPU time that {workers} could use was used (expected "
            f"{expected:.0%}): something else ran, or the run waits"
        )
    return tuple(reasons)
