"""Worker of mmedge.retrieval.bulk in a process of this machine."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmedge.children import child_command, child_environment
from mmedge.errors import BackendError
from mmedge.retrieval.bulk_pool import Batch, DiedError, Reply, reply_of

__all__ = ["ProcessWorker"]


class ProcessWorker:
    """A process that runs bulk_worker.py; see Worker.

    Args:
        task: As for FileEmbedder.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        script = Path(__file__).with_name("bulk_worker.py")
        environment = child_environment() | {"OMP_NUM_THREADS": str(task["cpus"])}
        self._bundle = task["bundle"]
        self._process = subprocess.Popen(  # noqa: S603, our own interpreter and module
            child_command(script, json.dumps(task)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._ready: dict[str, Any] = {}

    def wait_until_ready(self) -> None:
        """See Worker."""
        try:
            ready = self._line()
        except DiedError as error:
            raise BackendError(
                f"A worker {error} while it loaded {self._bundle}. Load it with mmedge.load to see "
                "why, or use fewer workers if memory is short."
            ) from None
        if "error" in ready:
            raise BackendError(f"A worker cannot load {self._bundle}: {ready['error']}")
        self._ready = ready

    def embed(self, batch: Batch) -> Reply:
        """See Worker."""
        request = {"files": [name for _, name in batch.files], "known": batch.known}
        assert self._process.stdin is not None  # noqa: S101, a pipe
        assert self._process.stdout is not None  # noqa: S101
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died() from None
        reply = self._line()
        if "error" in reply:
            raise BackendError(f"A worker with {self._bundle} failed: {reply['error']}")
        size = len(reply["kept"]) * self._ready["dim"] * 4
        data = self._process.stdout.read(size)
        if len(data) < size:
            raise self._died()
        return reply_of(batch, reply, data, self._ready)

    def kill(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not sent
                    pipe.close()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._died()
        message: dict[str, Any] = json.loads(line)
        return message

    def _died(self) -> DiedError:
        self._process.kill()
        return DiedError(f"ended with code {self._process.wait()}")
