"""Scans of fp16 vectors, by kernels and by numpy, against a plain product in float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmedge.retrieval import exact, scanning
from mmedge.retrieval.exact import Nearest
from mmedge.retrieval.scanning import ScanQuery
from mmedge.specs import Float32Array


@pytest.fixture(params=["kernels", "numpy"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With and without the extra."""
    if request.param == "kernels":
        pytest.importorskip("numkong")
    else:
        monkeypatch.setitem(sys.modules, "numkong", None)
    scanning._kernels.cache_clear()
    yield request.param
    scanning._kernels.cache_clear()


def unit(rows: int, dim: int, seed: int = 0) -> Float32Array:
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def reference(
    query: Float32Array, vectors: NDArray[np.float16], k: int, places: NDArray[np.int64]
) -> Nearest:
    values = (vectors[places].astype(np.float64) * query.astype(np.float64)).sum(axis=1)
    rounded = values.clip(-1, 1).astype(np.float32)
    order = np.lexsort((places, -rounded))[:k]
    return Nearest(places[order], rounded[order])


def assert_same(got: Nearest, expected: Nearest) -> None:
    assert got.places.tolist() == expected.places.tolist()
    assert got.scores.tolist() == expected.scores.tolist()
    assert got.places.dtype == np.int64
    assert got.scores.dtype == np.float32


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(1, 700),
    st.integers(1, 40),
    st.integers(1, 30),
    st.floats(0, 1),
    st.integers(0, 2**16),
)
def test_a_scan_equals_a_plain_product(
    engine: str, rows: int, dim: int, k: int, share: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors = unit(rows, dim, seed).astype(np.float16)
    vectors[rng.random(rows) < 0.2] = vectors[0]  # ties
    (query,) = unit(1, dim, seed + 1)
    some = np.flatnonzero(rng.random(rows) < share) if share < 0.9 else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_BLOCK_BYTES", 4 * dim * 7)
        patch.setattr(scanning, "_AT_ONCE", 50)
        found = ScanQuery(query).scan(vectors, k, some)
    assert_same(found, reference(query, vectors, k, np.arange(rows) if some is None else some))


@pytest.mark.parametrize("dim", [1, 7, 512, 4096])
def test_products_are_within_the_stated_error(engine: str, dim: int) -> None:
    vectors = unit(300, dim).astype(np.float16)
    for vector in unit(20, dim, seed=1):
        query = ScanQuery(vector)
        expected = vectors.astype(np.float64) @ vector.astype(np.float64)
        assert np.abs(query.products(vectors) - expected).max() <= query.error
        parts = query.products(vectors[:100], vectors[:0], vectors[100:])
        assert np.abs(parts - expected).max() <= query.error


def test_every_fp16_value_is_widened_exactly() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)][None]
    bits = np.empty(finite.shape, np.int32)
    widened = exact._widened(finite, bits).astype(np.float64) * exact._SCALE
    assert np.array_equal(widened, finite.astype(np.float64))


def test_a_copy_of_a_vector_has_its_score_wherever_it_is(engine: str) -> None:
    vectors = unit(3001, 96).astype(np.float16)
    vectors[::7] = vectors[5]
    (query,) = unit(1, 96, seed=1)
    found = ScanQuery(query).scan(vectors, 3001)
    copies = found.scores[np.isin(found.places, np.arange(0, 3001, 7))]
    assert len(set(copies.tolist())) == 1


def test_a_mapped_file_is_scanned_in_bounded_memory(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    empty = np.empty

    def watched(shape: tuple[int, ...], dtype: type) -> NDArray[np.float32]:
        sizes.append(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return empty(shape, dtype)

    path = tmp_path / "vectors"
    unit(150_000, 16).astype(np.float16).tofile(path)
    vectors = np.memmap(path, np.float16, "r", shape=(150_000, 16))
    (query,) = unit(1, 16, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", watched)
        found = ScanQuery(query).scan(vectors, 3)
    assert max(sizes) <= 1 << 20
    assert_same(found, reference(query, vectors, 3, np.arange(150_000)))


def test_nothing_to_search_gives_nothing(engine: str) -> None:
    vectors = unit(5, 8).astype(np.float16)
    query = ScanQuery(unit(1, 8)[0])
    nowhere = np.empty(0, np.int64)
    assert not len(query.scan(vectors[:0], 3).places)
    assert not len(query.scan(vectors, 3, nowhere).places)
