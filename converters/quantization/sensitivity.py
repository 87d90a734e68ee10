"""Sensitivity of the embedding to quantizing single nodes, and the nodes to exclude.

Each node is quantized in a graph that is otherwise float, and the graph's embeddings are compared
with those of the float graph. The errors of nodes add up nearly, being small and of independent
sign, so nodes are excluded in the order of these errors.

The other way, all quantized but one, ranks worse: on both shapes models, excluding 16 layers by it
gives 3 to 70 times the held-out error, because one layer's effect is hidden by the others.
Eight samples rank as 64 do (rank correlation 0.97 and above). The three projections that read one
value differ by up to 15 times and are measured one by one.

The data is calibration data: the search picks by these figures, so they may know nothing of the
data that it is judged on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from mmedge.converters.graphs.worker import Worker
from mmedge.converters.methods.configs import (
    DynamicInt8,
    Float8,
    QuantizationConfig,
    StaticInt8,
    WeightOnly,
)
from mmedge.converters.passes.convolutions import find_convolutions
from mmedge.converters.passes.int8 import (
    Int8Linears,
    quantizable_linears,
    quantizable_tables,
)
from mmedge.converters.passes.int8_convolutions import quantizable_convolutions
from mmedge.converters.passes.linears import WeightedNode, find_linears
from mmedge.converters.passes.weight_only import moment_inputs
from mmedge.converters.quantization.output_errors import SENSITIVITY_SAMPLES, output_errors
from mmedge.converters.quantization.quantize import quantize
from mmedge.converters.quantization.size_target import weight_only_pass
from mmedge.converters.quantization.static_int8 import quantized_values, to_static_int8
from mmedge.converters.statistics.collect import Feeds, collect_moments, collect_ranges
from mmedge.errors import QuantizationError
from mmedge.specs import Float32Array

__all__ = [
    "choose_excluded",
    "measure_errors",
    "measure_sensitivity",
    "quantizable_nodes",
    "weight_bytes",
]

LayerwiseConfig: TypeAlias = DynamicInt8 | StaticInt8 | WeightOnly | Float8

_Write = Callable[[Path, tuple[str, ...]], None]
"""Writes the graph to a file, quantized except for the nodes of these names."""


def quantizable_nodes(model: Path, config: QuantizationConfig) -> tuple[str, ...]:
    """Return the names of the nodes that a method quantizes, in the graph's order, each once.

    Args:
        model: ONNX file of the fp32 variant, in the layout that the method is for.
        config: The method; nodes in its `keep` are excluded.

    Raises:
        QuantizationError: If the method does not go layer by layer.
    """
    method = _layerwise(config)
    if isinstance(method, WeightOnly):
        # Only the pass knows the groups; the rounding makes no difference.
        step = weight_only_pass(method, sizes_only=True)
        step(ir.load(model))
        return tuple(dict.fromkeys(weight.name for weight in step.weights if not weight.reason))
    graph = ir.load(model).graph
    linears = [linear.name for linear in quantizable_linears(graph, method.keep)]
    tables = () if isinstance(method, Float8) else quantizable_tables(graph, method.keep)
    kernels = quantizable_convolutions(graph, method.keep) if isinstance(method, StaticInt8) else ()
    return tuple(dict.fromkeys([*tables, *(kernel.name for kernel in kernels), *linears]))


def weight_bytes(model: Path) -> dict[str, int]:
    """Return the float32 size of each linear layer, convolution and large embedding table, by name.

    It is in proportion to the operations of a layer too, where all layers see as many rows.
    """
    graph = ir.load(model).graph
    sizes = {
        name: int(np.prod(_shape(lookups[0].inputs[0]))) * 4
        for name, lookups in quantizable_tables(graph).items()
    }
    layers: list[WeightedNode] = [*find_linears(graph), *find_convolutions(graph)]
    return sizes | {layer.name: layer.shape[0] * layer.shape[1] * 4 for layer in layers}


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
    advance: Callable[[int, int], None] | None = None,
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
        advance=advance,
    )
    return {name: float(rows.mean()) for name, rows in errors.items()}


def measure_errors(  # noqa: PLR0913, what is measured, on what, and how
    model: Path,
    config: QuantizationConfig,
    feeds: Feeds,
    *,
    calibration: Feeds | None = None,
    samples: int = SENSITIVITY_SAMPLES,
    alone: bool = True,
    nodes: Collection[str] | None = None,
    worker: Worker | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> dict[str, Float32Array]:
    """Return 1 - cosine of each sample's embedding with only one node quantized, for each node.

    Ranges are collected once; a graph with one node quantized shares its other weights with
    `model`, so each node costs one opening of the graph and one run for each sample. All run in one
    worker, as no engine has seen these graphs before.

    Args:
        model: ONNX file of the fp32 variant with one output, the embedding, in the layout that the
            method is for. A small file lies beside it while the engine reads it.
        config: The method. `equalization` is not applied: pass the equalized graph as `model`.
            Nodes in `keep` are not measured and stay in float.
        feeds: Starts a stream of calibration data; its first feeds are compared, until `samples`
            rows have been taken.
        calibration: Starts the stream that ranges are chosen from; None takes `feeds`.
        samples: Rows to compare, at least 1.
        alone: Quantize only the node in question. False quantizes all others instead: what is left
            of the error when that node is put back to float.
        nodes: Names to measure; None measures all in quantizable_nodes.
        worker: None starts one.
        advance: Called with (done, total) after each node.

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
    save = _writer(model, config, calibration or feeds)
    always = _layerwise(config).keep

    def write(path: Path, name: str) -> None:
        others = tuple(other for other in names if other != name)
        save(path, (*always, *(others if alone else (name,))))

    return output_errors(
        model,
        names if nodes is None else [name for name in names if name in nodes],
        write,
        feeds,
        samples=samples,
        what=f"{'only' if alone else 'all but'} '{{}}' quantized",
        worker=worker,
        advance=advance,
    )


def choose_excluded(
    errors: Mapping[str, float],
    costs: Mapping[str, float] | None = None,
    *,
    limit: int | None = None,
) -> tuple[tuple[str, ...], ...]:
    """Return lists of nodes to exclude, the shortest first: 1, 2, 4, 8, ... nodes.

    Each list extends the one before it by the nodes that remove most error for their cost.
    The search tries them in order until the budget holds.

    Args:
        errors: Sensitivity of each node, by name.
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
    if isinstance(config, DynamicInt8):
        return config
    # One layer at a time: float16 elsewhere would only add the same error to each.
    method = replace(config, rest="float32")
    # With one layer quantized a size target has no meaning; what it lowered is measured so.
    return replace(method, at_most=None) if isinstance(method, WeightOnly) else method


def _writer(model: Path, config: QuantizationConfig, calibration: Feeds) -> _Write:
    """Return a writer of the graph with some nodes excluded; shared work is done here."""
    method = _layerwise(config)
    if isinstance(method, DynamicInt8):
        return partial(_write, model, lambda keep: Int8Linears("dynamic", keep=keep))
    if isinstance(method, WeightOnly):
        moments = None
        if method.rounding == "gptq":
            moments = collect_moments(
                model, moment_inputs(ir.load(model), method.keep), calibration
            )
        return partial(
            _write, model, lambda keep: weight_only_pass(replace(method, keep=keep), moments)
        )
    if isinstance(method, StaticInt8) and not method.bias_correction:
        inputs = quantized_values(ir.load(model), method)
        symmetric = method.activations == "int8"
        ranges = (
            collect_ranges(model, inputs, calibration, method=method.ranges, symmetric=symmetric)
            if inputs
            else {}
        )

        def static(keep: tuple[str, ...]) -> Callable[[ir.Model], object]:
            return lambda graph: to_static_int8(graph, replace(method, keep=keep), ranges)

        return partial(_write, model, static)

    def write(path: Path, keep: tuple[str, ...]) -> None:
        settings = replace(method, keep=keep)
        if isinstance(settings, DynamicInt8 | StaticInt8):
            settings = replace(settings, equalization=None)
        quantize(model, path, settings, calibration=calibration, share=model)

    return write


def _write(
    model: Path,
    rewrite: Callable[[tuple[str, ...]], Callable[[ir.Model], object]],
    path: Path,
    keep: tuple[str, ...],
) -> None:
    graph = ir.load(model)
    rewrite(keep)(graph)
    # Weights that stay in float are read from where they lie.
    ir.save(graph, path)
