"""Worker process for graphs, which turns a crash of the engine into an error.

Engines have crashed on graphs that they should have rejected. What conversion has just written is
therefore opened in a worker first. One worker serves many graphs, several at once too, as starting
a process for each layer that is measured would take longer than the measuring.

The worker reads requests from its standard input and replies on its standard output: a line of
JSON, then the numbers of the arrays that it names.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
from pydantic import TypeAdapter

from mmedge.children import child_command, child_environment
from mmedge.closing import Closing
from mmedge.errors import BackendError, MmedgeError
from mmedge.runtimes.backends import DEFAULT_BACKEND
from mmedge.runtimes.selection.interleaved import InterleavedTiming, time_interleaved
from mmedge.runtimes.selection.limits import time_limit, time_limit_error
from mmedge.specs import Array, State

if TYPE_CHECKING:
    from mmedge.runtimes.session import Session

__all__ = ["IsolatedGraph", "Worker", "lent"]

_COMMAND = child_command(Path(__file__))
_PATIENCE_S = 10.0


class Worker(Closing):
    """Inference engines on the CPU in a separate process, started on demand.

    A crash ends the graphs that were open; the next one to be opened has another process.
    """

    def __init__(self) -> None:
        self._process: _Process | None = None

    @property
    def pid(self) -> int | None:
        """Process id; None while there is no process."""
        return None if self._process is None else self._process.pid

    @contextmanager
    def open(
        self, model: Path, label: str, *, backend_name: str = DEFAULT_BACKEND, spin: bool = False
    ) -> Iterator[IsolatedGraph]:
        """Open a graph for as long as the block runs; see open_graph.

        Args:
            model: ONNX file.
            label: What the graph is called in errors ("image_encoder/fp32").
            backend_name: One of runtimes' BACKENDS.
            spin: Keep idle threads spinning, for `time`.

        Raises:
            BackendError: If the engine rejects the graph, or crashes.
        """
        if self._process is not None and self._process.dead:
            self.close()
        if self._process is None:
            self._process = _Process()
        graph = IsolatedGraph(self._process, model, label, backend_name, spin=spin)
        try:
            yield graph
        finally:
            graph.close()

    def time(
        self,
        graphs: Mapping[str, IsolatedGraph],
        feed: Mapping[str, Array],
        *,
        rounds: int,
        seconds: float,
    ) -> dict[str, InterleavedTiming]:
        """Time open graphs in the process, interleaved; see time_interleaved.

        Args:
            graphs: By name; the others are compared with the first.
            feed: What each is run on.
            rounds: Maximum rounds.
            seconds: Time to stop after.

        Raises:
            BackendError: If a graph fails, or crashes the process.
        """
        if self._process is None or not all(graph.alive for graph in graphs.values()):
            raise BackendError(f"{', '.join(graphs)} cannot be timed: their process has ended.")
        request = {
            "do": "time",
            "graphs": {name: graph.number for name, graph in graphs.items()},
            "rounds": rounds,
            "seconds": seconds,
        }
        reply, _ = self._process.ask(", ".join(graphs), request, feed)
        return {name: InterleavedTiming(**timing) for name, timing in reply.items()}

    def close(self) -> None:
        """End the process; opening a graph starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.close()


def lent(worker: Worker | None) -> AbstractContextManager[Worker]:
    """Yield the caller's worker, or a new one for the block."""
    return Worker() if worker is None else nullcontext(worker)


class IsolatedGraph:
    """A graph that is open in a worker. Made by `Worker.open`."""

    def __init__(
        self, process: _Process, model: Path, label: str, backend_name: str, *, spin: bool
    ) -> None:
        self._process = process
        self._label = f"{label}: {backend_name}"
        self.number = next(process.numbers)
        """Its name in the process."""
        self._ask("open", model=str(model), backend_name=backend_name, spin=spin)

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return not self._process.dead

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph; see Session.run.

        Raises:
            BackendError: If the engine rejects the feed, or crashes.
        """
        return self._ask("run", feed)[1]

    def run_steps(self, state: State, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run a feed in several calls that hand a state to each other; see runtimes.steps.

        Raises:
            BackendError: As for run.
        """
        given = TypeAdapter(State).dump_json(state).decode()
        return self._ask("steps", feed, state=given)[1]

    def close(self) -> None:
        """Free the engine's memory."""
        with contextlib.suppress(BackendError):  # no reply is needed any more
            self._ask("close")

    def _ask(
        self, what: str, arrays: Mapping[str, Array] | None = None, **settings: str | bool
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        request = {"do": what, "graph": self.number, **settings}
        return self._process.ask(self._label, request, arrays or {})


class _Process:
    """The parent's end of the worker."""

    def __init__(self) -> None:
        self.numbers = count()
        self.dead = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed in close()
        self._process = subprocess.Popen(  # noqa: S603, our own interpreter and module
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=child_environment(),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(
        self, label: str, request: Mapping[str, object], arrays: Mapping[str, Array]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Send a request and return the reply.

        Raises:
            BackendError: If it is an error, or the process ends; `label` says whose.
            TimeLimitError: If there is none in time; the process is ended.
        """
        if self.dead:
            raise BackendError(f"{label} cannot run: its process has ended.")
        stdin, stdout = self._pipes()
        logged = os.fstat(self._errors.fileno()).st_size
        try:
            _write(stdin, request, arrays)
            _wait(stdout, label)
            reply, outputs = _read(stdout)
        except (OSError, EOFError, ValueError) as error:
            self._end()
            raise self._failure(label, logged) from error
        except BaseException:
            # Too slow, or interrupted within a message: the stream is out of step.
            self._process.kill()
            self._end()
            raise
        if "error" in reply:
            raise BackendError(f"{label} failed: {reply['error']}")
        return reply, outputs

    def close(self) -> None:
        """End the process."""
        self._end()
        self._errors.close()

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        return cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)

    def _end(self) -> None:
        self.dead = True
        stdin, stdout = self._pipes()
        with contextlib.suppress(OSError):
            stdin.close()
        stdout.close()
        try:
            self._process.wait(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _failure(self, label: str, logged: int) -> BackendError:
        """Return the reason of a crash; earlier messages belong to other requests."""
        log = os.pread(self._errors.fileno(), 1 << 16, logged).decode(errors="replace")
        lines = log.strip().splitlines()
        reason = lines[-1] if lines else "no message"
        code = self._process.returncode
        if code < 0:
            return BackendError(f"{label} crashed ({signal.Signals(-code).name}): {reason}")
        return BackendError(f"{label} failed: {reason}")


def _wait(pipe: IO[bytes], label: str) -> None:
    """Wait for the first byte of a reply.

    Raises:
        TimeLimitError: If it does not come in time.
    """
    limit_s = time_limit()
    if not select.select([pipe], [], [], limit_s)[0]:
        raise time_limit_error(label, limit_s)


def _write(pipe: IO[bytes], message: Mapping[str, object], arrays: Mapping[str, Array]) -> None:
    about = [(name, array.dtype.str, array.shape) for name, array in arrays.items()]
    pipe.write(json.dumps([message, about]).encode() + b"\n")
    for array in arrays.values():
        pipe.write(np.ascontiguousarray(array).data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> tuple[dict[str, Any], dict[str, Array]]:
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    message, about = json.loads(line)
    return message, {
        name: _read_array(pipe, np.empty(tuple(shape), np.dtype(dtype)))
        for name, dtype, shape in about
    }


def _read_array(pipe: IO[bytes], array: Array) -> Array:
    unread = array.data.cast("B") if array.size else memoryview(b"")
    while len(unread):
        read = cast(io.BufferedIOBase, pipe).readinto(unread)
        if not read:
            raise EOFError
        unread = unread[read:]
    return array


def _serve() -> None:
    """Serve requests from stdin on stdout until stdin ends."""
    # Output of an engine must not mix with the replies.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests = cast(io.BufferedReader, sys.stdin.buffer)
    sessions: dict[int, Session] = {}
    while requests.peek(1):
        request, feed = _read(requests)
        try:
            reply, outputs = _do(request, feed, sessions)
        except MmedgeError as error:
            reply, outputs = {"error": str(error)}, {}
        _write(replies, reply, outputs)


def _do(
    request: Mapping[str, Any], feed: Mapping[str, Array], sessions: dict[int, Session]
) -> tuple[dict[str, Any], dict[str, Array]]:
    from mmedge.converters.graphs.opening import open_graph
    from mmedge.runtimes.steps import run_steps

    if request["do"] == "time":
        calls = {name: partial(sessions[at].run, feed) for name, at in request["graphs"].items()}
        limits = {"rounds": request["rounds"], "seconds": request["seconds"]}
        return {name: asdict(one) for name, one in time_interleaved(calls, **limits).items()}, {}
    number = request["graph"]
    if request["do"] == "open":
        settings = {name: request[name] for name in ("backend_name", "spin")}
        session = open_graph(Path(request["model"]), **settings)
        sessions[number] = session
        return {}, {}
    if request["do"] == "steps":
        state = TypeAdapter(State).validate_json(request["state"])
        return {}, run_steps(sessions[number], state, feed)
    if request["do"] == "run":
        return {}, sessions[number].run(feed)
    sessions[number].close()
    return {}, {}


if __name__ == "__main__":
    # Ctrl-C goes to the whole group; the parent decides when the worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve()
