"""Head: a graph over taps of encoders and arrays of sensors, bound to its encoders."""

from __future__ import annotations

import threading
import time as clock
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from mmedge.bundle.kinds.heads import HeadInput, HeadSection
from mmedge.bundle.manifest import Role
from mmedge.bundle.opening import Bundle
from mmedge.bundle.tensors import InputEntry
from mmedge.errors import InputError, IntegrityError, ShapeError, SpaceMismatchError
from mmedge.files.safetensors_file import read_safetensors
from mmedge.models.features import Features
from mmedge.specs import Array, Modality, did_you_mean

if TYPE_CHECKING:
    from mmedge.models.embedding import EmbeddingModel

__all__ = ["Given", "Head", "HeadOutput", "Stamped", "check_binding", "head_in", "learned_defaults"]


@dataclass(frozen=True, slots=True, eq=False)
class Stamped:
    """An array of a sensor and its time.

    Attributes:
        array: With or without the batch axis.
        time: In seconds of the clock that the other inputs have.
    """

    array: Array
    time: float


Given: TypeAlias = (
    Features | str | Sequence[str] | Mapping[str, Features | Stamped | Array | str | Sequence[str]]
)
"""Features or texts, which find their inputs themselves; or inputs by name."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadOutput:
    """Outputs of a head for N samples.

    Attributes:
        outputs: By name, (N, ...).
        labels: Names along the last axis of the first; empty if unnamed.
        left_out: Why an input was left out or replaced by its default, by input.
        latency_ms: Wall time of the call, encoding of its texts included.
    """

    outputs: Mapping[str, Array]
    labels: tuple[str, ...]
    left_out: Mapping[str, str]
    latency_ms: float

    def __getitem__(self, name: str) -> Array:
        if name not in self.outputs:
            raise InputError(f"No output '{name}', expected one of {list(self.outputs)}.")
        return self.outputs[name]

    @property
    def scores(self) -> Array:
        """The first output."""
        return next(iter(self.outputs.values()))

    @property
    def best(self) -> tuple[str, ...]:
        """The label of the largest score of each sample.

        Raises:
            InputError: If the head names no labels.
        """
        if not self.labels:
            raise InputError("This head has no labels. Read its scores.")
        return tuple(self.labels[at] for at in self.scores.argmax(axis=-1).reshape(-1))


@dataclass(frozen=True, slots=True, eq=False)
class _Fed:
    """An array for an input, with its mask and time."""

    array: Array
    mask: Array | None
    time: float | None


class Head:
    """A head, bound to the encoders whose taps it reads.

    Made by `mmedge.load_head`, or found in `heads` of a model whose bundle holds it. Safe for
    several threads.

    Args:
        name: Of the head.
        section: What it reads and means.
        role: Its graph's inputs and bounds.
        run: Runs its graph.
        defaults: Arrays that stand for missing inputs, without the batch axis.
        encoders: What it is bound to; checked by check_binding.
    """

    def __init__(
        self,
        name: str,
        section: HeadSection,
        role: Role,
        run: Callable[[Mapping[str, Array]], dict[str, Array]],
        defaults: Mapping[str, Array],
        encoders: Sequence[EmbeddingModel],
    ) -> None:
        self.name = name
        self.section = section
        self._entries = {entry.name: entry for entry in role.inputs}
        self._axes = role.axes
        self._run = run
        self._defaults = defaults
        self._encoders = tuple(encoders)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names along the last axis of the scores; empty if unnamed."""
        return self.section.labels

    @property
    def counts(self) -> Mapping[str, int]:
        """How often the head ran, and an input was left out: calls, sonar missing, sonar skewed."""
        with self._lock:
            return dict(self._counts)

    def __call__(self, *given: Given) -> HeadOutput:
        """Run the head.

        Args:
            given: Features from `extract`, texts, or a mapping from the head's inputs to features,
                texts, arrays or Stamped arrays. One sample beside several of another input stands
                for all of them.

        Raises:
            SpaceMismatchError: If features are of another encoder, tap or preprocessing.
            InputError: If an input is missing, unknown, too old, not finite or of another shape,
                and the head does not do without it.
            BackendError: If the engine fails, or the model is closed.
        """
        started = clock.perf_counter()
        fed = self._assign(given)
        left_out = self._skewed(fed)
        for name in left_out:
            del fed[name]
        left_out |= {name: "missing" for name in self.section.inputs if name not in fed | left_out}
        for name, reason in left_out.items():
            self._require_policy(name, reason)
        feed = self._feed(fed)
        outputs = self._run(feed)
        with self._lock:
            self._counts["calls"] += 1
            self._counts.update(f"{name} {why.split()[0]}" for name, why in left_out.items())
        latency_ms = (clock.perf_counter() - started) * 1e3
        return HeadOutput(outputs, self.section.labels, left_out, latency_ms)

    def _assign(self, given: Sequence[Given]) -> dict[str, _Fed]:
        """Return what each input is fed, by name."""
        fed: dict[str, _Fed] = {}
        for item in given:
            if isinstance(item, Mapping):
                for name, value in item.items():
                    if name not in self.section.inputs:
                        known = list(self.section.inputs)
                        raise InputError(
                            f"Unknown input '{name}' of head {self.name}, expected some of "
                            f"{known}.{did_you_mean(name, known)}"
                        )
                    if name in fed:
                        raise InputError(
                            f"Input '{name}' of head {self.name} is given twice. Pass it once."
                        )
                    fed[name] = self._named(name, value)
                continue
            features = item if isinstance(item, Features) else self._encoded(item)
            names = [
                name
                for name, each in self.section.inputs.items()
                if each.modality is features.modality and name not in fed
            ]
            spaces = set(features.spaces.values())
            names = [n for n in names if self.section.inputs[n].space in spaces] or names
            if not names:
                raise InputError(
                    f"Head {self.name} takes no {features.modality.value} features beside what "
                    f"it has, but {list(self.section.inputs)}. Name the inputs: "
                    "head({'name': features})."
                )
            fed |= {name: self._tapped(name, features) for name in names}
        return fed

    def _named(self, name: str, value: object) -> _Fed:
        entry = self.section.inputs[name]
        if entry.tap is not None and isinstance(value, Sequence):
            value = self._encoded(value)
        if entry.tap is not None and isinstance(value, Features):
            return self._tapped(name, value)
        if entry.tap is not None:
            raise InputError(
                f"Input '{name}' of head {self.name}: got {type(value).__name__}, expected "
                f"features of {entry.space}. Pass what extract of the encoder returned."
            )
        stamped = value if isinstance(value, Stamped) else None
        spec = self._entries[name].spec()
        given = value if stamped is None else stamped.array
        try:
            array = np.asarray(None if isinstance(given, Features) else given)
        except ValueError as error:  # rows of several lengths
            raise InputError(
                f"Input '{name}' of head {self.name}: got rows of several lengths, expected an "
                f"array {spec.shape}."
            ) from error
        array = array[None] if array.ndim == len(spec.shape) - 1 else array
        if array.dtype.kind not in "biuf":
            got = array.dtype if isinstance(given, np.ndarray) else type(given).__name__
            raise InputError(
                f"Input '{name}' of head {self.name}: got {got}, expected an array of numbers."
            )
        if array.ndim != len(spec.shape) or not len(array):
            raise ShapeError(
                f"Input '{name}' of head {self.name}: got {array.shape}, expected {spec.shape}, "
                "with or without the batch axis."
            )
        with np.errstate(over="ignore", invalid="ignore"):
            cast = array.astype(spec.dtype)
        if not (np.isfinite(array).all() and np.isfinite(cast).all()):
            raise InputError(
                f"Input '{name}' of head {self.name}: holds NaN, infinity or more than "
                f"{spec.dtype} holds, expected finite values. Leave the input out where the sensor "
                "has no reading."
            )
        if cast.dtype.kind != "f" and (cast != array).any():
            raise InputError(
                f"Input '{name}' of head {self.name}: got {array.dtype} values that {spec.dtype} "
                "does not hold. Convert them first."
            )
        return _Fed(cast, None, None if stamped is None else stamped.time)

    def _tapped(self, name: str, features: Features) -> _Fed:
        entry = self.section.inputs[name]
        taps = {space: tap for tap, space in features.spaces.items()}
        if entry.space not in taps or features.modality is not entry.modality:
            raise SpaceMismatchError(_mismatch(name, entry, features.spaces))
        tap = taps[str(entry.space)]
        array, mask = features.arrays[tap], features.masks.get(tap)
        if mask is None and entry.mask is not None:
            mask = np.ones(array.shape[:2], np.bool_)
        return _Fed(array, mask if entry.mask is not None else None, features.time)

    def _encoded(self, texts: object) -> Features:
        for encoder in self._encoders:
            if Modality.TEXT in encoder.encoders:
                return encoder.extract_text(texts)  # type: ignore[arg-type]  # checked there
        raise InputError(
            f"Head {self.name}: got {type(texts).__name__}, expected features, as no encoder of "
            "texts is bound. Bind one: load_head(path, on=clip). Arrays of sensors go by name: "
            "head({'sonar': array})."
        )

    def _skewed(self, fed: Mapping[str, _Fed]) -> dict[str, str]:
        """Return the inputs that are too old beside the newest, with the reason."""
        times = [each.time for each in fed.values() if each.time is not None]
        found: dict[str, str] = {}
        for name, each in fed.items():
            most = self.section.inputs[name].max_skew_ms
            if most is None:
                continue
            if each.time is None:
                raise InputError(
                    f"Input '{name}' of head {self.name} has no time, expected one at most "
                    f"{most:g} ms older than the newest input. Pass extract(frame, time=...) or "
                    "Stamped(array, time)."
                )
            skew = (max(times) - each.time) * 1e3
            if not skew <= most:
                found[name] = f"skewed by {skew:.6g} ms, at most {most:g}"
        return found

    def _require_policy(self, name: str, reason: str) -> None:
        if self.section.inputs[name].missing == "refuse":
            entry = self.section.inputs[name]
            what = "an array of the sensor" if entry.tap is None else f"{entry.tap} features"
            raise InputError(
                f"Input '{name}' of head {self.name} is {reason}, and the head does not do without "
                f"it. Pass {what}."
            )

    def _feed(self, fed: Mapping[str, _Fed]) -> dict[str, Array]:
        counts = {name: len(each.array) for name, each in fed.items()}
        batch = max(counts.values(), default=1)
        if odd := [name for name, count in counts.items() if count not in (1, batch)]:
            raise ShapeError(
                f"Head {self.name}: got {counts} samples by input, expected 1 or {batch} of "
                f"'{odd[0]}'."
            )
        feed: dict[str, Array] = {}
        for name, entry in self.section.inputs.items():
            one = fed.get(name) or self._stand_in(name)
            feed[name] = _repeated(one.array, batch)
            self._check_shape(self._entries[name], feed[name])
            if entry.mask is not None:
                mask = np.ones(one.array.shape[:2], np.bool_) if one.mask is None else one.mask
                feed[entry.mask] = _repeated(mask, batch)
        if self.section.present is not None:
            row = [name in fed for name in self.section.marginalized]
            feed[self.section.present] = np.tile(np.array(row, np.bool_), (batch, 1))
        return feed

    def _stand_in(self, name: str) -> _Fed:
        """Return the learned default, or zeros that the input `present` marks as missing."""
        if self.section.inputs[name].missing == "default":
            return _Fed(self._defaults[name][None], None, None)
        spec = self._entries[name].spec()
        sizes = [dim if isinstance(dim, int) else self._smallest(dim) for dim in spec.shape[1:]]
        return _Fed(np.zeros((1, *sizes), spec.dtype), None, None)

    def _smallest(self, axis: str) -> int:
        return max(1, self._axes[axis].min) if axis in self._axes else 1

    def _check_shape(self, entry: InputEntry, array: Array) -> None:
        expected = entry.shape
        bounds = {d: self._axes[d].max for d in expected[1:] if d in self._axes}
        fits = array.ndim == len(expected) and all(
            got == dim if isinstance(dim, int) else got <= bounds.get(dim, got)
            for got, dim in zip(array.shape, expected, strict=True)
        )
        if not fits:
            most = ", ".join(f"{axis} at most {size}" for axis, size in bounds.items())
            raise ShapeError(
                f"Input '{entry.name}' of head {self.name}: got {array.shape}, expected "
                f"{expected}{f', {most}' if most else ''}. Pass fewer, or convert the head "
                "for more."
            )

    def __repr__(self) -> str:
        reads = ", ".join(
            f"{name}={each.tap or 'sensor'}" for name, each in self.section.inputs.items()
        )
        return f"<Head {self.name}: {reads}>"


def _repeated(array: Array, batch: int) -> Array:
    return array if len(array) == batch else np.repeat(array, batch, axis=0)


def _mismatch(name: str, entry: HeadInput, offered: Mapping[str, str]) -> str:
    shown = ", ".join(f"{tap} of {space}" for tap, space in offered.items()) or "none"
    return (
        f"Head input '{name}' reads the tap '{entry.tap}' of {entry.space}, but got taps: {shown}. "
        "Load the encoder that the head was trained on, in a variant that shares its space, "
        "converted with the same --taps."
    )


def check_binding(name: str, section: HeadSection, encoders: Sequence[EmbeddingModel]) -> None:
    """Check that encoders have the taps that a head reads, before anything runs.

    Raises:
        SpaceMismatchError: If a tap is of another encoder, preprocessing or place.
        InputError: If no encoder is of its modality, or that one was not loaded.
    """
    for each, entry in section.inputs.items():
        if entry.tap is None or entry.modality is None:
            continue
        found = [one.taps[entry.modality] for one in encoders if entry.modality in one.taps]
        if not found:
            held = [modality.value for one in encoders for modality in one.taps]
            raise InputError(
                f"Input '{each}' of head {name} reads the {entry.modality.value} modality, but got "
                f"encoders of {held}. Load a model that has one."
            )
        offered = {tap: space for taps in found for tap, space in taps.items()}
        if not any(entry.space in taps.values() for taps in found):
            raise SpaceMismatchError(_mismatch(each, entry, offered))


def learned_defaults(bundle: Bundle, section: HeadSection, role: str) -> Mapping[str, Array]:
    """Return the arrays that stand for missing inputs of a head, by input.

    Raises:
        IntegrityError: If their file is missing, damaged, or does not fit the head's inputs.
    """
    if section.defaults is None:
        return {}
    path = bundle.file(section.defaults)
    arrays = read_safetensors(path, error=IntegrityError)[0]
    specs = {entry.name: entry.spec() for entry in bundle.manifest.roles[role].inputs}
    learned: dict[str, Array] = {}
    for name in (name for name, each in section.inputs.items() if each.missing == "default"):
        shape, array = specs[name].shape[1:], arrays.get(name)
        fits = array is not None and array.ndim == len(shape) and np.isfinite(array).all()
        if (
            array is None
            or not fits
            or any(
                isinstance(ours, int) and ours != got
                for ours, got in zip(shape, array.shape, strict=True)
            )
        ):
            got = "none" if array is None else f"{array.dtype}{array.shape}"
            raise IntegrityError(
                f"{path}: default of input '{name}': got {got}, expected finite values of {shape}. "
                "Convert the head again."
            )
        learned[name] = array.astype(specs[name].dtype)
    return learned


def head_in(
    model: EmbeddingModel,
    role: str,
    section: HeadSection,
    run: Callable[[str, Mapping[str, Array]], dict[str, Array]],
) -> Head:
    """Return a head of the encoders' own bundle, bound to them.

    Args:
        model: The encoders.
        role: Of the head.
        section: What it reads and means.
        run: Runs a role.

    Raises:
        SpaceMismatchError: If it was trained on another variant of the encoders.
    """
    check_binding(role, section, (model,))
    defaults = learned_defaults(model.bundle, section, role)
    return Head(role, section, model.manifest.roles[role], partial(run, role), defaults, (model,))
