"""Cold start and memory, each in a fresh process, so that roles do not share memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedge.bundle.opening import Bundle
from mmedge.children import child_command, child_environment
from mmedge.errors import ProfileError
from mmedge.profiling.inputs import TEXT
from mmedge.profiling.memory import MemoryReading, parse_memory
from mmedge.profiling.result import ColdStart, Memory, Spread
from mmedge.runtimes.backends import BACKENDS

__all__ = ["ColdTask", "measure_cold"]

_STEADY_RUNS = 20
_TIMEOUT_SECONDS = 600


@dataclass(frozen=True, slots=True)
class ColdTask:
    """Task of a fresh process: the role to load and run.

    Attributes:
        bundle: The bundle.
        role: Role name.
        variant: Variant name.
        backend: One of BACKENDS.
        device: As in SessionOptions.
        threads: As in SessionOptions.
        frame: A JPEG file, for roles that take images.
    """

    bundle: Bundle
    role: str
    variant: str
    backend: str
    device: str
    threads: int
    frame: Path

    def to_json(self) -> str:
        """Return the task as JSON."""
        return json.dumps(
            {
                "bundle": str(self.bundle.path.absolute()),
                "role": self.role,
                "variant": self.variant,
                "backend": self.backend,
                "device": self.device,
                "threads": self.threads,
                "samples": {"image": str(self.frame), "text": TEXT},
                "steady_runs": _STEADY_RUNS,
                "registered": BACKENDS,
            }
        )


@dataclass(frozen=True, slots=True)
class _Start:
    """Report of one process; the first three times count from before its start."""

    imported_ns: int
    loaded_ns: int
    ran_ns: int
    import_ns: int
    cpu_ns: int
    before: MemoryReading
    after: MemoryReading


def measure_cold(task: ColdTask, runs: int) -> tuple[ColdStart, Memory]:
    """Start `runs` processes one after the other and take the medians.

    The bundle's files are in the page cache from the second process on, as they are on a device
    that restarts a service; what a reboot adds is the disk's business.

    Args:
        task: What to run.
        runs: Processes, at least 1.

    Raises:
        ProfileError: If a process fails; its last words are in the message.
    """
    starts = [_start(task) for _ in range(runs)]
    cold = ColdStart(
        runs=runs,
        first_embedding_ms=_spread([s.ran_ns for s in starts]),
        load_ms=_spread([s.loaded_ns - s.imported_ns for s in starts]),
        import_ms=_spread([s.import_ns for s in starts]),
        first_run_ms=_spread([s.ran_ns - s.loaded_ns for s in starts]),
        cpu_ms=_spread([s.cpu_ns for s in starts]),
    )
    anonymous = [s.after.anonymous_bytes for s in starts if s.after.anonymous_bytes is not None]
    memory = Memory(
        before_load_bytes=_median([s.before.resident_bytes for s in starts]),
        peak_bytes=_median([s.after.peak_bytes for s in starts]),
        steady_bytes=_median([s.after.resident_bytes for s in starts]),
        anonymous_bytes=_median(anonymous) if anonymous else None,
        source=starts[0].after.source,
    )
    return cold, memory


def _start(task: ColdTask) -> _Start:
    command = child_command(Path(__file__).with_name("cold_child.py"), task.to_json())
    before_ns = time.perf_counter_ns()  # the clock is shared by all processes of the machine
    try:
        child = subprocess.run(  # noqa: S603 - this interpreter, our own code, no shell
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
            env=child_environment(),
        )
    except subprocess.TimeoutExpired as error:
        raise ProfileError(
            f"Cold start of {task.role}/{task.variant}: not finished within {_TIMEOUT_SECONDS} s. "
            "Leave it out with --cold-starts 0."
        ) from error
    if child.returncode != 0:
        words = child.stderr.strip().splitlines()
        raise ProfileError(
            f"Cold start of {task.role}/{task.variant}: the process ended with exit code "
            f"{child.returncode}: {words[-1] if words else 'no output'}. "
            "Leave it out with --cold-starts 0."
        )
    reply: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return _Start(
        imported_ns=reply["imported_ns"] - before_ns,
        loaded_ns=reply["loaded_ns"] - before_ns,
        ran_ns=reply["ran_ns"] - before_ns,
        import_ns=reply["imported_ns"] - reply["started_ns"],
        cpu_ns=reply["cpu_ns"],
        before=parse_memory(reply["memory_before"]),
        after=parse_memory(reply["memory_after"]),
    )


def _spread(nanoseconds: Sequence[int]) -> Spread:
    return Spread(
        median=statistics.median(nanoseconds) / 1e6,
        low=min(nanoseconds) / 1e6,
        high=max(nanoseconds) / 1e6,
    )


def _median(values: Sequence[int]) -> int:
    return round(statistics.median(values))
