"""Preparing a graph for a backend in a process of its own.

What takes minutes and much memory, such as building an engine, must neither slow down nor bring
down the process that answers meanwhile: the worker runs at a lower priority, and a crash, or the
system's killer of processes that need too much memory, hits it alone. What it makes lies in the
cache folder, where opening the session finds it.

The worker reads a line of JSON from its standard input and writes lines of JSON to its standard
output: progress, and an error at the end if there was one. Its standard input stays open as long as
the one that asked lives; when that ends, however it ends, so does the worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter

from mmedge import errors
from mmedge.children import child_command, child_environment
from mmedge.errors import BackendError, MmedgeError
from mmedge.runtimes.session import BuildProgress, SessionOptions, backend

__all__ = ["prepare_apart"]

_NICENESS = 5
_POLL_S = 0.2


def prepare_apart(
    backend_name: str,
    model: Path,
    options: SessionOptions,
    *,
    progress: BuildProgress | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Run a backend's `prepare` in a process of its own, and wait for it.

    Args:
        backend_name: One of BACKENDS.
        model: The ONNX file.
        options: How the graph will be run.
        progress: Told how far it is.
        stop: Ends the worker, once set.

    Raises:
        BackendError: If the worker crashed or was stopped.
        MmedgeError: What `prepare` raised.
    """
    settings = TypeAdapter(SessionOptions).dump_python(options, mode="json")
    request = {"backend": backend_name, "model": str(model), "options": settings}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(  # noqa: S603, our own interpreter and module
            child_command(Path(__file__)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=child_environment(),
        )
        try:
            told = _follow(process, request, progress, stop)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        label = f"{model}: preparing it for {backend_name}"
        if told is not None:
            raise _raised(told)
        if stop is not None and stop.is_set():
            raise BackendError(f"{label} was stopped.")
        if process.returncode != 0:
            raise BackendError(f"{label} failed: {_last_words(process.returncode, said)}")


def _follow(
    process: subprocess.Popen[bytes],
    request: dict[str, Any],
    progress: BuildProgress | None,
    stop: threading.Event | None,
) -> dict[str, str] | None:
    """Pass progress on until the worker is done; return the error that it told, if any."""
    if process.stdin is None or process.stdout is None:
        raise BackendError("The worker has no pipes.")
    with contextlib.suppress(BrokenPipeError):  # a worker that died says so by its exit code
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    for line in _lines(process.stdout, stop):
        message = json.loads(line)
        if "error" in message:
            return {"error": str(message["error"]), "message": str(message["message"])}
        if progress is not None:
            progress(message["phase"], message["done"], message["total"])
    if stop is None or not stop.is_set():
        process.wait()
    return None


def _lines(pipe: IO[bytes], stop: threading.Event | None) -> Iterator[bytes]:
    """Yield whole lines until the pipe ends or `stop` is set."""
    unread = b""
    while stop is None or not stop.is_set():
        if not select.select([pipe], [], [], _POLL_S)[0]:
            continue
        part = os.read(pipe.fileno(), 1 << 16)
        if not part:
            return
        *lines, unread = (unread + part).split(b"\n")
        yield from lines


def _raised(told: dict[str, str]) -> MmedgeError:
    """Return the worker's error as one of the same kind."""
    kind = getattr(errors, told["error"], BackendError)
    known = isinstance(kind, type) and issubclass(kind, MmedgeError)
    return kind(told["message"]) if known else BackendError(told["message"])


def _last_words(code: int, said: IO[bytes]) -> str:
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    reason = lines[-1] if lines else "it said nothing"
    if code < 0:
        hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        return f"the worker ended by {signal.Signals(-code).name}{hint}: {reason}"
    return reason


def _work() -> None:
    """Prepare what standard input asks for."""
    # What the engine prints must not fall among the messages.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def tell(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    options = TypeAdapter(SessionOptions).validate_python(request["options"])
    try:
        backend(request["backend"]).prepare(
            Path(request["model"]),
            options,
            lambda phase, done, total: tell({"phase": phase, "done": done, "total": total}),
        )
    except MmedgeError as error:
        tell({"error": type(error).__name__, "message": str(error)})


def _end_with_parent() -> None:
    sys.stdin.read()  # returns when the other end of the pipe is closed
    os._exit(1)


if __name__ == "__main__":
    # Ctrl-C goes to the whole group; the parent decides what becomes of the worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _work()
