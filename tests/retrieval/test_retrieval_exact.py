"""Exact search against a plain matrix product in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmedge.retrieval import exact
from mmedge.retrieval.exact import Nearest, top_k
from mmedge.specs import Float32Array


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


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 700),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 30),
    st.integers(1, 3),
    st.floats(0, 1),
    st.integers(0, 2**16),
)
def test_it_finds_what_a_plain_product_finds(
    rows: int, dim: int, count: int, k: int, threads: int, share: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors = unit(rows, dim, seed).astype(np.float16)
    vectors[rng.random(rows) < 0.2] = vectors[0]  # ties
    queries = unit(count, dim, seed + 1)
    some = np.flatnonzero(rng.random(rows) < share) if share < 0.9 else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_BLOCK_BYTES", 4 * dim * 7)
        patch.setattr(exact, "_SCORES_AT_ONCE", 50)
        found = top_k(queries, vectors, k, places=some, threads=threads)
    places = np.arange(rows) if some is None else some
    assert len(found) == count
    for query, got in zip(queries, found, strict=True):
        assert_same(got, reference(query, vectors, k, places))


def test_every_fp16_value_is_widened_exactly() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)][None]
    bits = np.empty(finite.shape, np.int32)
    widened = exact._widened(finite, bits).astype(np.float64) * exact._SCALE
    assert np.array_equal(widened, finite.astype(np.float64))


def test_a_copy_of_a_vector_has_its_score_wherever_it_is() -> None:
    vectors = unit(3001, 96).astype(np.float16)
    vectors[::7] = vectors[5]
    (query,) = unit(1, 96, seed=1)
    (alone,) = top_k(query[None], vectors, 3001)
    (beside, *_) = top_k(np.concatenate([query[None], unit(8, 96, seed=2)]), vectors, 3001)
    assert_same(beside, alone)
    copies = alone.scores[np.isin(alone.places, np.arange(0, 3001, 7))]
    assert len(set(copies.tolist())) == 1


def test_it_reads_a_mapped_file_and_memory_stays_bounded(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    empty = np.empty

    def watched(shape: tuple[int, ...], dtype: type) -> NDArray[np.float32]:
        sizes.append(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return empty(shape, dtype)

    path = f"{tmp_path}/vectors"
    unit(20_000, 64).astype(np.float16).tofile(path)
    vectors = np.memmap(path, np.float16, "r", shape=(20_000, 64))
    queries = unit(1000, 64, seed=1)
    monkeypatch.setattr(exact.np, "empty", watched)
    found = top_k(queries, vectors, 3)
    assert max(sizes) <= 16 << 20
    monkeypatch.undo()
    for query, got in list(zip(queries, found, strict=True))[::100]:
        assert_same(got, reference(query, vectors, 3, np.arange(20_000)))


@pytest.mark.parametrize("threads", [1, 4])
def test_nothing_to_search_gives_nothing(threads: int) -> None:
    vectors = unit(5, 8).astype(np.float16)
    queries = unit(2, 8)
    nowhere = np.empty(0, np.int64)
    for found in (
        top_k(queries, vectors[:0], 3, threads=threads),
        top_k(queries, vectors, 3, places=nowhere, threads=threads),
    ):
        assert [len(each.places) for each in found] == [0, 0]
    assert top_k(queries[:0], vectors, 3, threads=threads) == []
