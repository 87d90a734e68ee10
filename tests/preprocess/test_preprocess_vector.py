from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mmedge.errors import DTypeError, InputError, ShapeError
from mmedge.preprocess import VectorConfig
from mmedge.preprocess.vector import VectorProcessor

CONFIG = VectorConfig(input="state", size=3, mean=(1.0, -2.0, 0.5), std=(2.0, 0.5, 4.0))


def test_vectors_are_normalised_and_restored() -> None:
    processor = VectorProcessor(CONFIG)
    values = np.random.default_rng(0).normal(size=(5, 3))
    got = processor(list(values))["state"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, (values - CONFIG.mean) / CONFIG.std, rtol=1e-6)
    np.testing.assert_allclose(processor.restore(got), values, atol=1e-6)
    assert processor.restore(np.zeros((2, 7, 3))).shape == (2, 7, 3)  # an action chunk


@pytest.mark.parametrize(
    ("items", "error", "reason"),
    [
        ([1.0, 2.0, 3.0], ShapeError, r"got \(3,\), expected \(batch, 3\). Pass \[vector\]"),
        ([[1.0, 2.0]], ShapeError, r"got \(1, 2\)"),
        ([[1.0, 2.0, 3.0], [1.0, 2.0]], ShapeError, "several lengths"),
        ([], ShapeError, "got"),
        (np.empty((0, 3)), ShapeError, "got"),
        ([["a", "b", "c"]], DTypeError, "expected numbers"),
        ([[1.0, 2.0, 3.0], [np.nan, 0, 0]], InputError, r"NaN or infinite values in \[1\]"),
    ],
)
def test_misuse_is_explained(items: Any, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        VectorProcessor(CONFIG)(items)


def test_restore_names_another_last_axis() -> None:
    with pytest.raises(ShapeError, match=r"got \(2, 4\)"):
        VectorProcessor(CONFIG).restore(np.zeros((2, 4)))
