"""Embedding a large collection of image files into an index, with worker processes.

Each worker loads the bundle once and embeds a batch at a time; this process alone writes to the
index. A batch is done when its whole reply is here: the batch of a worker that died is done again,
one file at a time if it happens again, and a file on which workers die is skipped. Files are drawn
as workers take them, so memory does not grow with their number. A file whose hash is that of the
item in the index is left alone, so that a run which was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmedge.children import child_command, child_environment
from mmedge.errors import BackendError, InputError, RetrievalError
from mmedge.models.batches import Skipped
from mmedge.retrieval.index import Index
from mmedge.runtimes.processor import allowed_processors
from mmedge.specs import Float32Array, Modality

__all__ = ["Embedded", "embed_files"]


_MOST_DEATHS = 12


@dataclass(frozen=True, slots=True)
class Embedded:
    """What a run has done so far.

    Attributes:
        written: Items added, or replaced as their file changed.
        unchanged: Files that the index held already.
        skipped: Files that cannot be embedded, by their place among those given.
    """

    written: int = 0
    unchanged: int = 0
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True, slots=True)
class _Batch:
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
class _Reply:
    batch: _Batch
    vectors: Float32Array
    kept: list[tuple[int, str]] = field(default_factory=list)
    unchanged: list[int] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)
    space: str | None = None


class _DiedError(Exception):
    """A worker ended before its reply was complete."""


def embed_files(
    index: Index,
    files: Iterable[str | os.PathLike[str]],
    *,
    workers: int | None = None,
    batch: int = 32,
    precision: str | None = None,
    on_progress: Callable[[Embedded], None] | None = None,
) -> Embedded:
    """Embed image files into an index; the id of an item is the file's path as given.

    A changed file's item gets its new vector in one transaction and keeps its time, text and
    metadata.

    Args:
        index: Made with a bundle that embeds images.
        files: Paths, as many as there are; drawn as they are needed.
        workers: Processes; None for one per two CPUs that this process may use.
        batch: Files that a worker takes at a time.
        precision: Of the variant, as for mmedge.load.
        on_progress: Called after each batch with what was done so far.

    Returns:
        What was done.

    Raises:
        InputError: If `workers` or `batch` is below 1.
        RetrievalError: If the index has no bundle.
        SpaceMismatchError: If the bundle's vectors are of another space than the index's.
        BackendError: If a worker cannot load the bundle.
        StorageError: If the disk is full or read-only.
    """
    cpus = len(allowed_processors())
    count = max(1, cpus // 2) if workers is None else workers
    if count < 1 or batch < 1:
        raise InputError(f"Bulk: got {count} workers and batches of {batch}, expected at least 1.")
    if index.bundle is None:
        raise RetrievalError(f"{index.path} has no bundle to embed with. Pass vectors to its add.")
    threads = max(1, cpus // count)
    task = {"bundle": str(index.bundle), "precision": precision, "cpus": threads}
    done = Embedded()
    pool = _Pool(task, count, _batches(index, files, batch))
    try:
        for reply in pool.replies():
            done = _take(index, reply, done)
            if on_progress is not None:
                on_progress(done)
    finally:
        pool.stop()
    return done


def _batches(index: Index, files: Iterable[str | os.PathLike[str]], size: int) -> Iterator[_Batch]:
    """Yield files with the content hashes of their items; a path that comes again is left out."""
    seen: set[str] = set()
    held: list[tuple[int, str]] = []
    for place, each in enumerate(files):
        name = os.fsdecode(each)
        if name in seen:
            continue
        seen.add(name)
        held.append((place, name))
        if len(held) == size:
            yield _batch(index, held)
            held = []
    if held:
        yield _batch(index, held)


def _batch(index: Index, files: list[tuple[int, str]]) -> _Batch:
    items = index.get([name for _, name in files], vectors=False)
    known = tuple(None if item is None else item.content_hash or "" for item in items)
    return _Batch(tuple(files), known)


def _take(index: Index, reply: _Reply, done: Embedded) -> Embedded:
    """Write a reply to the index."""
    files, known = reply.batch.files, reply.batch.known
    changed = [place for place, (number, _) in enumerate(reply.kept) if known[number] is not None]
    new = [place for place, (number, _) in enumerate(reply.kept) if known[number] is None]
    for write, places in ((index.update, changed), (index.add, new)):
        if not places:
            continue
        names = [files[reply.kept[place][0]][1] for place in places]
        write(
            ids=names,
            vectors=reply.vectors[places],
            sources=names,
            content_hashes=[reply.kept[place][1] for place in places],
            modality=Modality.IMAGE,
            space=reply.space,
        )
    skipped = tuple(Skipped(*files[number], reason) for number, reason in reply.skipped)
    return replace(
        done,
        written=done.written + len(reply.kept),
        unchanged=done.unchanged + len(reply.unchanged),
        skipped=done.skipped + skipped,
    )


class _Pool:
    """Threads that each feed one worker; their replies come through a queue of bounded length."""

    def __init__(self, task: dict[str, Any], count: int, batches: Iterator[_Batch]) -> None:
        self._task = task
        self._batches = batches
        self._again: list[_Batch] = []
        self._deaths = 0  # since the last reply
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._replies: queue.Queue[_Reply | BaseException | None] = queue.Queue(2 * count)
        self._workers: list[_Worker] = []
        self._threads = [threading.Thread(target=self._feed, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def replies(self) -> Iterator[_Reply]:
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
        worker: _Worker | None = None
        try:
            while not self._stopped.is_set() and (batch := self._next()) is not None:
                if worker is None:
                    worker = self._start()
                try:
                    self._replies.put(worker.embed(batch))
                    self._deaths = 0
                except _DiedError as error:
                    worker.kill()
                    worker = None
                    self._retry(batch, error)
        except BaseException as error:  # noqa: BLE001, raised by replies()
            self._replies.put(error)
        finally:
            if worker is not None:
                worker.kill()
            self._replies.put(None)

    def _next(self) -> _Batch | None:
        with self._lock:
            return self._again.pop() if self._again else next(self._batches, None)

    def _start(self) -> _Worker:
        worker = _Worker(self._task)
        with self._lock:
            self._workers.append(worker)
        worker.wait_until_ready()
        return worker

    def _retry(self, batch: _Batch, error: _DiedError) -> None:
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
                self._put_back(_Batch((file,), (known,), tries=1))
        else:
            reason = f"The worker that embedded it {error}, twice."
            self._replies.put(_Reply(batch, np.empty((0, 0), np.float32), skipped=[(0, reason)]))

    def _put_back(self, batch: _Batch) -> None:
        with self._lock:
            self._again.append(batch)


class _Worker:
    """A process that runs bulk_worker.py."""

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
        self._space: str | None = None
        self._dim = 0

    def wait_until_ready(self) -> None:
        """Wait until the bundle is loaded."""
        try:
            ready = self._line()
        except _DiedError as error:
            raise BackendError(
                f"A worker {error} while it loaded {self._bundle}. Load it with mmedge.load to see "
                "why, or use fewer workers if memory is short."
            ) from None
        if "error" in ready:
            raise BackendError(f"A worker cannot load {self._bundle}: {ready['error']}")
        self._space, self._dim = ready["space"], ready["dim"]

    def embed(self, batch: _Batch) -> _Reply:
        """Embed a batch's files."""
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
        size = len(reply["kept"]) * self._dim * 4
        data = self._process.stdout.read(size)
        if len(data) < size:
            raise self._died()
        vectors = np.frombuffer(data, np.float32).reshape(-1, self._dim)
        kept = [(number, digest) for number, digest in reply["kept"]]
        skipped = [(number, reason) for number, reason in reply["skipped"]]
        return _Reply(batch, vectors, kept, reply["unchanged"], skipped, self._space)

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

    def _died(self) -> _DiedError:
        self._process.kill()
        return _DiedError(f"ended with code {self._process.wait()}")
