"""What changing one node of a graph does to the embedding, on a few calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from mmedge.converters.graphs.probe import beside
from mmedge.converters.graphs.worker import Worker, lent
from mmedge.converters.statistics.collect import Feeds
from mmedge.errors import CalibrationError, QuantizationError
from mmedge.specs import Array, Float32Array

__all__ = ["SENSITIVITY_SAMPLES", "embedding_errors"]

SENSITIVITY_SAMPLES = 8
"""Calibration samples that each node is measured on, unless told otherwise."""


def embedding_errors(
    model: Path,
    names: Collection[str],
    write: Callable[[Path, str], None],
    feeds: Feeds,
    *,
    samples: int = SENSITIVITY_SAMPLES,
    what: str = "only '{}' quantized",
    worker: Worker | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> dict[str, Float32Array]:
    """Return 1 - cosine of each sample's embedding with what the float graph gives, for each node.

    Each node costs one opening of a graph and one run for each sample. All run in one worker, as
    no engine has seen these graphs before.

    Args:
        model: ONNX file in float32 with one output, the embedding. A small file lies beside it
            while the engine reads it.
        names: Nodes, each once.
        write: Writes the graph with the named node changed to a file in the folder of `model`.
        feeds: Starts a stream of calibration data; its first feeds are compared, until `samples`
            rows have been taken.
        samples: Rows to compare, at least 1.
        what: What is done to a node, for messages.
        worker: None starts one.
        advance: Called with (done, total) after each node.

    Returns:
        (rows,) float32 by name, in the order of `names`.

    Raises:
        CalibrationError: If the stream is empty.
        QuantizationError: If an embedding is not finite; the node is named.
        BackendError: If ONNX Runtime cannot run what was written, or crashes on it; the node is
            named.
    """
    subset = _take(feeds, samples)
    errors: dict[str, Float32Array] = {}
    with lent(worker) as runs:
        reference = _embed(model, subset, model.name, runs)
        for done, name in enumerate(names, 1):
            changed = what.format(name)
            with beside(model.parent) as path:
                write(path, name)
                found = _embed(path, subset, f"{model.name} with {changed}", runs)
            errors[name] = _errors(changed, reference, found)
            if advance is not None:
                advance(done, len(names))
    return errors


def _take(feeds: Feeds, samples: int) -> list[Mapping[str, Array]]:
    """Return the first feeds, until they hold `samples` rows."""
    taken: list[Mapping[str, Array]] = []
    for feed in feeds():
        if sum(map(_rows, taken)) >= samples:
            break
        taken.append(feed)
    if not taken:
        raise CalibrationError(
            "No calibration data to measure sensitivity on: got 0 samples. Pass a folder with some."
        )
    return taken


def _rows(feed: Mapping[str, Array]) -> int:
    return len(next(iter(feed.values())))


def _embed(model: Path, feeds: Sequence[Mapping[str, Array]], label: str, worker: Worker) -> Array:
    """Return the embeddings of all feeds: (rows, D) float64."""
    with worker.open(model, label) as graph:
        rows = [next(iter(graph.run(feed).values())) for feed in feeds]
    return np.concatenate(rows).astype(np.float64)


def _errors(changed: str, reference: Array, found: Array) -> Float32Array:
    """Return 1 - cosine of each row.

    Half the squared distance of the unit vectors, which is the same and does not lose the small
    ones in a difference of numbers near 1.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (reference, found)]
    errors: Float32Array = (np.square(units[0] - units[1]).sum(axis=1) / 2).astype(np.float32)
    if not np.isfinite(errors).all():
        raise QuantizationError(
            f"The embedding is NaN, infinite or zero with {changed}. "
            "Check the calibration data, or leave this role in float."
        )
    return errors
