"""The vocabulary that every layer shares: arrays, tensor specs, precisions, modalities, tasks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mmedge.errors import DTypeError, InputError, ShapeError

__all__ = [
    "Array",
    "Float32Array",
    "Modality",
    "Precision",
    "Task",
    "TensorSpec",
    "check_bindable",
    "check_feed",
    "did_you_mean",
]

Array: TypeAlias = NDArray[Any]
Float32Array: TypeAlias = NDArray[np.float32]


class Precision(str, Enum):
    """Number format of a variant's weights and, where it says so, of its arithmetic."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"


class Modality(str, Enum):
    """What a role takes in."""

    IMAGE = "image"
    TEXT = "text"
    AUDIO = "audio"
    VIDEO = "video"


class Task(str, Enum):
    """What a bundle can be used for."""

    RETRIEVAL = "retrieval"
    ZERO_SHOT_CLASSIFICATION = "zero-shot-classification"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of one input or output of a graph.

    Attributes:
        name: The tensor's name in the graph.
        dtype: Element type.
        shape: One entry an axis: an int is fixed, a str names a dynamic axis ("batch",
            "sequence"). The same name stands for the same size across all inputs of one call.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype.name}({', '.join(map(str, self.shape))})"


def check_feed(inputs: tuple[TensorSpec, ...], feed: Mapping[str, Array]) -> dict[str, int]:
    """Check what is about to be fed to a graph against its input specs.

    Args:
        inputs: The graph's input specs.
        feed: Arrays by input name.

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
    sizes: dict[str, int] = {}
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
            elif got == 0:
                raise _shape_error(spec, array, f"Axis '{expected_size}' must not be empty.")
            elif sizes.setdefault(expected_size, got) != got:
                raise _shape_error(
                    spec, array, f"Axis '{expected_size}' is {sizes[expected_size]} elsewhere."
                )
    return sizes


def check_bindable(inputs: tuple[TensorSpec, ...], feed: Mapping[str, Array]) -> dict[str, int]:
    """Check arrays that are to become a graph's input buffers: check_feed, and their memory.

    Returns:
        The size of every dynamic axis, by its name.

    Raises:
        InputError: As check_feed, and if an array is not C-contiguous and aligned.
    """
    sizes = check_feed(inputs, feed)
    for name, array in feed.items():
        if not (array.flags.c_contiguous and array.flags.aligned):
            raise InputError(
                f"Input '{name}': cannot be bound, its memory is not C-contiguous and aligned. "
                "Pass numpy.ascontiguousarray(array) and write to that."
            )
    return sizes


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """Return " Did you mean X?" for a misspelt name, or "" where none is near."""
    near = difflib.get_close_matches(got, dict.fromkeys(known), n=3)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _shape_error(spec: TensorSpec, array: Array, way_out: str) -> ShapeError:
    return ShapeError(f"Input '{spec.name}': got {array.shape}, expected {spec.shape}. {way_out}")
