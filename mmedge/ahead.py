"""Calls made in threads before their results are needed."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from mmedge.runtimes.processor import allowed_processors

__all__ = ["run_ahead", "worker_threads"]

ResultT = TypeVar("ResultT")

_MAX_THREADS = 16  # each may hold a decoded image, up to 256 MiB


def worker_threads(items: Iterable[object]) -> int:
    """Return how many threads prepare items fastest.

    Returns:
        One per CPU that this process may use, 16 at most. 0, the calling thread alone, on a
        single CPU and for a single item.
    """
    cpus = len(allowed_processors())
    count = len(items) if isinstance(items, Sized) else cpus
    threads = min(cpus, count, _MAX_THREADS)
    return threads if threads > 1 else 0


def run_ahead(
    calls: Iterable[Callable[[], ResultT]], *, threads: int, ahead: int
) -> Generator[ResultT, None, None]:
    """Make calls in threads, a bounded number ahead, and yield their results in order.

    Args:
        calls: Read in the calling thread, as far as `ahead` needs.
        threads: That make the calls; 0 makes each in the calling thread when it is needed.
        ahead: Calls that are made or waiting while the caller uses a result, 1 or more; at least
            one per thread.

    Yields:
        The result of each call. An exception of a call is raised in its place, and one of
        `calls` at once. Closing the generator drops the calls that wait and ends the threads.
    """
    if threads == 0:
        for call in calls:
            yield call()
        return
    source = iter(calls)
    pending: deque[Future[ResultT]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="mmedge-prepare")
    try:
        while True:
            for call in itertools.islice(source, max(ahead, threads) - len(pending)):
                pending.append(pool.submit(call))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
