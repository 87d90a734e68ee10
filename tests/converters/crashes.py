"""An engine that crashes on certain graphs, where conversion runs what it has just written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

__all__ = ["crash_on"]

_WORKER = """
import fnmatch, os, signal, sys
from mmedge.converters.graphs import worker as isolated
from mmedge.runtimes import backends

opened = backends.open_session

def open_session(model, **settings):
    asked = settings["backend_name"] == {backend_name!r}
    if asked and fnmatch.fnmatch(model.name, {pattern!r}):
        print("this is the end of", model.name, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    return opened(model, **settings)

backends.open_session = open_session
isolated._serve()
"""


def crash_on(
    pattern: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    backend_name: str = "onnxruntime",
) -> None:
    """Let workers die of SIGSEGV when they open a file of such a name in that backend."""
    script = folder / "crashing_worker.py"
    script.write_text(_WORKER.format(pattern=pattern, backend_name=backend_name))
    monkeypatch.setattr("mmedge.converters.graphs.worker._COMMAND", (sys.executable, script))
