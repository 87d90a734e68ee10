"""Recovery by distillation of a quantized student from its fp32 teacher.

No labels are needed: the teacher's embeddings of the calibration data are what is learned. A part
of that data is held back and decides which step of the training is kept, so that what comes out is
never further from the teacher there than what went in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from mmedge.converters.distillation.fake_quantization import FakeQuantized
from mmedge.converters.distillation.graph_weights import with_weights
from mmedge.converters.distillation.losses import contrastive_loss, joint_embedding_loss
from mmedge.converters.families.base import RoleSpec
from mmedge.converters.numerics.int8_rounding import Range
from mmedge.converters.statistics.collect import Feeds
from mmedge.errors import CalibrationError, QuantizationError
from mmedge.specs import Array, Compare

__all__ = ["Distillation", "Distilled", "distill"]

Row = Mapping[str, Array]

_HELD_SHARE = 5  # one in five
_HELD_MOST = 128
_FEWEST = 10
_CHECKS = 10
# Batches that wait to be drawn from, so that two rounds through the data differ.
_SHUFFLED_BATCHES = 4
# A start this much nearer than the first steps is returned to, and left again in smaller ones:
# equalized, a student may be so near that the usual rate throws it back.
_THROWN_BACK = 2.0
_GENTLER = 0.1
# A logarithm of a step, or a zero point as a share of its range, against a weight.
_QUANTIZER_RATE = 10.0


@dataclass(frozen=True, slots=True)
class Distillation:
    """Settings of the training.

    Attributes:
        steps: Updates of the weights.
        batch_size: Samples of one update.
        learning_rate: Of Adam (Kingma and Ba 2015), falling to zero along a cosine. Where the first
            steps lead away from the teacher, the start is returned to with a tenth of it.
        loss: "joint-embedding" draws each embedding to the teacher's, "contrastive" makes it
            nearer to the teacher's of the same sample than to those of others, "both" adds them.
        temperature: Of the contrastive loss.
        seed: Of the order of samples. The same seed on the same data and number of threads gives
            the same student.

    Raises:
        QuantizationError: If a number is out of range.
    """

    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 3e-4
    loss: Literal["joint-embedding", "contrastive", "both"] = "joint-embedding"
    temperature: float = 0.07
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, expected in (
            ("steps", self.steps, self.steps >= 1),
            ("batch_size", self.batch_size, self.batch_size >= 2),
            ("learning_rate", self.learning_rate, 0 < self.learning_rate < 1),
            ("temperature", self.temperature, 0 < self.temperature < math.inf),
        ):
            if not expected:
                least = {"steps": "1 or more", "batch_size": "2 or more"}.get(name, "above 0")
                raise QuantizationError(f"Distillation {name}: got {value}, expected {least}.")


@dataclass(frozen=True)
class Distilled:
    """A trained student.

    Attributes:
        spec: The role with the trained module, in float: `export_role` takes it.
        ranges: Of what each linear layer reads, by Linear.name: `quantize` takes them.
        loss_before: Mean squared distance from the teacher's embeddings on the samples held back,
            before training; 2 (1 - cosine) where embeddings are L2-normalised.
        loss_after: The same for the returned student, at most `loss_before`.
        step: After how many updates it was best; 0 if training did not improve on the start, which
            is then what is returned.
        samples: How many samples it was trained on.
        held_back: How many samples decided.
        untrained: Layers whose rounding the module could not show, by name: they keep the range
            that they were given.
    """

    spec: RoleSpec
    ranges: dict[str, Range]
    loss_before: float
    loss_after: float
    step: int
    samples: int
    held_back: int
    untrained: tuple[str, ...]

    @property
    def reason(self) -> str:
        """Reason for returning the untrained start, else ""."""
        if self.step:
            return ""
        return (
            f"no step of the training was nearer to the teacher than the start on the "
            f"{self.held_back} samples held back (squared distance {self.loss_before:.3g})"
        )


def distill(
    spec: RoleSpec,
    ranges: Mapping[str, Range],
    calibration: Feeds,
    config: Distillation,
    *,
    keep: Collection[str] = (),
    activations: Literal["uint8", "int8"] = "uint8",
    teacher: nn.Module | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> Distilled:
    """Train the int8 student of a role against its fp32 teacher.

    All weights and biases are trained, and the scale and zero point of every activation (see
    fake_quantization.py). The stream is read once for the teacher's embeddings, once for the
    samples held back, then as often as the steps take. In memory are: one embedding a sample, at
    most 128 samples held back, the few batches that the next one is drawn from, and five copies of
    the weights.

    Args:
        spec: The role; its module is not changed.
        ranges: Of what each linear layer that is to be int8 reads, by Linear.name.
        calibration: Starts a stream of feeds, of any batch size; the same each time.
        config: How to train.
        keep: Names of excluded linear layers and embedding tables.
        activations: As in StaticInt8.
        teacher: Called as the role's module; None for the module itself.
            Another one where the student starts from weights that were changed before, such as
            equalized ones.
        advance: Called with (done, total) after each step.

    Raises:
        CalibrationError: If there are fewer than 10 samples.
        QuantizationError: If there is nothing to quantize, or the loss is NaN or infinite (the step
            is named).
    """
    module, inputs = spec.module, tuple(item.name for item in spec.inputs)
    if module is None or set(spec.compare.values()) != {Compare.ROWS} or len(spec.outputs) > 1:
        raise QuantizationError(
            "Distillation trains encoders from their PyTorch modules: expected a module with one "
            "output, an embedding."
        )
    targets = _teach(teacher or module, inputs, calibration)
    first = next(_rows(calibration()))
    student = FakeQuantized(
        module,
        ranges,
        [torch.from_numpy(first[name]) for name in inputs],
        keep=keep,
        symmetric=activations == "int8",
    )
    held = _hold_back(len(targets))
    judge = _Judge(student.module, inputs, calibration, targets, held)
    best = before = judge()
    kept, at = _snapshot(student), 0
    _require_finite(before, 0)
    trainee = _Trainee(student, config)
    batches = _batches(calibration, len(targets), held, config)
    every = max(1, config.steps // _CHECKS)
    for step in range(1, config.steps + 1):
        rows, numbers = next(batches)
        trainee.update(_embed(student.module, inputs, rows), targets, numbers, step)
        if step % every == 0 or step == config.steps:
            distance = judge()
            _require_finite(distance, step)
            if distance < best:
                best, kept, at = distance, _snapshot(student), step
            elif not at and distance > _THROWN_BACK * before and step < config.steps:
                trainee = trainee.gentler(kept[0], config.steps - step)
        if advance is not None:
            advance(step, config.steps)
    weights, learned = kept
    return Distilled(
        spec=replace(spec, module=with_weights(module, weights)),
        ranges=learned,
        loss_before=before,
        loss_after=best,
        step=at,
        samples=len(targets) - len(held),
        held_back=len(held),
        untrained=student.untouched,
    )


class _Trainee:
    """The student's parameters and their optimizer."""

    def __init__(self, student: FakeQuantized, config: Distillation) -> None:
        self._student = student
        self._config = config
        weights = [one for one in student.weights.values() if one.is_floating_point()]
        steps = [one for quantizer in student.quantizers for one in quantizer.parameters()]
        self._steps = [(one, one.detach().clone()) for one in steps]
        for parameter in weights:
            parameter.requires_grad = True
        rate = config.learning_rate
        self._adam = torch.optim.Adam(
            [
                {"params": weights, "lr": rate},
                {"params": [s for s in steps if s.requires_grad], "lr": rate * _QUANTIZER_RATE},
            ]
        )
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._adam, config.steps)

    def update(
        self, embeddings: torch.Tensor, targets: Array, numbers: Sequence[int], step: int
    ) -> None:
        """Move every parameter once, for a batch whose row i is sample `numbers[i]`."""
        expected = torch.from_numpy(targets[list(numbers)])
        loss = self._loss(embeddings, expected)
        _require_finite(float(loss.detach()), step)
        self._adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._adam.step()
        self._schedule.step()

    def gentler(self, weights: Mapping[str, torch.Tensor], steps: int) -> _Trainee:
        """Return to the start with a smaller learning rate.

        Args:
            weights: As they were at the start.
            steps: How many are left.
        """
        with torch.no_grad():
            for name, one in self._student.weights.items():
                one.copy_(weights[name])
            for step, start in self._steps:
                step.copy_(start)
        rate = self._config.learning_rate * _GENTLER
        return _Trainee(self._student, replace(self._config, learning_rate=rate, steps=steps))

    def _loss(self, embeddings: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        loss = embeddings.new_zeros(())
        if self._config.loss != "contrastive":
            loss = loss + joint_embedding_loss(embeddings, expected) / len(expected)
        if self._config.loss != "joint-embedding":
            loss = loss + contrastive_loss(embeddings, expected, self._config.temperature)
        return loss


class _Judge:
    """Distance of student and teacher on held-back samples."""

    def __init__(
        self,
        module: nn.Module,
        inputs: Sequence[str],
        calibration: Feeds,
        targets: Array,
        held: frozenset[int],
    ) -> None:
        self._module = module
        self._inputs = inputs
        self._rows = [row for number, row in enumerate(_rows(calibration())) if number in held]
        self._expected = torch.from_numpy(targets[sorted(held)])

    def __call__(self) -> float:
        """Return the mean squared distance."""
        size = 32
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(self._rows), size):
                part = slice(start, start + size)
                got = _embed(self._module, self._inputs, self._rows[part])
                total += float(joint_embedding_loss(got, self._expected[part]))
        return total / len(self._rows)


def _teach(teacher: nn.Module, inputs: Sequence[str], calibration: Feeds) -> Array:
    """Return the teacher's embedding of every sample, (N, D) float32."""
    found: list[Array] = []
    with torch.no_grad():
        for feed in calibration():
            rows = teacher.eval()(*(torch.from_numpy(feed[name]) for name in inputs))
            found.append(rows.numpy())
    samples = sum(len(rows) for rows in found)
    if samples < _FEWEST:
        raise CalibrationError(
            f"Distillation: got {samples} calibration samples, expected {_FEWEST} or more (a few "
            "hundred do well): it trains on some and validates on others. Add images or texts."
        )
    targets = np.concatenate(found)
    if not np.isfinite(targets).all():
        raise QuantizationError(
            "Distillation: the fp32 model gives NaN or infinite embeddings on the calibration "
            "data. Check the data and the source model."
        )
    return targets


def _hold_back(samples: int) -> frozenset[int]:
    """Return the indices of validation samples, spread evenly over the data."""
    count = min(samples // _HELD_SHARE, _HELD_MOST)
    return frozenset(int((index + 0.5) * samples / count) for index in range(count))


def _rows(feeds: Iterable[Row]) -> Iterator[Row]:
    """Yield feeds of one sample."""
    for feed in feeds:
        size = len(next(iter(feed.values())))
        for index in range(size):
            yield {name: array[index : index + 1] for name, array in feed.items()}


def _batches(
    calibration: Feeds, samples: int, held: frozenset[int], config: Distillation
) -> Iterator[tuple[list[Row], list[int]]]:
    """Yield training rows and their indices endlessly, reshuffled each round.

    No sample is twice in a batch, so the last few of a round wait for another one.
    """
    rng = np.random.default_rng(config.seed)
    size = min(config.batch_size, samples - len(held))
    while True:
        waiting: list[tuple[Row, int]] = []
        read = 0
        for number, row in enumerate(_rows(calibration())):
            read += 1
            if number in held:
                continue
            # A copy: a row that is only a view keeps its whole feed in memory.
            waiting.append(({name: array.copy() for name, array in row.items()}, number))
            if len(waiting) >= _SHUFFLED_BATCHES * size:
                chosen, waiting = _draw(waiting, size, rng)
                yield [row for row, _ in chosen], [number for _, number in chosen]
        if read != samples:
            raise CalibrationError(
                f"Distillation: the calibration data gave {samples} samples when it was read first "
                f"and {read} now. Pass a function that starts the same stream each time."
            )
        while len(waiting) >= size:
            chosen, waiting = _draw(waiting, size, rng)
            yield [row for row, _ in chosen], [number for _, number in chosen]


def _draw(
    waiting: list[tuple[Row, int]], size: int, rng: np.random.Generator
) -> tuple[list[tuple[Row, int]], list[tuple[Row, int]]]:
    """Split off `size` random samples of the buffer."""
    drawn = rng.permutation(len(waiting))
    chosen = [waiting[index] for index in drawn[:size]]
    return chosen, [waiting[index] for index in sorted(drawn[size:])]


def _embed(module: nn.Module, inputs: Sequence[str], rows: Sequence[Row]) -> torch.Tensor:
    """Return the embeddings of rows, (B, D), batched by shape."""
    together: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index, row in enumerate(rows):
        together.setdefault(tuple(row[name].shape for name in inputs), []).append(index)
    parts, order = [], []
    # The weights are rounded once for all of them.
    with parametrize.cached():
        for members in together.values():
            feed = [
                torch.from_numpy(np.concatenate([rows[index][name] for index in members]))
                for name in inputs
            ]
            parts.append(module(*feed))
            order.extend(members)
    back = torch.from_numpy(np.argsort(np.array(order)))
    return torch.cat(parts)[back]


def _snapshot(student: FakeQuantized) -> tuple[dict[str, torch.Tensor], dict[str, Range]]:
    weights = {name: one.detach().clone() for name, one in student.weights.items()}
    return weights, student.ranges()


def _require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise QuantizationError(
            f"Distillation: the loss is {loss} at step {step}. Lower the learning rate, or check "
            "the calibration data and the ranges."
        )
