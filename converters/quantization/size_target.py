"""Size target of weight-only methods: the layers lowered to half the bits.

Four bits are a quarter of fp16 before the first scale, so a graph at 4 bits is a little above a
quarter, and something has to go below. Which layers do is measured: each alone at half the bits in
a graph that is otherwise float, on calibration samples, rounded as it will be. Those go first that
move the embedding least for each byte they save.

On both encoders of the shapes CLIP, at a quarter with GPTQ, layers chosen so leave 0.0012 to 0.0024
of 1 - cosine on held-out data; chosen by the error of their weights, which ignores what a
layer does, 0.0043 to 0.018. Measured with plain rounding, and then rounded by GPTQ: 0.0014 to
0.0030.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from mmedge.converters.graphs.worker import Worker
from mmedge.converters.methods.configs import WeightOnly
from mmedge.converters.numerics.group_rounding import Bits
from mmedge.converters.passes.weight_only import (
    WeightOnlyLinears,
    embedding_makers,
    moment_inputs,
)
from mmedge.converters.quantization.output_errors import SENSITIVITY_SAMPLES, output_errors
from mmedge.converters.statistics.collect import Feeds, collect_moments
from mmedge.errors import QuantizationError
from mmedge.specs import Array

__all__ = [
    "choose_lowered",
    "constant_bytes",
    "half_bytes",
    "lowered_bits",
    "require_size",
    "weight_only_pass",
]


def constant_bytes(model: ir.Model) -> int:
    """Return the size of a graph's constants, in bytes."""
    return sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )


def half_bytes(model: ir.Model) -> float:
    """Return the fp16 size of a float32 graph's constants, in bytes."""
    return sum(
        value.const_value.nbytes / (2 if value.dtype == ir.DataType.FLOAT else 1)
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )


def lowered_bits(config: WeightOnly) -> Bits:
    """Return the bits of a lowered layer."""
    return 2 if config.bits == 4 else 4


def weight_only_pass(
    config: WeightOnly, moments: Mapping[str, Array] | None = None, *, sizes_only: bool = False
) -> WeightOnlyLinears:
    """Return the pass of a config, with its lowered layers.

    Args:
        config: The method.
        moments: For GPTQ: see WeightOnlyLinears.
        sizes_only: Write placeholder values.
    """
    return WeightOnlyLinears(
        config.form,
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        rounding="none" if sizes_only else config.rounding,
        moments=moments,
        bits_of=dict.fromkeys(config.lowered, lowered_bits(config)),
        keep=config.keep,
    )


def choose_lowered(
    model: Path,
    config: WeightOnly,
    feeds: Feeds,
    *,
    moments: Mapping[str, Array] | None = None,
    samples: int = SENSITIVITY_SAMPLES,
    worker: Worker | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Choose the layers to lower to half the bits until `config.at_most` holds.

    Args:
        model: ONNX file of the fp32 variant with one output, the embedding. A small file lies
            beside it while the engine reads it.
        config: The method and its target. `keep` names excluded layers; `lowered` is ignored.
        feeds: Starts a stream of calibration data.
        moments: Of what GPTQ needs (moment_inputs); None collects them where it needs them.
        samples: Rows of calibration data that each layer is measured on.
        worker: Where the graphs that are measured run; None starts one.
        advance: Called with (done, total) after each layer is measured.

    Returns:
        The names of the layers and tables, in the graph's order, with 1 - mean cosine of the
        embedding where the layer alone is quantized, at half the bits. Empty where the target holds
        without, or where there is none.

    Raises:
        QuantizationError: If the target cannot be reached, or the method cannot take the graph.
        CalibrationError: If the stream is empty.
        BackendError: If ONNX Runtime cannot run a layer at half the bits; the layer is named.
    """
    if config.at_most is None:
        return {}
    source = ir.load(model)
    limit = config.at_most * half_bytes(source)
    plain = replace(config, at_most=None, lowered=())
    size, stored = _sizes(model, plain)
    if size <= limit:
        return {}
    last = embedding_makers(source.graph)
    names = tuple(name for name in stored if name not in last)
    least, lowered = _sizes(model, replace(plain, lowered=names))
    if least > limit:
        raise _too_large(config, least, source, f"with all {len(names)} layers lowered")
    saved = {name: stored[name] - lowered[name] for name in names if stored[name] > lowered[name]}
    if config.rounding == "gptq" and moments is None:
        moments = collect_moments(model, moment_inputs(source, config.keep), feeds)

    def write(path: Path, name: str) -> None:
        graph = ir.load(model)
        others = (*config.keep, *(other for other in stored if other != name))
        weight_only_pass(replace(plain, lowered=(name,), keep=others), moments)(graph)
        ir.save(graph, path)  # weights that stay in float are read from where they lie

    rows = output_errors(
        model,
        saved,
        write,
        feeds,
        samples=samples,
        what=f"only '{{}}' quantized, at {lowered_bits(config)} bits",
        worker=worker,
        advance=advance,
    )
    errors = {name: float(found.mean()) for name, found in rows.items()}
    return {name: errors[name] for name in _enough(errors, saved, size - limit)}


def require_size(graph: ir.Model, step: WeightOnlyLinears, model: Path, config: WeightOnly) -> None:
    """Check that a quantized graph meets the size target of its config.

    Args:
        graph: The quantized graph.
        step: What has made it.
        model: ONNX file of what it was made of, in float32.
        config: The method and its target.

    Raises:
        QuantizationError: If it is not.
    """
    bits = lowered_bits(config)
    found = {weight.name for weight in step.weights if weight.bits == bits}
    if missing := [name for name in config.lowered if name not in found]:
        raise QuantizationError(
            f"lowered: got {', '.join(missing)}, expected layers or tables that the method "
            f"quantizes, such as {next(w.name for w in step.weights if w.bits < 32)}."
        )
    if config.at_most is None:
        return
    source, size = ir.load(model), constant_bytes(graph)
    if size > config.at_most * half_bytes(source):
        raise _too_large(config, size, source, f"with {len(config.lowered)} layers lowered")


def _too_large(config: WeightOnly, size: int, source: ir.Model, how: str) -> QuantizationError:
    half = half_bytes(source)
    way_out = f"Raise the target, or take larger groups (g{2 * config.group_size})"
    way_out += ", or exclude fewer layers." if config.keep else "."
    return QuantizationError(
        f"The size target cannot be reached: got {size / half:.4f} of fp16 ({size:,} bytes) {how} "
        f"to {lowered_bits(config)} bits, expected at most {config.at_most:g} "
        f"({int((config.at_most or 0.0) * half):,} bytes). {way_out}"
    )


def _sizes(model: Path, config: WeightOnly) -> tuple[int, dict[str, int]]:
    """Return the bytes of all constants, and of each weight that is quantized, by name."""
    graph = ir.load(model)
    step = weight_only_pass(config, sizes_only=True)
    step(graph)
    stored: dict[str, int] = {}
    for weight in step.weights:
        if not weight.reason:  # a table's rows may be stored separately from a head's columns
            stored[weight.name] = stored.get(weight.name, 0) + weight.size_bytes
    return constant_bytes(graph), stored


def _enough(errors: Mapping[str, float], saved: Mapping[str, int], excess: float) -> Sequence[str]:
    """Return layers that save the excess bytes at the least error."""
    chosen: list[str] = []
    for name in sorted(saved, key=lambda name: errors[name] / saved[name]):
        if excess <= 0:
            break
        chosen.append(name)
        excess -= saved[name]
    # What the last of them has made needless, the largest error first.
    for name in sorted(chosen, key=lambda name: -errors[name]):
        if excess + saved[name] <= 0:
            chosen.remove(name)
            excess += saved[name]
    return [name for name in saved if name in chosen]
