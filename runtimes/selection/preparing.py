"""Preparing a graph for a backend in a separate process.

What takes minutes and much memory, such as building an engine, must neither slow down nor bring
down the process that runs models meanwhile: the worker runs at a lower priority, and a crash, or
the system's killer of processes that need too much memory, hits it alone. What it makes lies in
the cache folder, where opening the session finds it.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from mmedge.runtimes.backends import backend
from mmedge.runtimes.selection.worker import (
    Report,
    options_from_json,
    options_to_json,
    run_apart,
    serve,
)
from mmedge.runtimes.session import BuildProgress, SessionOptions

__all__ = ["prepare_apart"]

_NICENESS = 5


def prepare_apart(
    backend_name: str,
    model: Path,
    options: SessionOptions,
    *,
    progress: BuildProgress | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Run a backend's `prepare` in a separate process, and wait for it.

    Args:
        backend_name: One of BACKENDS.
        model: The ONNX file.
        options: How the graph will be run.
        progress: Called with the phase, the steps done and the steps in all.
        stop: Ends the worker, once set.

    Raises:
        BackendError: If the worker crashed or was stopped.
        MmedgeError: What `prepare` raised.
    """

    def report(message: dict[str, Any]) -> None:
        if progress is not None:
            progress(message["phase"], message["done"], message["total"])

    run_apart(
        Path(__file__),
        {"backend": backend_name, "model": str(model), "options": options_to_json(options)},
        report,
        label=lambda: f"{model}: preparing it for {backend_name}",
        stop=stop,
    )


def _work(request: dict[str, Any], report: Report) -> None:
    backend(request["backend"]).prepare(
        Path(request["model"]),
        options_from_json(request["options"]),
        lambda phase, done, total: report({"phase": phase, "done": done, "total": total}),
    )


if __name__ == "__main__":
    serve(_work, niceness=_NICENESS)
