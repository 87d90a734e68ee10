"""Normalisation of vectors, such as a robot's state, and its inverse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from mmedge.errors import DTypeError, InputError, ShapeError
from mmedge.preprocess.config import VectorConfig
from mmedge.specs import Array, Float32Array, Modality

__all__ = ["VectorProcessor"]


class VectorProcessor:
    """Subtract the mean and divide by the standard deviation.

    Args:
        config: The bundle's frozen configuration.
    """

    modality: ClassVar[Modality] = Modality.VECTOR

    def __init__(self, config: VectorConfig) -> None:
        self.config = config
        self._mean = np.array(config.mean, np.float64)
        self._std = np.array(config.std, np.float64)

    @classmethod
    def open(cls, config: VectorConfig, folder: Path) -> VectorProcessor:  # noqa: ARG003
        """Open from a bundle's folder, which vectors do not use."""
        return cls(config)

    def example(self) -> Array:
        """Return a vector: the mean."""
        return np.array(self.config.mean)

    def __call__(self, items: Sequence[ArrayLike]) -> dict[str, Array]:
        """Normalise vectors.

        Args:
            items: N vectors of `size` numbers each, or an array (N, size).

        Returns:
            (N, size) float32 by the configured input.

        Raises:
            ShapeError: If there is none, or a vector has another length.
            DTypeError: If the values are not numbers.
            InputError: If a value is NaN or infinite.
        """
        values = self._checked(items)
        return {self.config.input: ((values - self._mean) / self._std).astype(np.float32)}

    def restore(self, values: ArrayLike) -> Float32Array:
        """Undo the normalisation, for example of a policy's actions.

        Args:
            values: (..., size) numbers, normalised.

        Returns:
            (..., size) float32.

        Raises:
            ShapeError: If the last axis differs.
        """
        array = np.asarray(values, np.float64)
        if array.shape[-1:] != (self.config.size,):
            raise ShapeError(f"Vectors: got {array.shape}, expected (..., {self.config.size}).")
        restored: Float32Array = (array * self._std + self._mean).astype(np.float32)
        return restored

    def _checked(self, items: Any) -> Array:  # noqa: ANN401, whatever a caller passes
        name = f"Vectors for '{self.config.input}'"
        try:
            values = np.asarray(items)
        except ValueError as error:  # rows of several lengths
            raise ShapeError(
                f"{name}: got vectors of several lengths, expected {self.config.size} numbers each."
            ) from error
        if values.dtype.kind not in "fiub":
            raise DTypeError(f"{name}: got dtype {values.dtype.name}, expected numbers.")
        if values.ndim != 2 or values.shape[1] != self.config.size or not len(values):
            raise ShapeError(
                f"{name}: got {values.shape}, expected (batch, {self.config.size}). Pass [vector] "
                "for a single one."
            )
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            raise InputError(
                f"{name}: NaN or infinite values in {bad.tolist()}. Check their source."
            )
        return values.astype(np.float64)
