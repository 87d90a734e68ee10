"""PrototypeBank: labels taught by example on the device, without torch or a new engine."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmedge.bundle.kinds.embedding import EMBEDDING
from mmedge.errors import InputError, SpaceMismatchError
from mmedge.files.safetensors_file import read_safetensors, write_safetensors
from mmedge.models.features import Features
from mmedge.models.prototypes import Accuracy, Base, Prototypes, measure_base
from mmedge.specs import Array, Float32Array, Modality, did_you_mean

if TYPE_CHECKING:
    from mmedge.models.embedding import EmbeddingModel, Images

__all__ = ["Answer", "Outlier", "PrototypeBank"]

_FORMAT = "mmedge-bank-1"
_BASE = ("base_mean", "base_whitening", "base_threshold")
_MAX_FRAMES = 100_000


@dataclass(frozen=True, slots=True)
class Answer:
    """The label of one sample.

    Attributes:
        label: The taught label; None if the sample is like none of them.
        nearest: The nearest label, however far it is.
        similarity: Whitened cosine with it, -1 to 1; a label is given from the bank's threshold on.
    """

    label: str | None
    nearest: str
    similarity: float


@dataclass(frozen=True, slots=True)
class Outlier:
    """A taught frame that looks like another label.

    Attributes:
        label: As which it was taught.
        frame: Its name: a path, or "frame 3".
        nearest: The label that it is nearest to without it.
    """

    label: str
    frame: str
    nearest: str

    def __str__(self) -> str:
        return f"{self.frame} was taught as '{self.label}' and looks like '{self.nearest}'"


class PrototypeBank:
    """Labels taught by example, read from the tap of an encoder.

    bank = PrototypeBank.create("mugs", on=clip)
    bank.add("my mug", frames)
    bank(clip.extract(frame))[0].label  # None for what was not taught

    A label is the mean of its frames, whitened by the spread within labels: of known classes
    (`base`), or else of the taught ones. Safe for several threads; a call sees one whole state.
    Made by `create` and `load`.
    """

    def __init__(
        self,
        name: str,
        on: EmbeddingModel,
        tap: str,
        space: str,
        state: Prototypes,
    ) -> None:
        self.name = name
        self.tap = tap
        self.space = space
        self._on = on
        self._state = state
        self._lock = threading.Lock()

    @classmethod
    def create(
        cls,
        name: str,
        *,
        on: EmbeddingModel,
        tap: str = EMBEDDING,
        base: Mapping[str, Images] | None = None,
    ) -> PrototypeBank:
        """Return an empty bank.

        Args:
            name: For people.
            on: The image encoder that it reads.
            tap: Tap of the encoder; patches are averaged.
            base: Images by class of other things than will be taught, some dozens each, to measure
                how much one thing varies. None takes the taught frames, which needs several of
                each.

        Raises:
            InputError: If the encoder has no such tap, or `base` has fewer than two classes of two
                images.
        """
        space = _space(on, tap)
        measured = None
        if base is not None:
            rows = {label: _vectors(on.extract(images), tap) for label, images in base.items()}
            measured = measure_base(list(rows.values()))
        return cls(name, on, tap, space, Prototypes.none(measured))

    @property
    def labels(self) -> tuple[str, ...]:
        """The taught labels, in the order in which they came."""
        return self._state.labels

    @property
    def counts(self) -> Mapping[str, int]:
        """Taught frames by label."""
        state = self._state
        counts = np.bincount(state.owners, minlength=len(state.labels))
        return dict(zip(state.labels, counts.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self._state.owners)

    def add(
        self, label: str, frames: Images | Features, *, names: Sequence[str] | None = None
    ) -> None:
        """Teach a label, or more frames of one that is taught.

        Args:
            label: What the frames show.
            frames: Images as for encode_image, or their features.
            names: A name for each, for messages; None numbers them.

        Raises:
            InputError: If the label is empty, the names are too few, or a frame is taught already.
            ImageError: If a frame cannot be read.
            SpaceMismatchError: If features are of another encoder.
        """
        if not isinstance(label, str) or not label.strip():
            raise InputError(f"Label: got {label!r}, expected a text that is not empty.")
        features = frames if isinstance(frames, Features) else self._on.extract(frames)
        rows = self._rows(features)
        with self._lock:
            state = self._state
            count = self.counts.get(label, 0)
            given = names or [f"frame {count + at + 1}" for at in range(len(rows))]
            if len(given) != len(rows):
                raise InputError(f"names: got {len(given)}, expected {len(rows)}, one for a frame.")
            if len(state.owners) + len(rows) > _MAX_FRAMES:
                raise InputError(f"A bank holds at most {_MAX_FRAMES} frames. Teach fewer.")
            seen: dict[bytes, str] = {}
            for row, name in zip(rows, given, strict=True):
                if (at := state.position(row)) is not None:
                    raise InputError(
                        f"{name} is taught already, as '{state.labels[state.owners[at]]}' "
                        f"({state.names[at]}). Remove that label first, or leave it out."
                    )
                if (key := row.tobytes()) in seen:
                    raise InputError(f"{name} is the same image as {seen[key]}. Leave it out.")
                seen[key] = name
            self._state = state.with_rows(label, rows, list(given))

    def remove(self, label: str) -> None:
        """Forget a label.

        Raises:
            InputError: If it is not taught.
        """
        with self._lock:
            if label not in self._state.labels:
                raise InputError(
                    f"Label '{label}' is not taught, only {list(self.labels)}."
                    f"{did_you_mean(label, self.labels)}"
                )
            self._state = self._state.without(label)

    def __call__(self, features: Features) -> list[Answer]:
        """Return the label of every sample.

        Args:
            features: From `extract` of the encoder.

        Raises:
            InputError: If nothing is taught.
            SpaceMismatchError: If they are of another encoder or tap.
        """
        state = self._state
        if not state.labels:
            raise InputError(f"Bank '{self.name}' is empty. Teach it: bank.add('my mug', frames).")
        if len(state.labels) == 1 and state.base is None:
            raise InputError(
                f"Bank '{self.name}' has one label, '{state.labels[0]}', and no base: everything "
                "would be it. Teach another label, or create the bank with base=."
            )
        similarities = state.similarities(self._rows(features))
        best = similarities.argmax(axis=1)
        return [
            Answer(
                state.labels[at] if row[at] >= state.threshold else None,
                state.labels[at],
                float(row[at]),
            )
            for at, row in zip(best, similarities, strict=True)
        ]

    @property
    def threshold(self) -> float:
        """Similarity below which a sample is of no label; -1 where the two overlap wholly.

        It is where the taught frames, each left out, are separated best from those of other labels;
        with one frame a label, where classes of the base are.
        """
        return self._state.threshold if self._state.labels else -1.0

    @property
    def measurable(self) -> bool:
        """Whether there are two labels and several frames of one, which the accuracy takes."""
        return self._state.measurable

    @property
    def accuracy(self) -> Accuracy:
        """Leave-one-out accuracy: each frame is named by a bank that was not taught it.

        Raises:
            InputError: With fewer than two labels, or one frame each.
        """
        return self._state.leave_one_out()[0]

    @property
    def outliers(self) -> tuple[Outlier, ...]:
        """Taught frames that look like another label, each judged without itself.

        None where the accuracy cannot be measured.
        """
        state = self._state
        if not state.measurable:
            return ()
        nearest = state.leave_one_out()[1]
        return tuple(
            Outlier(state.labels[owner], name, state.labels[other])
            for owner, name, other in zip(state.owners, state.names, nearest, strict=True)
            if other not in (owner, -1)
        )

    def save(self, path: Path | str) -> None:
        """Write the bank, atomically: a reader sees the old file or the new one.

        Args:
            path: A safetensors file, NAME.bank.

        Raises:
            InputError: If it is larger than what `load` reads.
            StorageError: If the disk is full or the place cannot be written.
        """
        state = self._state
        arrays: dict[str, Array] = {"vectors": state.vectors, "owners": state.owners}
        if (base := state.base) is not None:
            values = (base.mean, base.whitening, np.array(base.threshold, np.float64))
            arrays |= dict(zip(_BASE, values, strict=True))
        about = {
            "format": _FORMAT, "name": self.name, "tap": self.tap, "space": self.space,
            "labels": json.dumps(state.labels),  # in ASCII: file names need not be valid Unicode
            "frames": json.dumps(state.names),
        }  # fmt: skip
        write_safetensors(Path(path), arrays, about)

    @classmethod
    def load(cls, path: Path | str, *, on: EmbeddingModel) -> PrototypeBank:
        """Read a bank.

        Args:
            path: From `save`.
            on: The encoder that it was taught on.

        Raises:
            InputError: If it is no bank, or damaged.
            SpaceMismatchError: If it was taught on another encoder or tap.
        """
        arrays, about = read_safetensors(Path(path), error=InputError)
        name, tap, space, state = _checked(path, arrays, about)
        if (expected := on.taps.get(Modality.IMAGE, {}).get(tap)) != space:
            raise SpaceMismatchError(
                f"{path} was taught on '{tap}' of {space}, but the encoder's is {expected}. Load "
                "the encoder that it was taught on, or teach it again."
            )
        return cls(name, on, tap, space, state)

    def reload(self, path: Path | str, *, margin: float = 0.02) -> None:
        """Take another state of this bank between two calls, if it is not worse.

        Args:
            path: From `save`; taught on the same encoder and tap.
            margin: How much of the leave-one-out accuracy may be lost; not checked where that of
                this bank cannot be measured.

        Raises:
            InputError: If it is no bank, is empty, or loses more, or `margin` is NaN; the bank
                stays as it was.
            SpaceMismatchError: If it was taught on another encoder or tap.
        """
        if math.isnan(margin):
            raise InputError("margin: got NaN, expected a share of the accuracy, such as 0.02.")
        new = PrototypeBank.load(path, on=self._on)
        if new.space != self.space:
            raise SpaceMismatchError(
                f"{path} was taught on {new.space}, this bank on {self.space}. Load it as a bank "
                "of its own."
            )
        if not new.labels:
            raise InputError(f"{path} is empty. Teach it before it is taken.")
        with self._lock:
            if self._state.measurable:
                before = self._state.leave_one_out()[0]
                after = new.accuracy
                if after.value < before.value - margin:
                    named = "; ".join(map(str, new.outliers[:3]))
                    raise InputError(
                        f"{path}: leave-one-out accuracy {after}, expected at least "
                        f"{before.value - margin:.3f} (now {before}). The bank stays as it was."
                        + (f" Look at: {named}." if named else "")
                    )
            self._state, self.name = new._state, new.name

    def __repr__(self) -> str:
        shown = ", ".join(f"{label} ({count})" for label, count in self.counts.items())
        return f"<PrototypeBank {self.name} on {self.tap}: {shown or 'empty'}>"

    def _rows(self, features: Features) -> Float32Array:
        if features.modality is not Modality.IMAGE or features.spaces.get(self.tap) != self.space:
            raise SpaceMismatchError(
                f"Bank '{self.name}' reads '{self.tap}' of {self.space}, but got "
                f"{features.modality.value} features of {dict(features.spaces)}. Extract them with "
                "the encoder that it was taught on."
            )
        rows = _vectors(features, self.tap)
        if rows.shape[1] != (expected := self._state.width or rows.shape[1]):
            raise InputError(
                f"Bank '{self.name}' holds vectors of {expected} numbers, but '{self.tap}' of the "
                f"encoder has {rows.shape[1]}: it is damaged. Teach it again."
            )
        return rows


def _space(on: EmbeddingModel, tap: str) -> str:
    taps = on.taps.get(Modality.IMAGE, {})
    if tap not in taps:
        raise InputError(
            f"Tap '{tap}': the image encoder has {list(taps)}. Convert it with --taps {tap}, or "
            "name one of these."
        )
    return taps[tap]


def _vectors(features: Features, tap: str) -> Float32Array:
    """Return (N, D) float32: the embedding, or the mean of the patches."""
    array = features[tap]
    rows: Float32Array = array if array.ndim == 2 else array.mean(axis=1)
    return rows.astype(np.float32, copy=False)


def _checked(
    path: Path | str, arrays: Mapping[str, Array], about: Mapping[str, str]
) -> tuple[str, str, str, Prototypes]:
    """Return name, tap, space and prototypes of a file, each checked."""
    wrong = InputError(f"{path} is no bank, or a damaged one. Teach it again.")
    if about.get("format") != _FORMAT or {"vectors", "owners"} - arrays.keys():
        raise wrong
    try:
        labels, names = (json.loads(about[key]) for key in ("labels", "frames"))
        name, tap, space = (about[key] for key in ("name", "tap", "space"))
    except (KeyError, ValueError, RecursionError) as error:
        raise wrong from error
    texts = isinstance(labels, list) and isinstance(names, list)
    if not texts or not all(isinstance(each, str) for each in (*labels, *names)):
        raise wrong
    vectors, owners = arrays["vectors"], arrays["owners"]
    fits = vectors.ndim == 2 and owners.shape == (len(vectors),) == (len(names),)
    if not fits or vectors.dtype != np.float32 or owners.dtype != np.int64:
        raise wrong
    sound = np.isfinite(vectors).all() and len(set(labels)) == len(labels)
    if not sound or sorted(set(owners.tolist())) != list(range(len(labels))):
        raise wrong
    base = None
    if any(key in arrays for key in _BASE):
        if not all(key in arrays for key in _BASE):
            raise wrong
        mean, whitening, threshold = (arrays[key] for key in _BASE)
        width = vectors.shape[1] if labels else len(whitening) if whitening.ndim else 0
        if (mean.shape, whitening.shape, threshold.shape) != ((width,), (width, width), ()):
            raise wrong
        if not mean.dtype == whitening.dtype == np.float32 or threshold.dtype != np.float64:
            raise wrong
        if not all(np.isfinite(arrays[key]).all() for key in _BASE):
            raise wrong
        base = Base(mean, whitening, float(threshold))
    return name, tap, space, Prototypes(tuple(labels), vectors, owners, tuple(names), base)
