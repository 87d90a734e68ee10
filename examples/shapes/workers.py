"""Training in several processes of one thread, which average their gradients at every step.

Threads inside one process would meet at every operator, and on a busy machine wait there.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import Parameter


def run_workers(
    work: Callable[..., None],
    options: argparse.Namespace,
    *more: Any,  # noqa: ANN401, whatever work takes
) -> None:
    """Call ``work(rank, options, *more)`` in ``options.workers`` processes, and wait for all.

    Raises:
        SystemExit: If one failed.
    """
    context = torch.multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=work, args=(rank, options, *more), daemon=True)
        for rank in range(options.workers)
    ]
    with tempfile.TemporaryDirectory() as meeting:
        options.meeting = f"file://{meeting}/workers"
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("A worker failed; see its error above.")


def join_workers(rank: int, options: argparse.Namespace) -> None:
    """Seed torch, take one thread, and meet the other processes of ``run_workers``."""
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    torch.distributed.init_process_group(
        "gloo", options.meeting, rank=rank, world_size=options.workers
    )


def average_gradients(parameters: Sequence[Parameter]) -> None:
    """Replace the gradients by their mean over all workers."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    parts = torch.split(flat, [grad.numel() for grad in grads])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))
