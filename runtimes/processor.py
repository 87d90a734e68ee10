"""The processor of this machine: its name, and how much of it this process may use."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["allowed_processors", "processor_name"]


def allowed_processors() -> tuple[int, ...]:
    """Return the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name: x86 calls it 'model name', Arm boards 'Model' or 'Hardware'."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not every kernel or container shows it
        text = ""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    for name in ("model name", "Model", "Hardware"):
        if fields.get(name):
            return fields[name]
    return platform.processor() or platform.machine() or "unknown"
