"""Feeds of a role: its inputs, made batch by batch from samples, arrays, state and other roles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mmedge.ahead import run_ahead, worker_threads
from mmedge.bundle.tensors import CallerFeed, ProcessorFeed, RoleFeed, StateFeed
from mmedge.converters.data.datasets import Dataset
from mmedge.errors import CalibrationError, InputError
from mmedge.preprocess.registry import Processor
from mmedge.specs import Array, Modality

if TYPE_CHECKING:
    from mmedge.converters.families.base import RoleSpec

__all__ = ["Samples", "initial_state", "missing_data", "role_feeds"]

_BATCH = 8


@dataclass(frozen=True)
class Samples:
    """Sources of a role's inputs.

    Attributes:
        items: Items by processor, N for each processor that a role reads.
        arrays: Arrays by input given by callers, (N, ...).
        outputs: Outputs of other roles, (N, ...), by role and name.
    """

    items: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)
    outputs: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Dataset, processors: Mapping[str, Processor]) -> Samples:
        """Return the samples of a dataset, for the processors of a model."""
        items = {name: data.items(one.modality) for name, one in processors.items()}
        return cls(items, data.arrays)

    def count(self, spec: RoleSpec) -> int:
        """Return the number of samples of a role."""
        columns: list[Sequence[Any] | Array] = []
        for name, feed in spec.feeds.items():
            if isinstance(feed, ProcessorFeed):
                columns.append(self.items.get(feed.processor, ()))
            elif isinstance(feed, CallerFeed):
                columns.append(self.arrays.get(name, ()))
            elif isinstance(feed, RoleFeed):
                columns.append(self.outputs.get(feed.role, {}).get(feed.output, ()))
        return min(map(len, columns), default=0)


def missing_data(spec: RoleSpec, samples: Samples) -> str | None:
    """Return the input that the samples lack, None where they have all."""
    for name, feed in spec.feeds.items():
        if isinstance(feed, ProcessorFeed) and not samples.items.get(feed.processor):
            return {"text": "captions"}.get(feed.processor, f"{feed.processor} samples")
        if isinstance(feed, CallerFeed) and name not in samples.arrays:
            return f"an array '{name}'"
        if isinstance(feed, RoleFeed) and feed.role not in samples.outputs:
            return f"an output '{feed.output}' of {feed.role}"
    return None


def role_feeds(
    spec: RoleSpec,
    processors: Mapping[str, Processor],
    samples: Samples,
    batch: int = _BATCH,
) -> Iterator[dict[str, Array]]:
    """Yield feeds of a role, in memory that does not grow with the number of samples.

    Images and sounds are decoded in threads, ahead of the caller.

    Args:
        spec: The role.
        processors: Open processors by name.
        samples: What the inputs are made from.
        batch: Samples in a feed; a graph of a fixed batch takes its own.

    Raises:
        CalibrationError: If a sample cannot be used.
    """
    fixed = [item.shape[0] for item in spec.inputs if item.shape and isinstance(item.shape[0], int)]
    size = int(fixed[0]) if fixed else batch
    count = samples.count(spec)
    starts = range(0, count - (size - 1 if fixed else 0), size)
    calls = (
        partial(_feed, spec, processors, samples, slice(start, min(start + size, count)))
        for start in starts
    )
    decoded = any(processors[name].modality is not Modality.TEXT for name in spec.processors)
    threads = worker_threads(starts) if decoded else 0
    with closing(run_ahead(calls, threads=threads, ahead=1)) as feeds:
        yield from feeds


def _feed(
    spec: RoleSpec, processors: Mapping[str, Processor], samples: Samples, rows: slice
) -> dict[str, Array]:
    made: dict[str, Array] = {}
    try:
        for name in spec.processors:
            made |= processors[name](list(samples.items[name][rows]))
    except InputError as error:
        raise CalibrationError(f"Samples {rows.start + 1} to {rows.stop}: {error}") from error
    for item in spec.inputs:
        feed = spec.feeds[item.name]
        if isinstance(feed, CallerFeed):
            array = samples.arrays[item.name]
            one = array.ndim > len(item.shape)  # a graph without an axis for samples
            made[item.name] = np.asarray(array[rows.start] if one else array[rows], item.dtype)
        elif isinstance(feed, RoleFeed):
            made[item.name] = samples.outputs[feed.role][feed.output][rows]
    made |= initial_state(spec, rows.stop - rows.start)
    return {item.name: made[item.name] for item in spec.inputs}


def initial_state(spec: RoleSpec, batch: int) -> dict[str, Array]:
    """Return the initial state: empty or zeros.

    Args:
        spec: The role.
        batch: Size of every dynamic axis but the growing one.
    """
    length = None if spec.state is None else spec.state.length
    return {
        item.name: np.zeros(
            [n if isinstance(n, int) else 0 if n == length else batch for n in item.shape],
            item.dtype,
        )
        for item in spec.inputs
        if isinstance(spec.feeds[item.name], StateFeed)
    }
