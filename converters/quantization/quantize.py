"""Quantization of a graph by a typed config.

`quantize(model, out, DynamicInt8())` writes the quantized graph of `model` to `out` and returns
a report of every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import singledispatch
from pathlib import Path

import onnx_ir as ir

from mmedge.bundle.nodes import NodeEntry
from mmedge.converters.graphs.worker import Worker
from mmedge.converters.methods.configs import (
    BFloat16,
    DynamicInt8,
    Float8,
    Float16,
    QuantizationConfig,
    Rest,
    StaticInt8,
    WeightOnly,
)
from mmedge.converters.numerics.int8_rounding import Range
from mmedge.converters.passes.bfloat16 import to_bfloat16
from mmedge.converters.passes.float8 import Float8Linears
from mmedge.converters.passes.float16 import to_float16
from mmedge.converters.passes.int8 import Int8Linears, quantizable_inputs
from mmedge.converters.passes.linears import Linear, find_linears
from mmedge.converters.passes.weight_only import QuantizedWeight, moment_inputs
from mmedge.converters.quantization.bias_correction import corrected_bias
from mmedge.converters.quantization.layer_report import (
    describe_layers,
    plan_layers,
    report_fp32_ops,
)
from mmedge.converters.quantization.mixed_float16 import narrow_float_ops, report_narrowed
from mmedge.converters.quantization.size_target import (
    choose_lowered,
    lowered_bits,
    require_size,
    weight_only_pass,
)
from mmedge.converters.quantization.static_int8 import quantized_values, to_static_int8
from mmedge.converters.statistics.calibrator import Calibrator
from mmedge.converters.statistics.collect import Feeds
from mmedge.errors import CalibrationError, QuantizationError
from mmedge.files import storage_errors
from mmedge.specs import Array, Float32Array

__all__ = ["quantize"]


def quantize(
    model: Path,
    out: Path,
    config: QuantizationConfig,
    *,
    calibration: Feeds | None = None,
    share: Path | None = None,
    ranges: Mapping[str, Range] | None = None,
    worker: Worker | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> tuple[NodeEntry, ...]:
    """Write the quantized graph of `model` to `out`, its weights to `out` + ".data" beside it.

    Args:
        model: ONNX file of the fp32 variant: the ONNX Runtime layout for what runs on CPU, the
            portable one otherwise.
        out: ONNX file to write.
        config: The method and its settings.
        calibration: Starts a stream of feeds for the graph; called once for each reading of the
            data. Statistics are stored, never activations. A Calibrator serves several calls with
            one reading.
        share: Another ONNX file in the folder of `out`, such as the same variant in another layout.
            Weights that both hold are read from its external data instead of being stored again.
        ranges: Of what linear layers read, by Linear.name, instead of collecting them: what
            distillation has learned. StaticInt8 alone takes it.
        worker: Where graphs run that no engine has seen before, to measure or check them; None
            starts one when needed.
        advance: Called with (done, total) where layers are measured one by one, for a size target.

    Returns:
        A report of every linear layer and embedding table, in the graph's order.

    Raises:
        QuantizationError: If the method cannot take the graph, or weights or activations are not
            finite (the tensor is named).
        CalibrationError: If the method needs calibration data and got none.
    """
    calibrator: Calibrator | None = None
    if calibration is not None:
        calibrator = calibration if isinstance(calibration, Calibrator) else Calibrator(calibration)
    if ranges is not None and not isinstance(config, StaticInt8):
        raise QuantizationError(
            f"Ranges are for StaticInt8; got {type(config).__name__}, which has no use for them."
        )
    try:
        made = _Quantizer(model, calibrator, ranges, worker, advance)
        quantized = _apply(config, made)
        if share is not None:
            _share_weights(quantized, share)
        with storage_errors(out):
            ir.save(quantized, out, external_data=None if share else f"{out.name}.data")
    finally:
        if calibrator is not None and calibrator is not calibration:
            calibrator.close()
    return tuple(made.entries)


def _share_weights(model: ir.Model, other: Path) -> None:
    """Share the external weights of `other`."""
    held = ir.load(other).graph.initializers
    for name, value in model.graph.initializers.items():
        theirs = held[name].const_value if name in held else None
        ours = value.const_value
        if (
            isinstance(theirs, ir.ExternalTensor)
            and ours is not None
            and (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            and ours.tobytes() == theirs.tobytes()
        ):
            value.const_value = theirs


class _Quantizer:
    """State of one quantize call: graph, calibration and report."""

    def __init__(
        self,
        model: Path,
        calibrator: Calibrator | None,
        ranges: Mapping[str, Range] | None,
        worker: Worker | None,
        advance: Callable[[int, int], None] | None,
    ) -> None:
        self.model = model
        self.calibrator = calibrator
        self.given = ranges
        self.worker = worker
        self.advance = advance
        self.entries: tuple[NodeEntry, ...] = ()

    def needed(self, what: str) -> Calibrator:
        """Return the calibration data that a method requires."""
        if self.calibrator is None:
            raise CalibrationError(
                f"{what} needs calibration data. Pass --calibration DIR, or use int8-dynamic."
            )
        return self.calibrator

    def ranges(self, path: Path, graph: ir.Model, config: StaticInt8 | Float8) -> dict[str, Range]:
        """Return the range of every quantized activation, by value name."""
        if self.given is not None:
            return {
                linear.x.name or "": self.given[linear.name]
                for linear in find_linears(graph.graph)
                if linear.name in self.given
            }
        if isinstance(config, StaticInt8):
            names, what = quantized_values(graph, config), "Static int8"
        else:
            names, what = quantizable_inputs(graph, config.keep), "fp8"
        if not names:
            return {}
        symmetric = isinstance(config, Float8) or config.activations == "int8"
        return self.needed(what).ranges(path, names, config.ranges, symmetric=symmetric)

    def with_float_precision(self, graph: ir.Model, source: Path, rest: Rest) -> ir.Model:
        """Return a quantized graph of `source`, with the precision set for non-quantized ops."""
        if rest == "float32":
            return graph
        narrow = narrow_float_ops(graph, source, self.calibrator, self.worker)
        self.entries = report_narrowed(self.entries, narrow)
        return narrow


@singledispatch
def _apply(config: object, _made: _Quantizer) -> ir.Model:
    raise QuantizationError(
        f"Unknown quantization config: got {type(config).__name__}, expected one of Float16, "
        "BFloat16, Float8, DynamicInt8, StaticInt8, WeightOnly."
    )


@_apply.register
def _(_config: Float16, made: _Quantizer) -> ir.Model:
    peaks = None if made.calibrator is None else made.calibrator.peaks(made.model)
    result = to_float16(made.model, peaks)
    made.entries = report_fp32_ops(ir.load(made.model).graph, result.fp32_ops, "float16")
    return result.model


@_apply.register
def _(config: DynamicInt8, made: _Quantizer) -> ir.Model:
    path = made.model
    if config.equalization is not None:
        calibrator = made.needed("Equalization")
        path = calibrator.equalized(path, config.equalization, "uint8")
    graph = ir.load(path)
    plan = plan_layers(graph.graph, config.keep)
    step = Int8Linears("dynamic", keep=config.keep, paired=config.paired)
    step(graph)
    made.entries = describe_layers(plan, "int8", step.weight_errors, {})
    return graph


@_apply.register
def _(config: StaticInt8, made: _Quantizer) -> ir.Model:
    path = made.model
    if config.equalization is not None:
        calibrator = made.needed("Equalization")
        path = calibrator.equalized(path, config.equalization, config.activations)
    graph = ir.load(path)
    # Distillation has trained linear layers alone.
    convolutions = made.given is None
    ranges = made.ranges(path, graph, config)
    plan = plan_layers(graph.graph, config.keep, convolutions=convolutions)
    biases = _corrected(made, path, graph, config) if config.bias_correction else None
    errors = to_static_int8(graph, config, ranges, biases=biases, convolutions=convolutions)
    made.entries = describe_layers(plan, "int8", errors, ranges)
    return made.with_float_precision(graph, path, config.rest)


def _corrected(
    made: _Quantizer, path: Path, graph: ir.Model, config: StaticInt8
) -> Callable[[Linear, Array, Float32Array], Float32Array | None]:
    """Return the bias correction of a layer."""
    names = quantizable_inputs(graph, config.keep)
    channels = made.needed("Bias correction").channels(path, names)
    return lambda linear, quantized, scales: corrected_bias(
        linear, quantized, scales, channels[linear.x.name or ""].mean
    )


@_apply.register
def _(_config: BFloat16, made: _Quantizer) -> ir.Model:
    made.entries = report_fp32_ops(ir.load(made.model).graph, (), "bfloat16")
    return to_bfloat16(made.model)


@_apply.register
def _(config: Float8, made: _Quantizer) -> ir.Model:
    graph = ir.load(made.model)
    ranges = made.ranges(made.model, graph, config)
    plan = plan_layers(graph.graph, config.keep)
    step = Float8Linears(ranges, keep=config.keep, half=config.rest == "float16")
    step(graph)
    made.entries = describe_layers(plan, "float8e4m3fn", step.weight_errors, ranges)
    return made.with_float_precision(graph, made.model, config.rest)


@_apply.register
def _(config: WeightOnly, made: _Quantizer) -> ir.Model:
    graph = ir.load(made.model)
    moments = None
    if config.rounding == "gptq":
        names = moment_inputs(graph, config.keep)
        moments = made.needed("GPTQ").moments(made.model, names)
    errors: Mapping[str, float] = {}
    if config.at_most is not None and not config.lowered:
        feeds = made.needed("A size target")
        errors = choose_lowered(
            made.model,
            config,
            feeds,
            moments=moments,
            worker=made.worker,
            advance=made.advance,
        )
        config = replace(config, lowered=tuple(errors))
    step = weight_only_pass(config, moments)
    step(graph)
    require_size(graph, step, made.model, config)
    made.entries = tuple(
        NodeEntry(
            name=weight.name,
            op_type=weight.op_type,
            precision="float32" if weight.bits == 32 else f"int{weight.bits}",
            shape=weight.shape,
            weight_error=weight.weight_error,
            output_error=errors.get(weight.name),
            reason=weight.reason or _other_bits(weight, config),
        )
        for weight in step.weights
    )
    return made.with_float_precision(graph, made.model, config.rest)


def _other_bits(weight: QuantizedWeight, config: WeightOnly) -> str:
    """Return why a weight has fewer or more bits than the others, else ""."""
    if config.bits < weight.bits < 32:
        return "makes the embedding"
    if weight.name not in config.lowered:
        return ""
    if config.at_most is None:
        return f"{lowered_bits(config)} bits by name"
    return (
        f"{lowered_bits(config)} bits for {config.at_most:.4g} of fp16: least effect on the "
        "embedding per byte saved"
    )
