"""Effect of changing one node of a graph on its outputs, on a few calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mmedge.converters.graphs.worker import Worker, lent
from mmedge.converters.passes.linears import COMPARE_KEY
from mmedge.converters.statistics.collect import Feeds
from mmedge.errors import CalibrationError, QuantizationError
from mmedge.files.atomic import temporary_file
from mmedge.specs import Array, Compare, Float32Array

__all__ = ["SENSITIVITY_SAMPLES", "output_errors"]

SENSITIVITY_SAMPLES = 8
"""Default calibration samples for the measurement of a node."""


def output_errors(
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
    """Return 1 - cosine of each output row with the float graph's, for each node.

    Each node costs one opening of a graph and one run for each sample. All run in one worker, as
    no engine has seen these graphs before.

    Args:
        model: ONNX file in float32; see `compared_outputs`. A small file lies beside it
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
        QuantizationError: If an output is not finite; the node is named.
        BackendError: If ONNX Runtime cannot run what was written, or crashes on it; the node is
            named.
    """
    subset = _take(feeds, samples)
    compared = compared_outputs(model)
    errors: dict[str, Float32Array] = {}
    with lent(worker) as runs:
        reference = _run(model, subset, compared, model.name, runs)
        for done, name in enumerate(names, 1):
            changed = what.format(name)
            with temporary_file(model.parent, "graph", "onnx") as path:
                write(path, name)
                found = _run(path, subset, compared, f"{model.name} with {changed}", runs)
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


def compared_outputs(model: Path) -> dict[str, Compare]:
    """Return the comparison of each compared output of a graph.

    A graph without this metadata has all of its outputs compared by rows.
    """
    outputs = ir.load(model).graph.outputs
    marks = {value.name or "": value.metadata_props.get(COMPARE_KEY, "rows") for value in outputs}
    compared = {name: Compare(mark) for name, mark in marks.items()}
    left_out = (Compare.NONE, Compare.UNORDERED)
    return {name: how for name, how in compared.items() if how not in left_out}


def _run(
    model: Path,
    feeds: Sequence[Mapping[str, Array]],
    compared: Mapping[str, Compare],
    label: str,
    worker: Worker,
) -> list[Array]:
    """Return the rows of every compared output of all feeds: (rows, D) float64 each."""
    kept: list[Array] = []
    with worker.open(model, label) as graph:
        for feed in feeds:
            outputs = graph.run(feed)
            for name, compare in compared.items():
                array = outputs[name].astype(np.float64)
                values = compare is Compare.VALUES
                kept.append(
                    array.reshape(len(array) if values else -1, -1 if values else array.shape[-1])
                )
    return kept


def _errors(changed: str, reference: Sequence[Array], found: Sequence[Array]) -> Float32Array:
    """Return 1 - cosine of each row.

    Half the squared distance of the unit vectors, which is the same and does not lose the small
    ones in a difference of numbers near 1.
    """
    parts = []
    for arrays in zip(reference, found, strict=True):
        with np.errstate(invalid="ignore", divide="ignore"):
            units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in arrays]
        parts.append(np.square(units[0] - units[1]).sum(axis=1) / 2)
    errors: Float32Array = np.concatenate(parts).astype(np.float32)
    if not np.isfinite(errors).all():
        raise QuantizationError(
            f"An output is NaN, infinite or zero with {changed}. "
            "Check the calibration data, or leave this role in float."
        )
    return errors
