"""Preparing in a process of its own: progress and errors come through, a crash is only an error."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmedge.errors import BackendError, BackendUnavailableError, EngineBuildError, StorageError
from mmedge.runtimes.backends import BACKENDS
from mmedge.runtimes.selection import worker
from mmedge.runtimes.selection.preparing import prepare_apart
from mmedge.runtimes.session import SessionOptions
from mmedge.specs import Axis

# A backend registered at run time; the worker imports it through PYTHONPATH.
_BACKEND = '''
"""Behaves as its model is named."""
import os, signal, sys, time
from mmedge.errors import EngineBuildError
from mmedge.runtimes.backends import Backend


class Slow(Backend):
    name = title = "slow"
    engine_version = available_devices = open_session = None

    def prepare(self, model, options, progress=None):
        kind = model.stem
        print("chatter of an engine")
        if kind == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "bug":
            raise ZeroDivisionError("a mistake of ours")
        if kind == "refused":
            raise EngineBuildError("node 'n' (op Foo) is not taken")
        if kind == "forever":
            model.with_suffix(".pid").write_text(str(os.getpid()))
            time.sleep(600)
        progress("parse", 1, 1)
        progress(f"build for {options.device} {options.axes}", 3, 7)
        model.with_suffix(".made").write_text(str(os.nice(0)))


BACKEND = Slow()
'''


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "slow_backend.py").write_text(_BACKEND)
    monkeypatch.setitem(BACKENDS, "slow", "slow_backend:BACKEND")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "model.onnx"


def test_progress_is_passed_on_and_results_stay(model: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    options = SessionOptions(device="cuda:1", axes={"batch": Axis(1, 2, 8)})

    prepare_apart("slow", model, options, progress=lambda *step: seen.append(step))

    assert seen == [("parse", 1, 1), (f"build for cuda:1 {options.axes}", 3, 7)]
    assert int(model.with_suffix(".made").read_text()) > os.nice(0)  # at a lower priority


def test_an_error_keeps_its_kind_and_its_words(model: Path) -> None:
    with pytest.raises(EngineBuildError, match=r"node 'n' \(op Foo\) is not taken"):
        prepare_apart("slow", model.with_stem("refused"), SessionOptions())
    with pytest.raises(BackendUnavailableError, match="Unknown backend: got 'abacus'"):
        prepare_apart("abacus", model, SessionOptions())


@pytest.mark.parametrize(
    ("kind", "message"),
    [("crash", "SIGSEGV"), ("killed", "SIGKILL, perhaps out of memory"), ("bug", "a mistake")],
)
def test_a_worker_that_dies_is_only_an_error(kind: str, message: str, model: Path) -> None:
    with pytest.raises(BackendError, match=message) as caught:
        prepare_apart("slow", model.with_stem(kind), SessionOptions())
    assert f"{kind}.onnx" in str(caught.value)


def test_stopping_ends_the_worker(model: Path) -> None:
    stop = threading.Event()
    written = model.with_name("forever.pid")

    def stop_when_started() -> None:
        while not written.is_file() or not written.read_text():
            time.sleep(0.02)
        stop.set()

    thread = threading.Thread(target=stop_when_started)
    thread.start()
    with pytest.raises(BackendError, match="was stopped"):
        prepare_apart("slow", model.with_stem("forever"), SessionOptions(), stop=stop)
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(written.read_text()), 0)


def test_a_worker_ends_with_its_parent(model: Path) -> None:
    code = (
        "from mmedge.runtimes.backends import BACKENDS; BACKENDS['slow'] = 'slow_backend:BACKEND'\n"
        "import pathlib, sys; from mmedge.runtimes.selection.preparing import prepare_apart\n"
        "from mmedge.runtimes.session import SessionOptions\n"
        "prepare_apart('slow', pathlib.Path(sys.argv[1]), SessionOptions())"
    )
    asking = subprocess.Popen([sys.executable, "-c", code, str(model.with_stem("forever"))])
    written = model.with_name("forever.pid")
    while not written.is_file() or not written.read_text():
        time.sleep(0.02)
    asking.kill()
    asking.wait()
    worker = Path(f"/proc/{written.read_text()}")
    while worker.exists() and "Z" not in (worker / "stat").read_text().split():
        time.sleep(0.02)  # pytest-timeout ends this if the worker lives on


def test_a_backend_with_nothing_to_prepare(tmp_path: Path) -> None:
    prepare_apart("fake", tmp_path / "m.onnx", SessionOptions())
    assert list(tmp_path.iterdir()) == []


def test_unknown_kinds_of_errors_become_backend_errors() -> None:
    assert type(worker._error("Exit", "m")) is BackendError
    assert type(worker._error("StorageError", "m")) is StorageError
