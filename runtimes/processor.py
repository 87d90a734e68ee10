"""CPU of this machine: name, allowed processors, int8 saturation."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

__all__ = ["allowed_processors", "int8_saturates", "processor_name"]


def allowed_processors() -> tuple[int, ...]:
    """Return the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def int8_saturates(machine: str | None = None, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this processor adds pairs of int8 products in 16 bits, which saturates.

    x86 does without VNNI; where nothing shows whether it has VNNI, it is taken not to.

    Args:
        machine: Architecture as `uname -m` prints it; None for this machine's.
        cpuinfo: Describes the processor.
    """
    if (machine or platform.machine()).lower() not in {"x86_64", "amd64"}:
        return False
    try:
        flags = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    return re.search(r"^flags\b.*\bavx(512)?_vnni\b", flags, re.MULTILINE) is None


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name: x86 calls it 'model name', Arm boards 'Model' or 'Hardware'."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:  # missing in some kernels and containers
        text = ""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    for name in ("model name", "Model", "Hardware"):
        if fields.get(name):
            return fields[name]
    return platform.processor() or platform.machine() or "unknown"
