"""Queries of several parts, and several rankings in one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedge.errors import InputError
from mmedge.retrieval.fusion import combine_queries, fuse_rankings
from mmedge.specs import Float32Array

AXES = np.eye(4, dtype=np.float32)
NOTHING = AXES[:0]


def unit(rows: object) -> Float32Array:
    vectors = np.asarray(rows, np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_one_query_stays_as_it_is() -> None:
    np.testing.assert_allclose(combine_queries(AXES[:1], [3.0], NOTHING, 0.5), AXES[0])


def test_weights_are_shares() -> None:
    got = combine_queries(AXES[:2], [3.0, 1.0], NOTHING, 0.5)
    np.testing.assert_allclose(got, unit([3, 1, 0, 0]), rtol=1e-6)
    again = combine_queries(AXES[:2], [30.0, 10.0], NOTHING, 0.5)
    np.testing.assert_allclose(again, got, rtol=1e-6)


def test_unlike_items_are_removed() -> None:
    got = combine_queries(unit([[1, 1, 0, 0]]), [1.0], AXES[1:3], 0.5)
    half = 2**-0.5
    np.testing.assert_allclose(got, unit([half, half - 0.25, -0.25, 0]), rtol=1e-6)


def test_an_item_like_the_unwanted_query_falls_behind() -> None:
    red_mug, blue_mug = unit([1, 0.9, 0, 0]), unit([1, 0, 0.9, 0])
    items = np.stack([blue_mug, red_mug])
    mug, blue = unit([[1, 0.1, 0.2, 0]]), unit([[0, 0, 1, 0]])
    assert (items @ combine_queries(mug, [1.0], NOTHING, 0.5)).argmax() == 0
    assert (items @ combine_queries(mug, [1.0], blue, 0.5)).argmax() == 1


@pytest.mark.parametrize(
    ("weights", "without", "message"),
    [
        ([1.0], 0.5, "2 positive numbers"),
        ([1.0, 0.0], 0.5, "positive"),
        ([1.0, -1.0], 0.5, "`unlike`"),
        ([1.0, float("nan")], 0.5, "positive"),
        ([1.0, 1.0], -1.0, "a number from 0"),
        ([1.0, 1.0], float("inf"), "a number from 0"),
    ],
)
def test_weights_that_mean_nothing_are_refused(
    weights: list[float], without: float, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        combine_queries(AXES[:2], weights, AXES[2:3], without)


def test_parts_that_cancel_are_refused() -> None:
    with pytest.raises(InputError, match="cancel"):
        combine_queries(AXES[:1], [1.0], AXES[:1], 1.0)


def test_fused_ranks_by_hand() -> None:
    keys, scores = fuse_rankings([np.array([7, 3, 5]), np.array([5, 9])])
    assert keys.tolist() == [5, 7, 3, 9]  # 3 and 9 are even
    expected = [1 / 63 + 1 / 61, 1 / 61, 1 / 62, 1 / 62]
    np.testing.assert_allclose(scores[[0, 1]], expected[:2])
    np.testing.assert_allclose(scores[2:], expected[2:])


rankings = st.lists(st.lists(st.integers(0, 30), unique=True, max_size=20), max_size=3)


@given(rankings)
def test_fusion_is_the_sum_of_reciprocal_ranks(given_rankings: list[list[int]]) -> None:
    keys, scores = fuse_rankings([np.array(one, np.int64) for one in given_rankings])
    expected: dict[int, float] = {}
    for one in given_rankings:
        for rank, key in enumerate(one, 1):
            expected[key] = expected.get(key, 0) + 1 / (60 + rank)
    assert dict(zip(keys.tolist(), scores.tolist(), strict=True)) == pytest.approx(expected)
    assert (np.diff(scores) <= 0).all()


@given(st.lists(st.integers(0, 30), unique=True, max_size=20))
def test_one_ranking_keeps_its_order(ranking: list[int]) -> None:
    keys, _ = fuse_rankings([np.array(ranking, np.int64)])
    assert keys.tolist() == ranking
