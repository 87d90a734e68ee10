"""Time decay: scores, their order, and how far back a search must look."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedge.errors import InputError
from mmedge.retrieval.recency import checked_half_life, decayed, oldest_that_counts

NOW, HOUR = 1_800_000_000.0, 3600.0


def test_a_score_halves_in_each_half_life() -> None:
    times = np.array([NOW, NOW - HOUR, NOW - 2 * HOUR, NOW + HOUR, np.nan])
    scores, order = decayed(np.full(5, 0.8), times, NOW, HOUR)
    np.testing.assert_allclose(scores, [0.8, 0.4, 0.2, 0.8, 0])
    assert order.tolist() == [0, 3, 1, 2, 4]


def test_age_makes_no_score_better() -> None:
    times = np.array([NOW, NOW - HOUR, np.nan])
    scores, order = decayed(np.full(3, -0.2), times, NOW, HOUR)
    np.testing.assert_allclose(scores, [-0.2, -0.3, -0.4])
    assert order.tolist() == [0, 1, 2]
    scores, order = decayed(np.array([-0.1, 0.1]), np.array([NOW, np.nan]), NOW, HOUR)
    assert order.tolist() == [1, 0]


def test_the_order_holds_where_scores_vanish() -> None:
    times = NOW - HOUR * np.array([5000.0, 4000.0, 4000.5, 3999.0])
    scores, order = decayed(np.array([0.9, 0.4, 0.9, 0.1]), times, NOW, HOUR)
    assert not scores.any()
    assert order.tolist() == [2, 1, 3, 0]


numbers = st.floats(-1, 1).map(lambda value: round(value, 3))
ages = st.floats(0, 50).map(lambda value: round(value, 2)) | st.just(math.nan)


@settings(max_examples=500)
@given(st.lists(st.tuples(numbers, ages), min_size=2, max_size=12), st.integers(1, 6))
def test_no_item_left_out_could_have_come_before(items: list[tuple[float, float]], k: int) -> None:
    """What a search does: take the k most similar, then what else is young enough."""
    items.sort(reverse=True, key=lambda item: item[0])
    scores = np.array([score for score, _ in items])
    times = NOW - HOUR * np.array([age for _, age in items])
    order = decayed(scores, times, NOW, HOUR)[1]
    pool = [int(place) for place in order if place < k]
    worst = pool[-1]
    since = oldest_that_counts(
        scores[min(k, len(items)) - 1], scores[worst], times[worst], NOW, HOUR
    )
    for place in range(k, len(items)):
        if since is not None and not times[place] >= since:
            assert order.tolist().index(place) > order.tolist().index(worst)


@pytest.mark.parametrize("half_life", [0, -1, math.nan, math.inf, True, "1 h"])
def test_no_half_life(half_life: float) -> None:
    with pytest.raises(InputError, match="half_life_s"):
        checked_half_life(half_life)
    assert checked_half_life(60) == 60
