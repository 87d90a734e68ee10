"""What quantizing one node alone does to the embedding, and which nodes to leave in float.

Each node is quantized in a graph that is otherwise float, and the graph's embeddings are compared
with those of the float graph. The errors of nodes add up nearly, being small and of independent
sign, so the order of these errors is the order in which nodes are worth keeping.

The other way, all quantized but one, ranks worse: on both shapes models 16 layers kept by it leave
3 to 70 times the error on held-out data, since one layer's share drowns in what the others do.
Eight samples rank as 64 do (rank correlation 0.97 and above). The three projections that read one
value differ by up to 15 times and are measured one by one.

The data is calibration data: the search picks by these figures, so they may know nothing of the
data that it is judged on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from mmedge.converters.isolated import Worker, lent
from mmedge.converters.methods import (
    DynamicInt8,
    Float8,
    QuantizationConfig,
    StaticInt8,
    WeightOnly,
)
from mmedge.converters.passes.int8 import (
    Int8Linears,
    quantizable_inputs,
    quantizable_linears,
    quantizable_tables,
)
from mmedge.converters.passes.linears import find_linears
from mmedge.converters.probing import beside
from mmedge.converters.quantize import quantize
from mmedge.converters.statistics import Feeds, collect_ranges
from mmedge.errors import CalibrationError, QuantizationError
from mmedge.specs import Array, Float32Array

__all__ = [
    "SENSITIVITY_SAMPLES",
    "choose_kept",
    "measure_errors",
    "measure_sensitivity",
    "quantizable_nodes",
    "weight_bytes",
]

SENSITIVITY_SAMPLES = 8
"""Calibration samples that each node is measured on, unless told otherwise."""

LayerwiseConfig: TypeAlias = DynamicInt8 | StaticInt8 | WeightOnly | Float8

_Write = Callable[[Path, tuple[str, ...]], None]
"""Writes the graph to a file, quantized but for the nodes of these names."""


def quantizable_nodes(model: Path, config: QuantizationConfig) -> tuple[str, ...]:
    """Return the names of the nodes that a method quantizes, in the graph's order, each once.

    Args:
        model: ONNX file of the fp32 variant, in the layout that the method is for.
        config: The method; what its `keep` names is left out.

    Raises:
        QuantizationError: If the method does not go layer by layer.
    """
    method = _layerwise(config)
    if isinstance(method, WeightOnly):
        # What can be grouped is known to the pass alone; how it rounds makes no difference.
        with beside(model.parent) as path:
            entries = quantize(model, path, replace(method, rounding="rtn"), share=model)
        return tuple(dict.fromkeys(entry.name for entry in entries if not entry.reason))
    graph = ir.load(model).graph
    linears = [linear.name for linear in quantizable_linears(graph, method.keep)]
    tables = () if isinstance(method, Float8) else quantizable_tables(graph, method.keep)
    return tuple(dict.fromkeys([*tables, *linears]))


def weight_bytes(model: Path) -> dict[str, int]:
    """Return what each linear layer and large embedding table takes in float32, by name.

    It is in proportion to the operations of a layer too, where all layers see as many rows.
    """
    graph = ir.load(model).graph
    sizes = {
        name: int(np.prod(_shape(lookups[0].inputs[0]))) * 4
        for name, lookups in quantizable_tables(graph).items()
    }
    return sizes | {
        linear.name: linear.shape[0] * linear.shape[1] * 4 for linear in find_linears(graph)
    }


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    return () if value is None or value.shape is None else tuple(value.shape.numpy())


def measure_sensitivity(
    model: Path,
    config: QuantizationConfig,
    feeds: Feeds,
    *,
    calibration: Feeds | None = None,
    samples: int = SENSITIVITY_SAMPLES,
    worker: Worker | None = None,
) -> dict[str, float]:
    """Return 1 - mean cosine of the embedding with only one node quantized, for each node.

    See measure_errors, whose figures these are the means of.
    """
    errors = measure_errors(
        model,
        config,
        feeds,
        calibration=calibration,
        samples=samples,
        worker=worker,
    )
    return {name: float(rows.mean()) for name, rows in errors.items()}


def measure_errors(
    model: Path,
    config: QuantizationConfig,
    feeds: Feeds,
    *,
    calibration: Feeds | None = None,
    samples: int = SENSITIVITY_SAMPLES,
    alone: bool = True,
    nodes: Collection[str] | None = None,
    worker: Worker | None = None,
) -> dict[str, Float32Array]:
    """Return 1 - cosine of each sample's embedding with only one node quantized, for each node.

    Ranges are collected once; a graph with one node quantized shares its other weights with
    `model`, so each node costs one opening of the graph and one run for each sample. All run in one
    worker, as no engine has seen these graphs before.

    Args:
        model: ONNX file of the fp32 variant with one output, the embedding, in the layout that the
            method is for. A small file lies beside it while the engine reads it.
        config: The method. `equalization` is not applied: pass the equalized graph as `model`.
            What `keep` names is not measured, and is float throughout.
        feeds: Starts a stream of calibration data; its first feeds are compared, until `samples`
            rows have been taken.
        calibration: Starts the stream that ranges are chosen from; None takes `feeds`.
        samples: Rows to compare, at least 1.
        alone: Quantize only the node in question. False quantizes all others instead: what is left
            of the error when that node is put back to float.
        nodes: Names to measure; None measures all in quantizable_nodes.
        worker: None starts one.

    Returns:
        (rows,) float32 by name, in the graph's order.

    Raises:
        CalibrationError: If the stream is empty.
        QuantizationError: If the method does not go layer by layer or cannot take the graph, or an
            activation or embedding is not finite.
        BackendError: If ONNX Runtime cannot run what the method writes, or crashes on it; the node
            is named.
    """
    names = quantizable_nodes(model, config)
    subset = _take(feeds, samples)
    write = _writer(model, config, calibration or feeds)
    errors: dict[str, Float32Array] = {}
    with lent(worker) as runs:
        reference = _embed(model, subset, model.name, runs)
        for name in names if nodes is None else [name for name in names if name in nodes]:
            others = tuple(other for other in names if other != name)
            keep = (*_layerwise(config).keep, *(others if alone else (name,)))
            label = f"{model.name} with {'only' if alone else 'all but'} '{name}' quantized"
            with beside(model.parent) as path:
                write(path, keep)
                errors[name] = _errors(name, reference, _embed(path, subset, label, runs))
    return errors


def choose_kept(
    errors: Mapping[str, float],
    costs: Mapping[str, float] | None = None,
    *,
    limit: int | None = None,
) -> tuple[tuple[str, ...], ...]:
    """Return lists of nodes to leave in float, the shortest first: 1, 2, 4, 8, ... nodes.

    Each list begins with the one before it, and takes next what removes most error for its cost.
    The search tries them in turn until the budget holds.

    Args:
        errors: What quantizing a node alone does to the embedding, by name.
        costs: What leaving it in float costs, by name, in bytes or operations, above 0; None takes
            all for equal.
        limit: The longest list; None for all nodes but one. Nodes without error are in no list.

    Raises:
        QuantizationError: If an error is not finite, or a cost is missing or not above 0.
    """
    for name, error in errors.items():
        cost = 1.0 if costs is None else costs.get(name, 0.0)
        if not (np.isfinite(error) and np.isfinite(cost) and cost > 0):
            raise QuantizationError(
                f"Cannot rank '{name}': got error {error} and cost {cost}, expected finite numbers "
                "and a cost above 0. Measure the sensitivity again."
            )
    weight = dict.fromkeys(errors, 1.0) if costs is None else costs
    # A stable sort: of equals, the one nearer to the input comes first.
    ranked = sorted(
        (name for name, error in errors.items() if error > 0),
        key=lambda name: -errors[name] / weight[name],
    )
    longest = min(len(ranked), len(errors) - 1, len(errors) if limit is None else limit)
    lengths = [length for length in (1 << i for i in range(32)) if length < longest]
    return tuple(tuple(ranked[:length]) for length in (*lengths, longest) if length > 0)


def _layerwise(config: QuantizationConfig) -> LayerwiseConfig:
    if not isinstance(config, DynamicInt8 | StaticInt8 | WeightOnly | Float8):
        raise QuantizationError(
            f"Sensitivity of {type(config).__name__}: it does not go layer by layer. Pass one of "
            "DynamicInt8, StaticInt8, WeightOnly, Float8."
        )
    # One layer at a time is measured; the rest in float16 would only add to each the same error.
    return config if isinstance(config, DynamicInt8) else replace(config, rest="float32")


def _writer(model: Path, config: QuantizationConfig, calibration: Feeds) -> _Write:
    """Return what writes the graph with some nodes in float; what all of them need is done here."""
    method = _layerwise(config)
    if isinstance(method, DynamicInt8):
        return partial(_write_int8, model, lambda keep: Int8Linears("dynamic", keep=keep))
    if isinstance(method, StaticInt8) and not method.bias_correction:
        inputs = quantizable_inputs(ir.load(model), method.keep)
        symmetric = method.activations == "int8"
        ranges = (
            collect_ranges(model, inputs, calibration, method=method.ranges, symmetric=symmetric)
            if inputs
            else {}
        )
        form = method.form
        return partial(
            _write_int8,
            model,
            lambda keep: Int8Linears(form, ranges, symmetric_activations=symmetric, keep=keep),
        )

    def write(path: Path, keep: tuple[str, ...]) -> None:
        settings = replace(method, keep=keep)
        if isinstance(settings, DynamicInt8 | StaticInt8):
            settings = replace(settings, equalization=None)
        quantize(model, path, settings, calibration=calibration, share=model)

    return write


def _write_int8(
    model: Path,
    rewrite: Callable[[tuple[str, ...]], Int8Linears],
    path: Path,
    keep: tuple[str, ...],
) -> None:
    graph = ir.load(model)
    rewrite(keep)(graph)
    # Weights that stay in float are read from where they lie.
    ir.save(graph, path)


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


def _errors(name: str, reference: Array, found: Array) -> Float32Array:
    """Return 1 - cosine of each row.

    Half the squared distance of the unit vectors, which is the same and does not lose the small
    ones in a difference of numbers near 1.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (reference, found)]
    errors: Float32Array = (np.square(units[0] - units[1]).sum(axis=1) / 2).astype(np.float32)
    if not np.isfinite(errors).all():
        raise QuantizationError(
            f"The embedding is NaN, infinite or zero with only '{name}' quantized. "
            "Check the calibration data, or leave this role in float."
        )
    return errors
