"""Prototypes: means of whitened vectors, and what is nearest to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmedge.errors import InputError
from mmedge.specs import Array, Float32Array

__all__ = ["Accuracy", "Base", "Prototypes", "measure_base"]

_Z95 = 1.959964
_FOLDS = 5  # in which a whitening is fitted for the leave-one-out accuracy
_SMALLEST = 1e-12  # of a norm or a variance that is divided by


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A share of right answers with its 95 % interval (Wilson).

    Attributes:
        right: Samples answered right.
        count: Samples.
    """

    right: int
    count: int

    @property
    def value(self) -> float:
        """Right over all."""
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end."""
        n, p, z2 = self.count, self.value, _Z95**2
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} ({low:.3f} to {high:.3f}, {self.count} frames)"


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """How much one thing varies.

    Attributes:
        mean: (D,) float32, of all vectors.
        whitening: (D, D) float32; the spread within classes is the identity behind it.
        threshold: Similarity to a prototype of one frame from which a sample is of its class.
    """

    mean: Float32Array
    whitening: Float32Array
    threshold: float


def measure_base(classes: Sequence[Float32Array]) -> Base:
    """Measure the spread within classes of known things.

    Args:
        classes: (N, D) float32 of each class.

    Raises:
        InputError: With fewer than two classes of two vectors.
    """
    if len(classes) < 2 or min(map(len, classes)) < 2:
        raise InputError(
            f"base: got classes of {[len(rows) for rows in classes]} images, expected two or more "
            "of two or more each."
        )
    mean, whitening = _spread(classes)
    # The threshold is that of classes which the whitening has not seen: half of them each time.
    similar: list[Array] = []
    others: list[Array] = []
    for held, rest in ((classes[::2], classes[1::2]), (classes[1::2], classes[::2])):
        if len(held) < 2:
            continue
        centre, factor = _spread(rest)
        rows = [_unit((one - centre) @ factor) for one in held]
        for at, own in enumerate(rows):
            similar.append(own[1:] @ own[0])
            others += [own[1:] @ other[0] for to, other in enumerate(rows) if to != at]
    threshold = _threshold(similar, others) if similar else -1.0
    return Base(mean.astype(np.float32), whitening.astype(np.float32), threshold)


def _spread(classes: Sequence[Array]) -> tuple[Array, Array]:
    """Return mean (D,) and whitening (D, D) of the spread within classes.

    The covariance is shrunk towards a multiple of the identity by the oracle approximating
    shrinkage (Chen, Wiesel, Eldar, Hero, 2010), so that few samples do.
    """
    rows = [np.asarray(each, np.float64) for each in classes]
    centre = np.mean([each.mean(axis=0) for each in rows], axis=0)
    residuals = np.concatenate([each - each.mean(axis=0) for each in rows])
    count = max(len(residuals) - len(rows), 1)
    width = residuals.shape[1]
    covariance = residuals.T @ residuals / count
    trace, square = float(np.trace(covariance)), float((covariance**2).sum())
    if trace < _SMALLEST:  # one frame of each, or the same ones
        return centre, np.eye(width)
    over = (count + 1 - 2 / width) * (square - trace**2 / width)
    share = 1.0 if over <= 0 else min(1.0, ((1 - 2 / width) * square + trace**2) / over)
    covariance = (1 - share) * covariance + share * trace / width * np.eye(width)
    values, vectors = np.linalg.eigh(covariance)
    floor = trace / width * 1e-6
    return centre, (vectors / np.sqrt(np.maximum(values, floor))) @ vectors.T


def _unit(rows: Array) -> Array:
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    units: Array = rows / np.maximum(norms, _SMALLEST)
    return units


def _threshold(similar: Sequence[Array], others: Sequence[Array]) -> float:
    """Return the similarity that tells samples of a class from others best, both weighing alike."""
    own, other = np.sort(np.concatenate(similar)), np.sort(np.concatenate(others))
    if not own.size or not other.size:
        return -1.0
    steps = np.unique(np.concatenate([own, other]))
    kept = 1 - np.searchsorted(own, steps, side="left") / len(own)
    refused = np.searchsorted(other, steps, side="left") / len(other)
    return float(steps[int((kept + refused).argmax())])


@dataclass(frozen=True)
class Prototypes:
    """Taught vectors, immutable.

    Attributes:
        labels: L labels.
        vectors: (N, D) float32, as the encoder gave them.
        owners: (N,) int64, the label of each.
        names: Of each.
        base: Spread of known classes; None takes that of the taught ones.
    """

    labels: tuple[str, ...]
    vectors: Float32Array
    owners: Array
    names: tuple[str, ...]
    base: Base | None

    @classmethod
    def none(cls, base: Base | None) -> Prototypes:
        """Return those of an empty bank."""
        return cls((), np.empty((0, 0), np.float32), np.empty(0, np.int64), (), base)

    def with_rows(self, label: str, rows: Float32Array, names: Sequence[str]) -> Prototypes:
        """Return these and more vectors of a label."""
        labels = self.labels if label in self.labels else (*self.labels, label)
        owners = np.full(len(rows), labels.index(label), np.int64)
        vectors = np.concatenate([self.vectors, rows]) if len(self.vectors) else rows.copy()
        joined = np.concatenate([self.owners, owners])
        return Prototypes(labels, vectors, joined, (*self.names, *names), self.base)

    def without(self, label: str) -> Prototypes:
        """Return these without a label."""
        at = self.labels.index(label)
        kept = self.owners != at
        owners = self.owners[kept] - (self.owners[kept] > at)
        names = tuple(name for name, keep in zip(self.names, kept, strict=True) if keep)
        labels = (*self.labels[:at], *self.labels[at + 1 :])
        return Prototypes(labels, self.vectors[kept], owners, names, self.base)

    def position(self, row: Float32Array) -> int | None:
        """Return the position of an equal vector, None if there is none."""
        if not len(self.vectors):
            return None
        found = np.flatnonzero((self.vectors == row).all(axis=1))
        return int(found[0]) if found.size else None

    def _frame(self, kept: Array | None = None) -> tuple[Array, Array]:
        """Return mean (D,) and whitening (D, D): the base's, or of some of the vectors."""
        if self.base is not None:
            return self.base.mean.astype(np.float64), self.base.whitening.astype(np.float64)
        used = np.ones(len(self.owners), np.bool_) if kept is None else kept
        classes = [self.vectors[used & (self.owners == at)] for at in range(len(self.labels))]
        mean, whitening = _spread([rows for rows in classes if len(rows)])
        return (mean if len(classes) > 1 else np.zeros_like(mean)), whitening

    def _whitened(self, frame: tuple[Array, Array]) -> tuple[Array, Array]:
        """Return the whitened vectors (N, D) and their sums by label (L, D)."""
        rows = (self.vectors.astype(np.float64) - frame[0]) @ frame[1]
        sums = np.zeros((len(self.labels), rows.shape[1]))
        np.add.at(sums, self.owners, rows)
        return rows, sums

    @cached_property
    def _fitted(self) -> tuple[tuple[Array, Array], Array]:
        """Mean and whitening, and the unit prototypes (L, D)."""
        frame = self._frame()
        return frame, _unit(self._whitened(frame)[1])

    def similarities(self, rows: Float32Array) -> Array:
        """Return the cosine of whitened vectors with each prototype: (M, L) float64."""
        (mean, whitening), prototypes = self._fitted
        made: Array = _unit((rows.astype(np.float64) - mean) @ whitening) @ prototypes.T
        return made

    @cached_property
    def _left_out(self) -> tuple[Array, Array, Array]:
        """Of each vector, without itself: cosine with its own, with the best other, which (N,).

        Without a base the whitening is fitted in folds, so that it has not seen the vector either.
        """
        counts = np.bincount(self.owners, minlength=len(self.labels))
        folds = 1 if self.base is not None else min(_FOLDS, int(counts.max()))
        turn = np.empty(len(self.owners), np.int64)
        for at, count in enumerate(counts):
            turn[self.owners == at] = np.arange(count) % folds
        own, other = (np.full(len(turn), np.nan) for _ in range(2))
        best = np.zeros(len(turn), np.int64)
        for fold in range(folds):
            held = turn == fold
            rows, sums = self._whitened(self._frame(None if folds == 1 else ~held))
            owners, units = self.owners[held], _unit(rows[held])
            alone = _unit(sums[owners] - rows[held])
            own[held] = np.where(counts[owners] > 1, (units * alone).sum(axis=1), np.nan)
            others = units @ _unit(sums).T
            others[np.arange(len(owners)), owners] = -np.inf
            best[held], other[held] = others.argmax(axis=1), others.max(axis=1)
        return own, other, best

    @cached_property
    def threshold(self) -> float:
        """Similarity below which a sample is of no label.

        Of the taught frames where two labels have several, else that of the base; -1, which
        nothing is below, without either.
        """
        own, other, _ = self._left_out if len(self.labels) > 1 else (np.empty(0),) * 3
        known = np.isfinite(own)
        if len(set(self.owners[known].tolist() if known.size else [])) > 1:
            return _threshold([own[known]], [other[known]])
        return -1.0 if self.base is None else self.base.threshold

    @property
    def width(self) -> int:
        """D of the vectors; 0 where there are none, and no base."""
        return int(self.vectors.shape[1]) if self.base is None else len(self.base.mean)

    @property
    def measurable(self) -> bool:
        """Whether there are two labels, and several frames of one."""
        return len(self.labels) > 1 and bool((np.bincount(self.owners) > 1).any())

    def leave_one_out(self) -> tuple[Accuracy, Array]:
        """Return the accuracy without each frame itself, and what each then is nearest to.

        Frames that are their label's only one are not counted; their place is -1.

        Raises:
            InputError: With fewer than two labels, or one frame each.
        """
        if not self.measurable:
            raise InputError(
                f"Leave-one-out accuracy needs two labels and several frames of one, got "
                f"{len(self.labels)} labels and {len(self.owners)} frames. Teach more."
            )
        own, other, best = self._left_out
        counted = np.isfinite(own)
        nearest = np.where(own >= other, self.owners, best)
        right = int((nearest[counted] == self.owners[counted]).sum())
        return Accuracy(right, int(counted.sum())), np.where(counted, nearest, -1)
