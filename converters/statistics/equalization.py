"""Search of equalization scales, layer by layer.

SmoothQuant (Xiao et al. 2023, section 4, eq. 4): channel j of what a group of linear layers reads
is divided by s_j = max|x_j|^a / max|w_j|^(1 - a), and row j of their weights multiplied by it. The
strength a is chosen for each group: the one whose quantized output is predicted to be nearest. The
scales are rounded to powers of two, so that in float the function stays the same to the bit.

The prediction needs no further run. With the second moment H of the group's inputs, a weight's
rounding dW adds tr(dW^T H dW) to the output's mean squared error, and rounding activations in steps
of d adds d^2 / 12 for each weight it meets; a channel too small for a step adds its own energy and
no more. Errors count relative to the energy of a layer's output, so that the layers of a group
weigh the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from mmedge.converters.methods.configs import Equalization
from mmedge.converters.numerics.int8_rounding import Range, quantize_weight
from mmedge.converters.passes.equalization import Group, ScaleChannels, find_groups
from mmedge.converters.passes.linears import Linear, makes_embedding
from mmedge.converters.statistics.collect import (
    ChannelStatistics,
    Feeds,
    collect_channels,
    collect_moments,
)
from mmedge.files import storage_errors
from mmedge.specs import Array, Float32Array

__all__ = ["GroupScales", "Scales", "choose_scales", "equalize"]

Activations = Literal["uint8", "int8"]

STRENGTHS: tuple[float, ...] = tuple(step / 10 for step in range(11))
# A scale further than this from the group's median gains nothing in 8 bits.
_LARGEST_EXPONENT = 20
# What a Mul in every call has to gain: this share of the group's predicted error.
_WORTH_A_MUL = 0.5
# Of the moment matrices that are held at a time.
_MOMENTS_BYTES = 1 << 29


@dataclass(frozen=True)
class GroupScales:
    """Decision for the linear layers that read one value.

    Attributes:
        linears: Their names.
        scales: (C,) powers of two that the channels are divided by, or None: left as it was.
        strength: The a that they come from; None where nothing was changed.
        inserted: Whether they need a Mul in the graph, as nothing could take them in.
        error_before: Predicted squared error of the outputs, relative to their energy, averaged
            over the layers that are quantized; NaN where it was not requested.
        error_after: The same with the scales.
        reason: Reason without scales, else "".
    """

    linears: tuple[str, ...]
    scales: Float32Array | None
    strength: float | None
    inserted: bool
    error_before: float
    error_after: float
    reason: str


@dataclass(frozen=True)
class Scales:
    """Decisions for all groups, in the graph's order."""

    groups: tuple[GroupScales, ...]

    def step(self) -> ScaleChannels:
        """Return the pass that applies them to any layout of the role."""
        factors: dict[str, Array] = {}
        inserted: set[str] = set()
        for group in self.groups:
            if group.scales is not None:
                factors.update(dict.fromkeys(group.linears, group.scales))
                inserted.update(group.linears if group.inserted else ())
        return ScaleChannels(factors, insert=inserted)


def equalize(
    model: Path,
    out: Path,
    feeds: Feeds,
    config: Equalization,
    *,
    activations: Activations = "uint8",
    keep: Collection[str] = (),
) -> Scales:
    """Write an equivalent float graph whose channels fit one scale a tensor.

    Args: as of `choose_scales`, and
        out: ONNX file to write, its weights to `out` + ".data" beside it.

    Returns:
        What was decided for each group.

    Raises:
        CalibrationError: If the stream is empty.
        QuantizationError: If weights or activations are not finite (the tensor is named).
    """
    scales = choose_scales(model, feeds, config, activations=activations, keep=keep)
    graph = ir.load(model)
    scales.step()(graph)
    with storage_errors(out):
        ir.save(graph, out, external_data=f"{out.name}.data")
    return scales


def choose_scales(
    model: Path,
    feeds: Feeds,
    config: Equalization,
    *,
    activations: Activations = "uint8",
    keep: Collection[str] = (),
    insert: bool = False,
) -> Scales:
    """Choose the channel scales of each group of linear layers.

    Args:
        model: ONNX file in float32, in any layout; the scales go by the layers' names, which all
            layouts of a role share.
        feeds: Starts a stream of feeds; called a few times.
        config: The strength, or None to search it. A fixed strength is taken without asking
            whether it gains.
        activations: What they are quantized to: "uint8" with a zero point, also of dynamic int8, or
            "int8" symmetric.
        keep: Names of excluded linear layers. They are scaled where another layer of
            their group is quantized, and do not weigh in the decision.
        insert: Whether a Mul may be inserted where scales cannot be folded (the input of an
            MLP's second layer) and more than half of the predicted error goes away.

    Raises:
        CalibrationError: If the stream is empty.
        QuantizationError: If weights or activations are not finite (the tensor is named).
    """
    groups = find_groups(ir.load(model).graph)
    decided: dict[int, GroupScales] = {}
    open_groups: list[int] = []
    for at, group in enumerate(groups):
        reason = _unscaled_reason(group, keep, insert=insert)
        if reason:
            decided[at] = _left(group, reason)
        else:
            open_groups.append(at)
    # A layer that absorbs scales changes its columns before its own group is processed.
    open_groups.sort(key=lambda at: not isinstance(groups[at].source, Linear))
    columns: dict[str, Array] = {}
    inputs = {
        at: list(dict.fromkeys(linear.x.name or "" for linear in groups[at].linears))
        for at in open_groups
    }
    names = [name for at in open_groups for name in inputs[at]]
    channels = collect_channels(model, names, feeds) if names else {}
    for some in _portions(open_groups, groups):
        wanted = [name for at in some for name in inputs[at]]
        moments = collect_moments(model, wanted, feeds)
        for at in some:
            layers = [
                _Layer(linear, channels, moments, columns, activations)
                for linear in groups[at].linears
            ]
            decided[at] = _decide(groups[at], layers, config.strength, keep)
            source, scales = groups[at].source, decided[at].scales
            if isinstance(source, Linear) and scales is not None:
                columns[source.name] = 1 / scales
    return Scales(tuple(decided[at] for at in range(len(groups))))


def _unscaled_reason(group: Group, keep: Collection[str], *, insert: bool) -> str:
    if all(makes_embedding(linear) for linear in group.linears):
        return "makes the embedding and stays in float"
    if all(linear.name in keep or makes_embedding(linear) for linear in group.linears):
        return "excluded"
    if group.tied or (group.source is None and not insert):
        return group.obstacle
    return ""


def _left(group: Group, reason: str, error: float = float("nan")) -> GroupScales:
    names = tuple(linear.name for linear in group.linears)
    return GroupScales(names, None, None, False, error, error, reason)


def _portions(chosen: Sequence[int], groups: Sequence[Group]) -> Iterator[list[int]]:
    """Split into portions whose moment matrices fit in memory."""
    portion: list[int] = []
    held = 0
    for at in chosen:
        inputs = len({linear.x for linear in groups[at].linears})
        needed = 4 * inputs * groups[at].channels ** 2
        if portion and held + needed > _MOMENTS_BYTES:
            yield portion
            portion, held = [], 0
        portion.append(at)
        held += needed
    if portion:
        yield portion


class _Layer:
    """One linear layer with its input statistics; predicts its quantization error."""

    def __init__(
        self,
        linear: Linear,
        channels: Mapping[str, ChannelStatistics],
        moments: Mapping[str, Array],
        columns: Mapping[str, Array],
        activations: Activations,
    ) -> None:
        self.linear = linear
        name = linear.x.name or ""
        self._low = channels[name].low.astype(np.float64)
        self._high = channels[name].high.astype(np.float64)
        self._moment = moments[name]
        self.weight = linear.matrix() * columns.get(linear.name, np.float32(1))
        self._symmetric = activations == "int8"
        self._energy = float(np.vdot(self.weight, self._moment @ self.weight))

    @property
    def largest(self) -> Array:
        """(C,) the largest magnitude of each channel."""
        return np.maximum(np.abs(self._low), np.abs(self._high))

    def error(self, scales: Array) -> float:
        """Return the output's squared error relative to its energy, the input divided by `scales`.

        Args:
            scales: (C,) float32.
        """
        if self._energy <= 0:
            return 0.0
        scaled = self.weight * scales[:, None]
        quantized, steps = quantize_weight(scaled, axis=1)
        # Divided by the scales here instead of the moment, both sides of it.
        change = (quantized * steps - scaled) / scales[:, None]
        of_weights = float(np.vdot(change, self._moment @ change))
        step = self._step(scales)
        energies = np.diagonal(self._moment) / np.square(scales, dtype=np.float64)
        rounding = np.minimum(step * step / 12, energies)
        of_activations = float(rounding @ np.square(scaled, dtype=np.float64).sum(1))
        return (max(of_weights, 0.0) + of_activations) / self._energy

    def _step(self, scales: Array) -> float:
        if self._symmetric:
            return float((self.largest / scales).max()) / 127
        low, high = float((self._low / scales).min()), float((self._high / scales).max())
        return Range(low, high).affine()[0]


def _decide(
    group: Group, layers: Sequence[_Layer], strength: float | None, keep: Collection[str]
) -> GroupScales:
    counted = [
        layer
        for layer in layers
        if layer.linear.name not in keep and not makes_embedding(layer.linear)
    ]

    def error(scales: Array) -> float:
        return float(np.mean([layer.error(scales) for layer in counted]))

    inserted = group.source is None
    before = error(np.ones(group.channels, np.float32))
    tried = STRENGTHS if strength is None else (strength,)
    candidates = {a: _smooth(layers, a) for a in tried}
    errors = {a: error(scales) for a, scales in candidates.items()}
    best = min(errors, key=errors.__getitem__)
    scales, after = candidates[best], errors[best]
    if strength is None and after >= before:
        return _left(group, "no strength makes its error smaller", before)
    if np.all(scales == 1):
        return _left(group, "its channels are even", before)
    if inserted and after > _WORTH_A_MUL * before:
        return _left(group, f"{group.obstacle}; a Mul would not gain enough", before)
    names = tuple(linear.name for linear in group.linears)
    return GroupScales(names, scales, best, inserted, before, after, "")


def _smooth(layers: Sequence[_Layer], strength: float) -> Float32Array:
    """Return scales (C,), powers of two around 1, of SmoothQuant at that strength."""
    activations = _positive(np.max([layer.largest for layer in layers], axis=0))
    weights = _positive(np.max([np.abs(layer.weight).max(1) for layer in layers], axis=0))
    exponents = strength * np.log2(activations) - (1 - strength) * np.log2(weights)
    # A factor common to all channels changes nothing once the weights' scales follow.
    exponents = np.rint(exponents - np.median(exponents))
    exponents = np.clip(exponents, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return np.exp2(exponents).astype(np.float32)


def _positive(largest: Array) -> Array:
    """Replace all-zero channels by the smallest of the others.

    A dead activation then leaves its weights small, and a dead weight its activation: neither
    decides the range that the others are quantized in.
    """
    alive = largest[largest > 0]
    floor = alive.min() if alive.size else 1.0
    return np.maximum(largest, floor).astype(np.float64)
