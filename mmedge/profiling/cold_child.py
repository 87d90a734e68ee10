"""Cold start process: load a role, run once, then run steadily.

Started by mmedge.profiling.cold as a script, so that nothing of the profiler itself is imported
here: what is measured is what a user's own process costs. It prints one JSON object.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__: list[str] = []


def _memory() -> str:
    status = Path("/proc/self/status")
    if status.exists():
        return status.read_text()
    return f"ru_maxrss: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}"


def _load(task: dict[str, Any]) -> Callable[[], object]:
    """Load the role and return its end-to-end call, else a run on its golden inputs."""
    from mmedge.models.load import load
    from mmedge.runtimes.backends import BACKENDS
    from mmedge.runtimes.session import SessionOptions
    from mmedge.specs import first_sample

    BACKENDS.update(task["registered"])
    role = task["role"]
    model = load(
        task["bundle"],
        precision=task["variant"],
        backend=task["backend"],
        roles=[role],
        options=SessionOptions(device=task["device"], threads=task["threads"]),
    )
    modality = model.manifest.modality(role)
    sample = task["samples"].get(None if modality is None else modality.value)
    call = None if sample is None else model.call(role, sample)
    if call is not None:
        return call
    session, golden = model.sessions[role], model.bundle.golden().inputs[role]
    feed = first_sample([entry.spec() for entry in model.bundle.role(role).inputs], golden)
    return lambda: session.run(feed)


def _main() -> None:
    task = json.loads(sys.argv[1])
    started_ns = time.perf_counter_ns()
    # The cost of importing mmedge, before the bundle is opened.
    import mmedge.models.load  # noqa: F401

    imported_ns = time.perf_counter_ns()
    memory_before = _memory()
    answer = _load(task)
    loaded_ns = time.perf_counter_ns()
    answer()
    ran_ns = time.perf_counter_ns()
    cpu_ns = time.process_time_ns()  # since process start, including the interpreter's
    for _ in range(task["steady_runs"]):
        answer()
    figures = {
        "started_ns": started_ns,
        "imported_ns": imported_ns,
        "loaded_ns": loaded_ns,
        "ran_ns": ran_ns,
        "cpu_ns": cpu_ns,
        "memory_before": memory_before,
        "memory_after": _memory(),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    _main()
