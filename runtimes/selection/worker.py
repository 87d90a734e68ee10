"""Worker process for one request that may take long, crash or never end.

The parent writes the request as a line of JSON to the worker's standard input and reads lines of
JSON from its standard output: reports, warnings, and an error at the end if there was one. The
input stays open as long as the parent lives; when that ends, however it ends, so does the worker.
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
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias

from pydantic import TypeAdapter

from mmedge import errors
from mmedge.children import child_command, child_environment
from mmedge.errors import BackendError, MmedgeError
from mmedge.runtimes.backends import BACKENDS
from mmedge.runtimes.selection.limits import time_limit_error
from mmedge.runtimes.session import SessionOptions

__all__ = ["Report", "options_from_json", "options_to_json", "run_apart", "serve"]

Report: TypeAlias = Callable[[dict[str, Any]], None]
"""Receives one message of a worker."""

_POLL_S = 0.2


def options_to_json(options: SessionOptions) -> Any:  # noqa: ANN401, JSON
    """Return session options as part of a worker's request."""
    return TypeAdapter(SessionOptions).dump_python(options, mode="json")


def options_from_json(value: object) -> SessionOptions:
    """Return the session options of a worker's request."""
    return TypeAdapter(SessionOptions).validate_python(value)


def run_apart(
    script: Path,
    request: dict[str, Any],
    report: Report,
    *,
    label: Callable[[], str],
    stop: threading.Event | None = None,
    limit_s: float | None = None,
) -> None:
    """Run a request in a worker, and wait for it.

    Args:
        script: A module whose `__main__` calls serve.
        request: What is asked, as JSON.
        report: Called with each message of the worker.
        label: What the worker was doing, to begin the message of an error.
        stop: Ends the worker, once set.
        limit_s: Seconds without a message after which the worker is ended; None for no limit.

    Raises:
        TimeLimitError: If the limit has passed.
        BackendError: If the worker crashed or was stopped.
        MmedgeError: What the request raised.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # noqa: S603, our own interpreter and module
            child_command(script),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=child_environment(),
        )
        try:
            raised = _follow(process, request, report, stop, limit_s)
        except TimeoutError as error:
            raise time_limit_error(label(), limit_s) from error
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        if raised is not None:
            raise raised
        if stop is not None and stop.is_set():
            raise BackendError(f"{label()} was stopped.")
        if process.returncode != 0:
            raise BackendError(f"{label()} failed: {_last_words(process.returncode, log)}")


def serve(work: Callable[[dict[str, Any], Report], None], *, niceness: int = 0) -> None:
    """Worker main: read the request from standard input and run it.

    Args:
        work: Takes the request, and what sends a message to the parent.
        niceness: Added to this process's.
    """
    # Ctrl-C goes to the whole group; the parent decides whether to stop the worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Engine output must not mix with the messages.
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.suppress(OSError):
        os.nice(niceness)
    request = json.loads(sys.stdin.readline())
    BACKENDS.update(request.pop("registered", {}))
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def report(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", RuntimeWarning)
        try:
            work(request, report)
        except MmedgeError as error:
            report({"error": type(error).__name__, "message": str(error)})
    for warning in caught:
        report({"warning": str(warning.message)})


def _follow(
    process: subprocess.Popen[bytes],
    request: dict[str, Any],
    report: Report,
    stop: threading.Event | None,
    limit_s: float | None,
) -> MmedgeError | None:
    """Forward messages until the worker is done; return its error, if any."""
    if process.stdin is None or process.stdout is None:
        raise BackendError("The worker has no pipes.")
    with contextlib.suppress(BrokenPipeError):  # a dead worker is reported by its exit code
        # Backends registered at run time are imported by name there.
        message = json.dumps(request | {"registered": BACKENDS})
        process.stdin.write(message.encode() + b"\n")
        process.stdin.flush()
    raised = None
    for line in _lines(process.stdout, stop, limit_s):
        message = json.loads(line)
        if "warning" in message:
            warnings.warn(message["warning"], RuntimeWarning, stacklevel=4)
        elif "error" in message:
            raised = _error(str(message["error"]), str(message["message"]))
        else:
            report(message)
    if stop is None or not stop.is_set():
        process.wait()
    return raised


def _lines(pipe: IO[bytes], stop: threading.Event | None, limit_s: float | None) -> Iterator[bytes]:
    """Yield complete lines until the pipe ends or `stop` is set.

    Raises:
        TimeoutError: If none comes for so long.
    """
    unread = b""
    latest_s = time.monotonic()
    while stop is None or not stop.is_set():
        if not select.select([pipe], [], [], _POLL_S)[0]:
            if limit_s is not None and time.monotonic() - latest_s > limit_s:
                raise TimeoutError
            continue
        part = os.read(pipe.fileno(), 1 << 16)
        if not part:
            return
        *lines, unread = (unread + part).split(b"\n")
        yield from lines
        latest_s = time.monotonic()


def _error(name: str, message: str) -> MmedgeError:
    """Return the worker's error, of the same class."""
    kind = getattr(errors, name, BackendError)
    known = isinstance(kind, type) and issubclass(kind, MmedgeError)
    return kind(message) if known else BackendError(message)


def _last_words(code: int, log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    reason = lines[-1] if lines else "without a message"
    if code < 0:
        hint = ", perhaps out of memory" if -code == signal.SIGKILL else ""
        return f"the worker ended by {signal.Signals(-code).name}{hint}: {reason}"
    return reason


def _end_with_parent() -> None:
    sys.stdin.read()  # returns when the pipe's other end is closed
    os._exit(1)
