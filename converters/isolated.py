"""Running a graph in a process of its own, so that a crash of the engine is an error like others.

ONNX Runtime has crashed on graphs that it should have refused. The worker reads feeds from its
standard input and writes outputs to its standard output: a line of JSON with dtype and shape, then
the numbers.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, cast

import numpy as np

from mmedge.errors import BackendError
from mmedge.specs import Array

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["IsolatedGraph"]


class IsolatedGraph:
    """A graph of one input and one output on ONNX Runtime's CPU, in a process of its own."""

    def __init__(self, model: Path, label: str, *, threads: int | None = None) -> None:
        """Start the worker.

        Args:
            model: ONNX file.
            label: What the graph is called in errors ("image_encoder/fp32").
            threads: Threads inside one operator; None takes the session's default.
        """
        self._label = label
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed in close()
        command = [sys.executable, "-m", __name__, str(model), str(threads or 0)]
        self._process = subprocess.Popen(  # noqa: S603, our own interpreter and module
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    def run(self, array: Array) -> Array:
        """Run the graph on one array.

        Raises:
            BackendError: If the engine refuses the graph or the feed, or crashes.
        """
        stdin, stdout = self._pipes()
        try:
            _write(stdin, array)
            return _read(stdout)
        except (OSError, EOFError, ValueError) as error:
            raise self._failure() from error

    def close(self) -> None:
        """End the worker."""
        stdin, stdout = self._pipes()
        with contextlib.suppress(OSError):
            stdin.close()
        stdout.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._process.kill()
        self.close()

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise BackendError(f"{self._label}: the worker has no pipes.")
        return stdin, stdout

    def _failure(self) -> BackendError:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else "it said nothing"
        if code < 0:
            name = signal.Signals(-code).name
            return BackendError(f"{self._label}: ONNX Runtime crashed ({name}): {reason}")
        return BackendError(f"{self._label}: ONNX Runtime failed: {reason}")


def _write(pipe: IO[bytes], array: Array) -> None:
    header = {"dtype": array.dtype.str, "shape": array.shape}
    pipe.write(json.dumps(header).encode() + b"\n")
    pipe.write(np.ascontiguousarray(array).data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> Array:
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    header = json.loads(line)
    array: Array = np.empty(tuple(header["shape"]), np.dtype(header["dtype"]))
    unread = array.data.cast("B")
    while len(unread):
        count = cast(io.BufferedIOBase, pipe).readinto(unread)
        if not count:
            raise EOFError
        unread = unread[count:]
    return array


def _serve(model: Path, threads: int) -> None:
    """Answer arrays from stdin on stdout until stdin ends."""
    from mmedge.runtimes.session import SessionOptions, open_session

    # What the engine prints must not fall among the arrays.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    feeds = cast(io.BufferedReader, sys.stdin.buffer)
    options = SessionOptions(threads=threads or None)
    with open_session(model, options=options) as session:
        name, output = session.inputs[0].name, session.outputs[0].name
        while feeds.peek(1):
            _write(answers, session.run({name: _read(feeds)})[output])


if __name__ == "__main__":
    # Ctrl-C goes to the whole group; the parent decides what becomes of the worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
