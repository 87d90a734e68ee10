"""Threads that feed batches of files to workers, and do those of workers that died again."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from mmedge.errors import BackendError
from mmedge.specs import Float32Array

__all__ = ["Batch", "DiedError", "Pool", "Reply", "Worker", "reply_of"]

_MOST_DEATHS = 12


@dataclass(frozen=True, slots=True)
class Batch:
    """Files to embed.

    Attributes:
        files: Paths, each with its place among all.
        known: Content hashes of their items, "" for an item without one, None for no item.
        tries: How often a worker died on them.
    """

    files: tuple[tuple[int, str], ...]
    known: tuple[str | None, ...]
    tries: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """What became of a batch, whole.

    Attributes:
        batch: The batch.
        vectors: (K, D) float32 of the files that were embedded.
        kept: Number in the batch and sha256 of each of these.
        unchanged: Numbers of files whose hash was known.
        skipped: Numbers of files that cannot be used, with the reason.
        space: Fingerprint of the vectors' embedding space.
    """

    batch: Batch
    vectors: Float32Array
    kept: list[tuple[int, str]] = field(default_factory=list)
    unchanged: list[int] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)
    space: str | None = None


class DiedError(Exception):
    """A worker ended before its reply was complete."""


class Worker(Protocol):
    """What embeds batches, one at a time, with a bundle that it loads once."""

    def wait_until_ready(self) -> None:
        """Wait until the bundle is loaded.

        Raises:
            BackendError: If it cannot be.
        """

    def embed(self, batch: Batch) -> Reply:
        """Embed a batch's files.

        Raises:
            DiedError: If the worker ended before its reply was complete.
            BackendError: If its engine fails.
        """

    def kill(self) -> None:
        """End it, also while another thread waits for it."""


def reply_of(batch: Batch, reply: dict[str, Any], data: bytes, ready: dict[str, Any]) -> Reply:
    """Return what a worker's FileEmbedder made of a batch."""
    vectors = np.frombuffer(data, np.float32).reshape(-1, ready["dim"])
    kept = [(number, digest) for number, digest in reply["kept"]]
    skipped = [(number, reason) for number, reason in reply["skipped"]]
    return Reply(batch, vectors, kept, reply["unchanged"], skipped, ready["space"])


class Pool:
    """Threads that each feed one worker; their replies come through a queue of bounded length.

    Args:
        new: Starts a worker.
        count: How many there are.
        batches: Drawn as workers take them, by one thread at a time.
    """

    def __init__(self, new: Callable[[], Worker], count: int, batches: Iterator[Batch]) -> None:
        self._new = new
        self._batches = batches
        self._again: list[Batch] = []
        self._deaths = 0  # since the last reply
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._replies: queue.Queue[Reply | BaseException | None] = queue.Queue(2 * count)
        self._workers: list[Worker] = []
        self._threads = [threading.Thread(target=self._feed, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def replies(self) -> Iterator[Reply]:
        """Yield each batch's reply, in no order.

        Raises:
            BackendError: If a worker cannot load the bundle, and what drawing files raised.
        """
        left = len(self._threads)
        while left:
            reply = self._replies.get()
            if reply is None:
                left -= 1
            elif isinstance(reply, BaseException):
                raise reply
            else:
                yield reply

    def stop(self) -> None:
        """End all workers."""
        self._stopped.set()
        with self._lock:
            for worker in self._workers:
                worker.kill()
        while any(thread.is_alive() for thread in self._threads):
            with suppress(queue.Empty):
                self._replies.get(timeout=0.05)  # a thread may wait to put

    def _feed(self) -> None:
        worker: Worker | None = None
        try:
            while not self._stopped.is_set() and (batch := self._next()) is not None:
                if worker is None:
                    worker = self._start()
                try:
                    self._replies.put(worker.embed(batch))
                    self._deaths = 0
                except DiedError as error:
                    worker.kill()
                    worker = None
                    self._retry(batch, error)
        except BaseException as error:  # noqa: BLE001, raised by replies()
            self._replies.put(error)
        finally:
            if worker is not None:
                worker.kill()
            self._replies.put(None)

    def _next(self) -> Batch | None:
        with self._lock:
            return self._again.pop() if self._again else next(self._batches, None)

    def _start(self) -> Worker:
        worker = self._new()
        with self._lock:
            self._workers.append(worker)
        worker.wait_until_ready()
        return worker

    def _retry(self, batch: Batch, error: DiedError) -> None:
        if self._stopped.is_set():
            return
        self._deaths += 1
        if self._deaths > _MOST_DEATHS:
            raise BackendError(
                f"{self._deaths} workers died in a row; the last {error}. Memory may be short: use "
                "fewer workers or smaller batches."
            )
        if batch.tries == 0:
            self._put_back(replace(batch, tries=1))
        elif len(batch.files) > 1:
            for file, known in zip(batch.files, batch.known, strict=True):
                self._put_back(Batch((file,), (known,), tries=1))
        else:
            reason = f"The worker that embedded it {error}, twice."
            self._replies.put(Reply(batch, np.empty((0, 0), np.float32), skipped=[(0, reason)]))

    def _put_back(self, batch: Batch) -> None:
        with self._lock:
            self._again.append(batch)
