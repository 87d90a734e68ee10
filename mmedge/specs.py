"""Shared types: arrays, tensor specs, precisions, modalities, tasks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mmedge.errors import DTypeError, InputError, ShapeError

__all__ = [
    "Array",
    "Axis",
    "Compare",
    "Dim",
    "Float32Array",
    "Modality",
    "Precision",
    "State",
    "StateTensor",
    "Task",
    "TensorSpec",
    "as_dim",
    "check_bindable",
    "check_feed",
    "did_you_mean",
    "dim_size",
    "first_sample",
    "shape_of",
]

Array: TypeAlias = NDArray[Any]
Float32Array: TypeAlias = NDArray[np.float32]


class Precision(str, Enum):
    """Number format of a variant's weights and, if stated, of its arithmetic."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"


class Modality(str, Enum):
    """Modality of a role's input."""

    IMAGE = "image"
    TEXT = "text"
    AUDIO = "audio"
    VIDEO = "video"
    VECTOR = "vector"


class Task(str, Enum):
    """Task of a bundle."""

    RETRIEVAL = "retrieval"
    ZERO_SHOT_CLASSIFICATION = "zero-shot-classification"
    IMAGE_CLASSIFICATION = "image-classification"
    TEXT_GENERATION = "text-generation"
    OBJECT_DETECTION = "object-detection"
    ZERO_SHOT_OBJECT_DETECTION = "zero-shot-object-detection"


class Compare(str, Enum):
    """Comparison of an output with the reference."""

    ROWS = "rows"
    """By the cosine of vectors along the last axis: embeddings, hidden states."""
    VALUES = "values"
    """By the largest absolute difference: boxes, actions, scores."""
    TOKENS = "tokens"
    """By the index of the largest value along the last axis: logits over a vocabulary."""
    NONE = "none"
    """Not compared: state, which later calls verify."""
    UNORDERED = "unordered"
    """Not compared or verified: rows that another processor may give in another order."""


Dim: TypeAlias = int | str
"""A size of an axis: a number, the name of a dynamic axis ("batch"), or a sum of such names and
numbers ("past + sequence")."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A dynamic axis: bounds for engines, and whether it may be empty (the past at prefill).

    Attributes:
        min: Smallest size.
        opt: Usual size.
        max: Largest size.

    Raises:
        InputError: If not 0 <= min <= opt <= max and 1 <= max.
    """

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.opt <= self.max or self.max < 1:
            raise InputError(
                f"Axis: got min {self.min}, opt {self.opt}, max {self.max}, expected "
                "0 <= min <= opt <= max and 1 <= max."
            )


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of one input or output of a graph.

    Attributes:
        name: The tensor's name in the graph.
        dtype: Element type.
        shape: One entry per axis, in as_dim's spelling. The same name stands for the same size
            across all inputs of one call; a sum of names that no other axis has is a name.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Dim, ...]

    def __post_init__(self) -> None:
        dims = (as_dim(dim) if isinstance(dim, str) else dim for dim in self.shape)
        object.__setattr__(self, "shape", tuple(dims))

    def __str__(self) -> str:
        return f"{self.name} {self.dtype.name}({', '.join(map(str, self.shape))})"


@dataclass(frozen=True, slots=True)
class StateTensor:
    """A tensor passed from one call to the next.

    Attributes:
        input: The graph's input that takes it.
        output: The graph's output that gives it; None where it is made once, by `source`.
        update: `append`: the past, and the new part joined to it. `in_place`: one buffer of
            `capacity`, written at `length`. `replace`: a new value each call (a GRU, a causal
            convolution, a sliding window). `constant`: made once a sequence (cross-attention).
        axis: The axis that grows; for append and in_place.
        source: (role, output) that makes it; for constant.
    """

    input: str
    output: str | None
    update: Literal["append", "in_place", "replace", "constant"]
    axis: int | None = None
    source: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class State:
    """The state of a role: the tensors passed between its calls.

    Attributes:
        tensors: One entry for each tensor.
        length: Name of the growing axis ("past"); None where nothing grows.
        capacity: Largest length; None where nothing grows.
        batch: Name of the axis whose rows are sequences of their own.
        new: Name of the axis of a call's new positions; a graph that lacks it takes one a call.
        kept: Name of the axis of the new positions that a call has outputs for. An input (batch,
            kept), the same in every row, counts them back from the last, which is 0. None where a
            call has outputs for all.
    """

    tensors: tuple[StateTensor, ...]
    length: str | None = None
    capacity: int | None = None
    batch: str = "batch"
    new: str = "sequence"
    kept: str | None = None


def as_dim(text: str) -> Dim:
    """Return the canonical Dim: a sum with sorted names and the number last.

    What is no sum of names and numbers ("2*batch") stays as it is.
    """
    terms = [term.strip() for term in text.split("+")]
    if not all(terms) or any(mark in text for mark in "*/()-"):
        return text.strip()
    names = sorted(term for term in terms if not term.isdecimal())
    number = sum(int(term) for term in terms if term.isdecimal())
    if not names:
        return number
    return " + ".join(names + ([str(number)] if number else []))


def dim_size(dim: Dim, sizes: Mapping[str, int]) -> int | None:
    """Return the size of an axis from those of the named axes; None if unknown."""
    if isinstance(dim, int):
        return dim
    if dim in sizes:
        return sizes[dim]
    total = 0
    for term in dim.split(" + "):
        size = int(term) if term.isdecimal() else sizes.get(term)
        if size is None:
            return None
        total += size
    return total


def shape_of(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """Return a tensor's shape from the sizes of the named axes; None if unknown."""
    shape = tuple(size for dim in spec.shape if (size := dim_size(dim, sizes)) is not None)
    return shape if len(shape) == len(spec.shape) else None


def check_feed(
    inputs: tuple[TensorSpec, ...],
    feed: Mapping[str, Array],
    axes: Mapping[str, Axis] | None = None,
    known: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Check a feed against a graph's input specs.

    Args:
        inputs: The graph's input specs.
        feed: Arrays by input name.
        axes: Bounds of dynamic axes by name; one whose `min` is 0 may be empty.
        known: Sizes that axes must have, by name.

    Returns:
        The size of every dynamic axis, by its name.

    Raises:
        InputError: If an input is missing, unknown, or not an array.
        DTypeError: If a dtype differs.
        ShapeError: If a rank or a fixed axis differs, an axis is empty, or two inputs disagree on
            the size of a dynamic axis.
    """
    if feed.keys() != {spec.name for spec in inputs}:
        expected = [spec.name for spec in inputs]
        raise InputError(
            f"Inputs do not match the graph: got {sorted(feed)}, expected {expected}. "
            "Pass every input by its name and nothing else."
        )
    axes = axes or {}
    sizes = dict(known or {})
    sums: list[tuple[TensorSpec, Array, int, str]] = []
    for spec in inputs:
        array = feed[spec.name]
        if not isinstance(array, np.ndarray):
            raise InputError(
                f"Input '{spec.name}': got {type(array).__name__}, expected numpy.ndarray. "
                "Convert it with numpy.asarray."
            )
        if array.dtype != spec.dtype:
            raise DTypeError(
                f"Input '{spec.name}': got dtype {array.dtype.name}, expected {spec.dtype.name}. "
                f"Convert it with array.astype('{spec.dtype.name}')."
            )
        if array.ndim != len(spec.shape):
            raise _shape_error(spec, array, "The number of axes differs.")
        for got, expected_size in zip(array.shape, spec.shape, strict=True):
            if isinstance(expected_size, int):
                if got != expected_size:
                    raise _shape_error(
                        spec, array, "Preprocess it with mmedge.preprocess, or pass the raw frame."
                    )
            elif "+" in expected_size:  # when its names are known
                sums.append((spec, array, got, expected_size))
            elif got == 0 and (expected_size not in axes or axes[expected_size].min):
                raise _shape_error(
                    spec,
                    array,
                    f"Axis '{expected_size}' must not be empty, unless its Axis has min 0.",
                )
            elif sizes.setdefault(expected_size, got) != got:
                raise _shape_error(
                    spec, array, f"Axis '{expected_size}' is {sizes[expected_size]} elsewhere."
                )
    for spec, array, got, dim in sums:
        size = dim_size(dim, sizes)
        if got != sizes.setdefault(dim, got if size is None else size):
            raise _shape_error(spec, array, f"Axis '{dim}' is {sizes[dim]} elsewhere.")
    return sizes


def check_bindable(
    inputs: tuple[TensorSpec, ...],
    feed: Mapping[str, Array],
    axes: Mapping[str, Axis] | None = None,
) -> dict[str, int]:
    """Check arrays for use as input buffers: check_feed, and their memory layout.

    Returns:
        The size of every dynamic axis, by its name.

    Raises:
        InputError: As check_feed, and if an array is not C-contiguous and aligned.
    """
    sizes = check_feed(inputs, feed, axes)
    for name, array in feed.items():
        if not (array.flags.c_contiguous and array.flags.aligned):
            raise InputError(
                f"Input '{name}': cannot be bound, its memory is not C-contiguous and aligned. "
                "Pass numpy.ascontiguousarray(array) and write to that."
            )
    return sizes


def first_sample(inputs: Iterable[TensorSpec], feed: Mapping[str, Array]) -> dict[str, Array]:
    """Return the first sample of a feed; inputs of a fixed batch are left whole.

    Args:
        inputs: Specs of the inputs.
        feed: Arrays by input name.
    """
    return {
        spec.name: feed[spec.name][:1]
        if spec.shape and isinstance(spec.shape[0], str)
        else feed[spec.name]
        for spec in inputs
    }


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """Return " Did you mean X?" for a misspelt name, "" if none is close.

    A name that differs in case and separators alone ("INT-8") is the only one that is suggested.
    """
    names = dict.fromkeys(known)
    near = [name for name in names if _letters(name) == _letters(got)]
    near = near or difflib.get_close_matches(got.lower(), names, n=3)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


def _shape_error(spec: TensorSpec, array: Array, way_out: str) -> ShapeError:
    return ShapeError(f"Input '{spec.name}': got {array.shape}, expected {spec.shape}. {way_out}")
