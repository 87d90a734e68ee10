"""Embedding a large collection of image files into an index, with worker processes.

Each worker loads the bundle once and embeds a batch at a time, on this machine or on the nodes of a
Ray cluster; this process alone writes to the index. A batch is done when its whole reply is here:
the batch of a worker that died is done again, one file at a time if it happens again, and a file on
which workers die is skipped. Files are drawn as workers take them; only their names are kept. A
file whose hash is that of the item in the index is left alone, so that a run which was interrupted
goes on where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from mmedge.errors import InputError, RetrievalError
from mmedge.models.batches import Skipped
from mmedge.retrieval.bulk_cluster import Cluster, ClusterWorker
from mmedge.retrieval.bulk_pool import Batch, Pool, Reply, Worker
from mmedge.retrieval.bulk_process import ProcessWorker
from mmedge.retrieval.index import Index
from mmedge.runtimes.processor import allowed_processors
from mmedge.specs import Modality

__all__ = ["Embedded", "embed_files"]


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


def embed_files(
    index: Index,
    files: Iterable[str | os.PathLike[str]],
    *,
    workers: int | None = None,
    batch: int = 32,
    precision: str | None = None,
    cluster: str | None = None,
    on_progress: Callable[[Embedded], None] | None = None,
) -> Embedded:
    """Embed image files into an index; the id of an item is the file's path as given.

    A changed file's item gets its new vector in one transaction and keeps its time, text and
    metadata.

    Args:
        index: Made with a bundle that embeds images.
        files: Paths, as many as there are; drawn as they are needed.
        workers: Processes; None for one per two CPUs that this process may use, or one per CPU of
            the cluster.
        batch: Files that a worker takes at a time.
        precision: Of the variant, as for mmedge.load.
        cluster: HOST:PORT of a Ray cluster's head, or "auto" for the one that Ray finds; None for
            this machine alone. Needs the extra [ray]. The bundle and the files must have the same
            paths on every node, and mmedge be installed there.
        on_progress: Called after each batch with what was done so far.

    Returns:
        What was done.

    Raises:
        InputError: If `workers` or `batch` is below 1.
        RetrievalError: If the index has no bundle, or there is no such cluster.
        SpaceMismatchError: If the bundle's vectors are of another space than the index's.
        BackendError: If a worker cannot load the bundle.
        StorageError: If the disk is full or read-only.
    """
    if (workers is not None and workers < 1) or batch < 1:
        raise InputError(
            f"Bulk: got {workers} workers and batches of {batch}, expected at least 1."
        )
    if index.bundle is None:
        raise RetrievalError(f"{index.path} has no bundle to embed with. Pass vectors to its add.")
    task = {"bundle": str(index.bundle), "precision": precision}
    with ExitStack() as stack:
        new: Callable[[], Worker]
        if cluster is None:
            cpus = len(allowed_processors())
            count = workers or max(1, cpus // 2)
            new = partial(ProcessWorker, task | {"cpus": max(1, cpus // count)})
        else:
            nodes = stack.enter_context(Cluster(cluster))
            count = workers or max(1, nodes.cpus)
            new = partial(ClusterWorker, nodes, task | {"cpus": 1})
        pool = Pool(new, count, _batches(index, files, batch))
        stack.callback(pool.stop)
        done = Embedded()
        for reply in pool.replies():
            done = _take(index, reply, done)
            if on_progress is not None:
                on_progress(done)
        return done


def _batches(index: Index, files: Iterable[str | os.PathLike[str]], size: int) -> Iterator[Batch]:
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


def _batch(index: Index, files: list[tuple[int, str]]) -> Batch:
    items = index.get([name for _, name in files], vectors=False)
    known = tuple(None if item is None else item.content_hash or "" for item in items)
    return Batch(tuple(files), known)


def _take(index: Index, reply: Reply, done: Embedded) -> Embedded:
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
