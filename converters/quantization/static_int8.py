"""Static int8 of linear layers, embedding tables and convolutions in one graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from mmedge.converters.methods.configs import StaticInt8
from mmedge.converters.numerics.int8_rounding import Range
from mmedge.converters.passes.batch_norm import FoldBatchNorm
from mmedge.converters.passes.int8 import (
    Int8Linears,
    quantizable_inputs,
    quantizable_linears,
    quantizable_tables,
)
from mmedge.converters.passes.int8_convolutions import Int8Convolutions, convolution_values
from mmedge.converters.passes.linears import Linear
from mmedge.specs import Array, Float32Array

__all__ = ["quantized_values", "to_static_int8"]


def quantized_values(graph: ir.Model, config: StaticInt8) -> list[str]:
    """Return the names of the activations whose ranges `to_static_int8` needs, each once.

    Args:
        graph: In float; norms are folded in it.
        config: The method.
    """
    FoldBatchNorm()(graph)
    names = quantizable_inputs(graph, config.keep)
    return list(dict.fromkeys([*names, *convolution_values(graph.graph, config.form, config.keep)]))


def to_static_int8(
    graph: ir.Model,
    config: StaticInt8,
    ranges: Mapping[str, Range],
    *,
    biases: Callable[[Linear, Array, Float32Array], Float32Array | None] | None = None,
    convolutions: bool = True,
) -> dict[str, float]:
    """Quantize a graph in place.

    Args:
        graph: In float.
        config: The method; `equalization` and `rest` are not applied here.
        ranges: By tensor name, for every name in `quantized_values`.
        biases: See Int8Linears.
        convolutions: Whether to quantize convolutions.

    Returns:
        ||W - Wq||_F / ||W||_F of the quantized weights, by name.

    Raises:
        QuantizationError: If no layer can be quantized, a range is missing, or a weight or range
            is not finite.
    """
    symmetric, half = config.activations == "int8", config.rest == "float16"
    errors: dict[str, float] = {}
    FoldBatchNorm()(graph)
    if convolutions:
        kernels = Int8Convolutions(
            config.form,
            ranges,
            symmetric_activations=symmetric,
            half=half,
            keep=config.keep,
            paired=config.paired,
        )
        kernels(graph)
        errors |= kernels.weight_errors
    main = graph.graph
    others = (*quantizable_linears(main, config.keep), *quantizable_tables(main, config.keep))
    if errors and not others:
        return errors
    matrices = Int8Linears(
        config.form,
        ranges,
        symmetric_activations=symmetric,
        half=half,
        keep=config.keep,
        paired=config.paired,
        biases=biases,
    )
    matrices(graph)
    return errors | matrices.weight_errors
