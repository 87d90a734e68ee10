"""Searches compared sample by sample: by hand, with ties, and in blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedge.converters.evaluation.neighbours import (
    Search,
    neighbour_agreement,
    rank_correlation,
    ranks_of_relevant,
)
from mmedge.errors import ShapeError
from mmedge.specs import Array


def random(count: int, seed: int) -> Array:
    rows: Array = np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)
    return rows


def at_degrees(*angles: float) -> Array:
    radians = np.deg2rad(angles)
    return np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32)


def test_agreement_by_hand() -> None:
    queries = at_degrees(0)
    truth = Search(queries, at_degrees(1, 2, 3, 40))
    found = Search(queries, at_degrees(1, 50, 3, 40))
    # Truth 0, 1, 2, 3; found 0, 2, 3, 1.
    for k, share in {1: 1, 2: 1 / 2, 3: 2 / 3, 4: 1}.items():
        same, got = neighbour_agreement(truth, [truth, found], k)
        assert (same, got) == (pytest.approx([1]), pytest.approx([share]))


def test_a_tie_counts_as_a_random_order_of_it() -> None:
    queries = at_degrees(0)
    truth = Search(queries, at_degrees(1, 20, 30, 40))
    tied = Search(queries, at_degrees(5, 9, 9, 9))
    # 0 for sure, and one of the three others, of which one is right.
    assert neighbour_agreement(truth, [tied], 2)[0] == pytest.approx([(1 + 1 / 3) / 2])
    # The other way round: all three ties are as near as the second, so any will do.
    assert neighbour_agreement(tied, [truth], 2).tolist() == [[1]]


def test_rank_correlation_by_hand() -> None:
    queries = at_degrees(0)
    truth = Search(queries, at_degrees(1, 2, 3, 4))
    # Ranks 1 2 3 4 against 1 3 2 4: 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15).
    swapped = Search(queries, at_degrees(1, 3, 2, 4))
    assert rank_correlation(truth, swapped) == pytest.approx([0.8])
    assert rank_correlation(truth, Search(queries, at_degrees(4, 3, 2, 1))) == pytest.approx([-1])
    # Ranks 1 2.5 2.5 4: by Pearson's formula 4.5 / sqrt(5 * 4.5).
    tied = Search(queries, at_degrees(1, 2, 2, 4))
    assert rank_correlation(truth, tied) == pytest.approx([4.5 / np.sqrt(5 * 4.5)])


def test_rank_correlation_leaves_oneself_out() -> None:
    vectors, other = at_degrees(0, 10, 30), at_degrees(0, 30, 10)
    truth, found = Search(vectors, vectors, own=True), Search(other, other, own=True)
    # Two others each: the order of sample 0 is turned round; 1 (at 10, then 30) finds 0 before 2,
    # then 2 before 0; 2 alike.
    assert rank_correlation(truth, found) == pytest.approx([-1, -1, -1])


def test_where_all_are_equally_near_there_is_nothing_to_agree_on() -> None:
    queries = at_degrees(0)
    flat, order = Search(queries, at_degrees(5, 5, -5)), Search(queries, at_degrees(1, 2, 3))
    assert rank_correlation(flat, flat).tolist() == [1]
    assert rank_correlation(flat, order).tolist() == [0]


def test_ranks_count_ties_by_chance() -> None:
    search = Search(at_degrees(0), at_degrees(1, 5, 5, 5, 5, 90))
    ranks = ranks_of_relevant(search, np.array([7]), np.array([0, 7, 0, 7, 0, 7]))
    assert (ranks.before.tolist(), ranks.tied.tolist(), ranks.relevant.tolist()) == ([1], [2], [2])
    # One place after the first: 2 of 4 are relevant; two places: all but 2/4 * 1/3.
    expected = {1: 0.0, 2: 1 / 2, 3: 1 - 2 / 4 * 1 / 3, 4: 1.0, 9: 1.0}
    for k, share in expected.items():
        assert ranks.hits(k) == pytest.approx([share]), k


def test_without_anything_relevant_there_is_no_hit() -> None:
    search = Search(at_degrees(0, 1), at_degrees(1, 5))
    ranks = ranks_of_relevant(search, np.array([7, 0]), np.array([0, 1]))
    assert ranks.hits(1).tolist() == [0, 1]
    assert ranks.hits(5).tolist() == [0, 1]


def test_broken_vectors_neither_match_nor_find() -> None:
    vectors = at_degrees(0, 10, 20, 30)
    broken = vectors.copy()
    broken[0], broken[3] = np.nan, 0
    truth = Search(vectors, vectors, own=True)
    (agreement,) = neighbour_agreement(truth, [Search(broken, broken, own=True)], 1)
    # Sample 1 is as near to 0 as to 2, and finds 2; sample 2 finds 1, as near as 3.
    assert agreement.tolist() == [0, 1, 1, 0]
    assert rank_correlation(truth, Search(broken, broken, own=True))[[0, 3]].tolist() == [0, 0]
    groups = np.arange(4)
    in_broken = ranks_of_relevant(Search(vectors, broken), groups, groups)
    assert in_broken.hits(9).tolist() == [0, 1, 1, 0]
    by_broken = ranks_of_relevant(Search(broken, vectors), groups, groups)
    assert by_broken.hits(9).tolist() == [0, 1, 1, 0]


def test_huge_embeddings_are_as_good_as_others() -> None:
    vectors = random(6, 0)
    search = Search(vectors, vectors, own=True)
    huge = Search(vectors * np.float32(1e30), vectors * np.float32(1e-30), own=True)
    assert neighbour_agreement(search, [huge], 2).tolist() == [[1] * 6]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 60), st.booleans())
def test_blocks_change_nothing(seed: int, block: int, own: bool) -> None:
    vectors, other = random(14, seed), random(14, seed + 1)
    vectors[4:7], other[2] = vectors[4], np.nan
    truth, found = Search(vectors, vectors, own=own), Search(vectors, other, own=own)
    groups = np.arange(14) // 3
    np.testing.assert_array_equal(
        neighbour_agreement(truth, [found], 4, block=block), neighbour_agreement(truth, [found], 4)
    )
    np.testing.assert_allclose(
        rank_correlation(truth, found, block=block), rank_correlation(truth, found), atol=1e-12
    )
    whole = ranks_of_relevant(found, groups, groups)
    pieces = ranks_of_relevant(found, groups, groups, block=block)
    np.testing.assert_array_equal(pieces.hits(3), whole.hits(3))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12))
def test_agreement_is_the_share_of_common_neighbours(seed: int, k: int) -> None:
    queries, vectors, other = random(5, seed), random(12, seed + 1), random(12, seed + 2)

    def nearest(gallery: Array) -> list[set[int]]:
        unit = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
        return [set(row) for row in np.argsort(-queries @ unit.T, axis=1)[:, :k].tolist()]

    expected = [len(a & b) / k for a, b in zip(nearest(vectors), nearest(other), strict=True)]
    (got,) = neighbour_agreement(Search(queries, vectors), [Search(queries, other)], k)
    np.testing.assert_allclose(got, expected)


def test_searches_that_do_not_go_together_are_refused() -> None:
    vectors = random(4, 0)
    with pytest.raises(ShapeError, match=r"\(4, 5\) in \(4, 4\)"):
        Search(vectors, vectors[:, :4])
    with pytest.raises(ShapeError, match="expected equal"):
        Search(vectors[:3], vectors, own=True)
    search = Search(vectors, vectors)
    with pytest.raises(ShapeError, match="same samples"):
        neighbour_agreement(search, [Search(vectors, vectors, own=True)], 1)
    for k in (0, 5):
        with pytest.raises(ShapeError, match=f"got k = {k}, expected 1 to 4"):
            neighbour_agreement(search, [search], k)
    with pytest.raises(ShapeError, match="Groups"):
        ranks_of_relevant(search, np.arange(4), np.arange(3))
