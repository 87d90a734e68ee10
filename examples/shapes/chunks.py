"""Training data made in chunks, by as many processes as there are processors."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from typing import TypeVar

Made = TypeVar("Made")


def in_chunks(
    make: Callable[[tuple[int, int, int]], Made], seed: int, count: int, size: int
) -> Iterator[tuple[slice, Made]]:
    """Yield the place of each chunk among all ``count`` items, and the chunk, in order.

    Args:
        make: From (seed, first item, number of items); of a module, since processes are spawned.
        seed: Handed to it.
        count: Number of items.
        size: Items of a chunk; the last may have fewer.
    """
    jobs = [(seed, start, min(size, count - start)) for start in range(0, count, size)]
    with multiprocessing.get_context("spawn").Pool() as pool:
        for (_, start, items), made in zip(jobs, pool.imap(make, jobs), strict=True):
            yield slice(start, start + items), made
