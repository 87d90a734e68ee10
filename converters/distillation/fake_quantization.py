"""Trainable fake quantization: a torch module that emulates its int8 graph in float.

The torch equivalent of passes/int8.py: the input of a linear layer in 8 bits with one scale and
zero point for the whole tensor, its weight in int8 with one scale for each output channel, a large
embedding table in int8 with one scale for each row. Layers that read one tensor share a quantizer,
as they share one in the graph.

Rounding has no gradient; the straight-through estimator takes that of the identity (Bengio et al.
2013, "Estimating or Propagating Gradients Through Stochastic Neurons"). Weights use it with the
scale that their largest value gives. Activations learn their step by the gradient of Esser et al.
2020 ("Learned Step Size Quantization", eq. 3) and their zero point by that of Bhalgat et al. 2020
("LSQ+", section 3). The step is stored as its logarithm, so that an update changes it by a share of
itself whatever its size (Jain et al. 2020, "Trained Quantization Thresholds", appendix B): this
stands in for the gradient scale of LSQ.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from mmedge.converters.numerics.int8_rounding import Range
from mmedge.errors import QuantizationError

__all__ = ["ActivationQuantizer", "FakeQuantized", "RoundedWeight"]

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# Minimum size of a quantized embedding table, as in passes/int8.py.
_LARGE_TABLE = 1 << 16


class _Round(torch.autograd.Function):
    """Quantize to integers in [low, high] and back; the backward pass is that of LSQ and LSQ+."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401, torch.autograd.function.FunctionCtx
        x: torch.Tensor,
        step: torch.Tensor,
        zero: torch.Tensor,
        low: int,
        high: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, step, zero)
        ctx.bounds = (low, high)
        values = torch.clamp(torch.round(x / step) + zero, low, high)
        return (values - zero) * step

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        *gradients: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        (gradient,) = gradients
        x, step, zero = ctx.saved_tensors
        low, high = ctx.bounds
        ratio = x / step
        rounded = torch.round(ratio)
        values = rounded + zero
        below, above = values < low, values > high
        inside = ~(below | above)
        to_step = torch.where(inside, rounded - ratio, torch.clamp(values, low, high) - zero)
        to_zero = torch.where(inside, 0.0, -step)
        return (
            gradient * inside,
            (gradient * to_step).sum(),
            (gradient * to_zero).sum(),
            None,
            None,
        )


class _StraightThrough(torch.autograd.Function):
    """Round to the nearest, ties to even; the gradient is unchanged."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ANN401, ARG004
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:  # noqa: ANN401, ARG004
        return gradients[0]


class ActivationQuantizer(nn.Module):
    """8 bits with one scale and zero point for the tensor, both learned.

    Attributes:
        log_step: () natural logarithm of the scale.
        offset: () the zero point as a share of 255; not learned where symmetric.
    """

    def __init__(self, start: Range, *, symmetric: bool = False) -> None:
        """Start from a calibrated range.

        Args:
            start: What to represent at first.
            symmetric: int8 with zero point 0, as TensorRT takes it, instead of uint8.
        """
        super().__init__()
        self._symmetric = symmetric
        self._bounds = (-128, 127) if symmetric else (0, 255)
        if symmetric:
            step, zero = max(abs(start.low), abs(start.high), _SMALLEST_SCALE * 127) / 127, 0
        else:
            step, zero = start.affine()
        self.log_step = nn.Parameter(torch.tensor(math.log(step), dtype=torch.float32))
        self.offset = nn.Parameter(
            torch.tensor(zero / 255.0, dtype=torch.float32), requires_grad=not symmetric
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x quantized and dequantized, in the same shape."""
        step, zero = self._step(), self._zero()
        quantized: torch.Tensor = _Round.apply(x, step, zero, *self._bounds)  # type: ignore[no-untyped-call]
        return quantized

    def range(self) -> Range:
        """Return the range of the learned scale and zero point."""
        step, zero = float(self._step().detach()), int(self._zero().detach())
        if self._symmetric:
            return Range(-127 * step, 127 * step)
        return Range(-zero * step, (255 - zero) * step)

    def _step(self) -> torch.Tensor:
        return self.log_step.exp().clamp_min(_SMALLEST_SCALE)

    def _zero(self) -> torch.Tensor:
        zero: torch.Tensor = _StraightThrough.apply(  # type: ignore[no-untyped-call]
            self.offset.clamp(0.0, 1.0) * 255.0
        )
        return zero


class RoundedWeight(nn.Module):
    """Parametrization of a weight: int8, one scale for each index of the first axis."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the dequantized weight; the gradient passes straight through."""
        largest = weight.detach().abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
        # As quantize_weight: what is too small for a scale becomes 0.
        scale = torch.where(largest >= 127 * _SMALLEST_SCALE, largest, 1.0) / 127.0
        values: torch.Tensor = _StraightThrough.apply(weight / scale)  # type: ignore[no-untyped-call]
        return values.clamp(-127, 127) * scale


class FakeQuantized:
    """A copy of a module whose layers round as the int8 graph does.

    Attributes:
        module: The copy; it takes and returns what the original does.
        weights: Its float parameters by their names in the original.
        quantizers: Those of the activations, each once.
        untouched: Names in `ranges` that no Linear or Conv2d of the module bears, or that were not
            called as a module: they are quantized in the graph, but not here.
    """

    def __init__(
        self,
        module: nn.Module,
        ranges: Mapping[str, Range],
        inputs: Sequence[torch.Tensor],
        *,
        keep: Collection[str] = (),
        symmetric: bool = False,
    ) -> None:
        """Copy a module and quantize every layer with a range.

        Args:
            module: In float; not changed.
            ranges: Of what each linear layer reads, by Linear.name (see passes/linears.py): the
                module's name in `module`, for a patch convolution with ".matrix" behind.
            inputs: Sample inputs, to see which layers read one tensor.
            keep: Names of excluded layers and embedding tables.
            symmetric: int8 activations with zero point 0 instead of uint8.

        Raises:
            QuantizationError: If no layer has a range, or a range is not finite.
        """
        self.module = copy.deepcopy(module).eval().requires_grad_(requires_grad=False)
        self.weights = dict(self.module.named_parameters())
        self._ranges = {name: one for name, one in ranges.items() if name not in keep}
        layers = {
            name: layer for name, layer in _layers(self.module).items() if name in self._ranges
        }
        groups = _groups(self.module, layers, inputs)
        if not groups:
            raise QuantizationError(
                "Nothing to train: no linear layer of the module has a calibrated range, or all "
                "of them are to stay in float. Leave this role in float."
            )
        self._quantizer_of: dict[str, ActivationQuantizer] = {}
        for group in groups:
            quantizer = ActivationQuantizer(self._united(group), symmetric=symmetric)
            for name in group:
                self._quantizer_of[name] = quantizer
                layer = layers[name]
                layer.register_forward_pre_hook(
                    lambda _, args, q=quantizer: (q(args[0]), *args[1:])
                )
                _round(layer)
        self.quantizers = tuple(dict.fromkeys(self._quantizer_of.values()))
        self.untouched = tuple(name for name in self._ranges if name not in self._quantizer_of)
        for name, table in self.module.named_modules():
            large = isinstance(table, nn.Embedding) and table.weight.numel() >= _LARGE_TABLE
            if large and name not in keep:
                _round(table)

    def ranges(self) -> dict[str, Range]:
        """Return the input range of each layer, by name: learned or given."""
        return {
            name: self._quantizer_of[name].range() if name in self._quantizer_of else given
            for name, given in self._ranges.items()
        }

    def _united(self, group: Sequence[str]) -> Range:
        members = [self._ranges[name] for name in group]
        for name, one in zip(group, members, strict=True):
            if not (math.isfinite(one.low) and math.isfinite(one.high)):
                raise QuantizationError(
                    f"What '{name}' reads is NaN or infinite on the calibration data: range "
                    f"[{one.low}, {one.high}]. Check the data, or leave this role in float."
                )
        return Range(min(one.low for one in members), max(one.high for one in members))


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that become products with a constant matrix, by Linear.name."""
    found: dict[str, nn.Module] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            found[name] = layer
        elif isinstance(layer, nn.Conv2d):
            found[f"{name}.matrix"] = layer
    return found


def _groups(
    module: nn.Module, layers: Mapping[str, nn.Module], inputs: Sequence[torch.Tensor]
) -> list[tuple[str, ...]]:
    """Return the names of layers that read one tensor, for each tensor, in the order of calls."""
    readers: dict[tuple[int, int], dict[str, None]] = {}
    first_read: dict[str, tuple[int, int]] = {}
    # Held until all is seen, so that no memory is used again and taken for the same tensor.
    alive: list[torch.Tensor] = []
    handles = []

    def note(name: str, x: torch.Tensor) -> None:
        alive.append(x)
        # Views of all of a tensor hold the same numbers, whatever their shape.
        key = first_read.setdefault(name, (x.data_ptr(), x.numel()))
        readers.setdefault(key, {})[name] = None

    for name, layer in layers.items():
        handles.append(
            layer.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        )
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [tuple(names) for names in readers.values()]


def _round(layer: nn.Module) -> None:
    if not parametrize.is_parametrized(layer, "weight"):
        parametrize.register_parametrization(layer, "weight", RoundedWeight(), unsafe=True)
