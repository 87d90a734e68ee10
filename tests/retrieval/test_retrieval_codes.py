"""Codes of one bit a coordinate: their estimates, by kernels and by numpy."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from mmedge.errors import IndexCorruptedError
from mmedge.retrieval import lists as lists_module
from mmedge.retrieval import scanning
from mmedge.retrieval.codes import MAX_FACTOR, Rotation, encode, rounded_query
from mmedge.retrieval.lists import ListQuery, Lists, build_lists
from mmedge.retrieval.snapshots import open_snapshot, write_snapshot
from mmedge.specs import Float32Array


def unit(rows: int, dim: int, seed: int) -> Float32Array:
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def listed(dim: int, rows: int = 2000) -> tuple[Lists, Float32Array]:
    """Lists of vectors around a common direction, and the vectors in their order."""
    vectors = unit(rows, dim, 1) + 2 * unit(1, dim, 2)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    lists, order = build_lists(vectors.astype(np.float16))
    return lists, vectors[order]


@pytest.mark.parametrize("dim", [1, 7, 64, 65, 512])
def test_a_rotation_keeps_products(dim: int) -> None:
    rotation = Rotation.random(dim)
    first, second = unit(30, dim, 1), unit(20, dim, 2)
    rotated = rotation.apply(first) @ rotation.apply(second).T
    assert rotation.length % 64 == 0
    assert np.abs(rotated - first @ second.T).max() < 1e-5


def test_a_rotation_spreads_a_coordinate_that_is_much_larger() -> None:
    vectors = unit(100, 512, 1)
    vectors[:, 77] = 5
    rotated = np.abs(Rotation.random(512).apply(vectors))
    assert rotated.max() < 1.5


def test_the_product_of_a_rounded_query_is_a_count_of_bits() -> None:
    (query,) = unit(1, 128, 1)
    signs = np.random.default_rng(2).integers(0, 2, (50, 128))
    planes, step = rounded_query(query)
    rounded = (np.unpackbits(planes, axis=1) * np.array([[1], [2], [4], [8]])).sum(axis=0) - 7.5
    bits = scanning.differing_bits(planes, np.packbits(signs.astype(bool), axis=1))
    counted = step * (7.5 * 128 - np.array([1, 2, 4, 8]) @ bits)
    assert np.abs(step * rounded - query).max() <= 0.51 * step
    assert np.allclose(counted, (2 * signs - 1) @ (step * rounded), atol=1e-4)


@pytest.mark.parametrize(("dim", "allowed"), [(20, 0.13), (512, 0.03), (1000, 0.02)])
def test_estimates_are_near_the_products_and_unbiased(dim: int, allowed: float) -> None:
    lists, vectors = listed(dim)
    every = np.arange(len(lists.centroids))
    errors = np.stack(
        [ListQuery(lists, query).estimates(every) - vectors @ query for query in unit(30, dim, 3)]
    )
    assert np.sqrt(np.mean(errors**2)) < allowed
    assert abs(errors.mean()) < allowed / 20
    near = ListQuery(lists, vectors[7]).estimates(every) - vectors @ vectors[7]
    assert np.sqrt(np.mean(near**2)) < allowed  # the part along the centroids has no error


def test_kernels_and_numpy_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numkong")
    results = []
    for engine in ("numkong", "numpy"):
        if engine == "numpy":
            monkeypatch.setitem(sys.modules, "numkong", None)
        scanning._kernels.cache_clear()
        lists, vectors = listed(96)
        query = ListQuery(lists, vectors[3])
        chosen = query.nearest(40)
        results.append((lists, np.sort(chosen), query.estimates(np.sort(chosen))))
    scanning._kernels.cache_clear()
    (first, lists_1, estimates_1), (second, lists_2, estimates_2) = results
    assert np.array_equal(first.centroids, second.centroids)
    assert np.array_equal(first.codes, second.codes)
    assert np.array_equal(lists_1, lists_2)
    assert np.array_equal(estimates_1, estimates_2)


@pytest.mark.parametrize("at_once", [1, 50, 1 << 16])
@pytest.mark.parametrize("filtered", [False, True])
def test_candidates_are_the_best_estimates(
    at_once: int, filtered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists, vectors = listed(64)
    query = ListQuery(lists, vectors[9])
    chosen = query.nearest(25)
    estimates = query.estimates(chosen)
    places = np.concatenate([np.arange(lists.starts[i], lists.starts[i + 1]) for i in chosen])
    held = places % 3 == 0 if filtered else np.ones(len(places), bool)
    values, places = estimates[held], places[held]
    expected = np.sort(places[np.argsort(-values, kind="stable")[:20]])
    monkeypatch.setattr(lists_module, "_AT_ONCE", at_once)
    found = query.candidates(chosen, 20, (lambda each: each % 3 == 0) if filtered else None)
    assert found.tolist() == expected.tolist()
    assert query.candidates(chosen, 10**6, None).tolist() == sorted(
        np.concatenate([np.arange(lists.starts[i], lists.starts[i + 1]) for i in chosen])
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("where", ["factors", "rotation", "step"])
def test_numbers_out_of_range_are_refused(tmp_path: Path, value: float, where: str) -> None:
    lists, vectors = listed(64, 300)
    codes = lists.codes.copy()
    if where == "factors":
        codes[7, -8:].view(np.float32)[:] = value
        lists = dataclasses.replace(lists, codes=codes)
    elif where == "rotation":
        left = np.full((64, 64), value, np.float32)
        lists = dataclasses.replace(lists, rotation=Rotation(left, lists.rotation.right))
    else:
        lists = dataclasses.replace(lists, step=value)
    ids = np.arange(1, 301)
    block = (ids, ids, np.zeros(300, np.int32), vectors.astype(np.float16))
    _, crc = write_snapshot(tmp_path / "x", "ab" * 16, 64, [block], lists)
    with pytest.raises(IndexCorruptedError, match="out of range"):
        open_snapshot(tmp_path / "x", "ab" * 16, 64, crc)


def test_vectors_like_their_centroid_have_exact_estimates() -> None:
    centroids = unit(3, 64, 1)
    codes = encode(np.zeros((3, 64), np.float32), centroids)
    assert codes.shape == (3, 16)
    assert np.allclose(codes[:, 8:].view(np.float32), [[0, 1]] * 3)
    codes = encode(unit(3, 64, 2), np.zeros((3, 64), np.float32))
    assert np.isfinite(codes[:, 8:].view(np.float32)).all()


def test_factors_are_those_that_opening_allows() -> None:
    """A vector of one coordinate beside a centroid near zero would have a factor of thousands."""
    residual = np.zeros((1, 64), np.float32)
    residual[0, 0] = 1
    centroid = np.full((1, 64), 2e-4, np.float32)
    for sign in (-1, 1):
        factors = encode(sign * residual, centroid)[:, 8:].view(np.float32)
        assert np.abs(factors).max() == MAX_FACTOR
