"""Near-duplicates among hits, and among what a source showed last."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedge.errors import InputError
from mmedge.retrieval.duplicates import RecentVectors, checked_cosine, distinct_hits
from mmedge.specs import Float32Array


def at_degrees(*angles: float) -> Float32Array:
    radians = np.deg2rad(angles)
    return np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32)


COS_10 = float(np.cos(np.deg2rad(10)))


def test_a_hit_near_a_better_one_is_left_out() -> None:
    hits = at_degrees(0, 9, 18, 40, 45, 90)
    assert distinct_hits(hits, COS_10, 10).tolist() == [0, 2, 3, 5]
    assert distinct_hits(hits.astype(np.float16), COS_10, 3).tolist() == [0, 2, 3]
    assert distinct_hits(hits[:0], COS_10, 3).tolist() == []
    assert distinct_hits(np.repeat(hits[:1], 50, axis=0), COS_10, 3).tolist() == [0]


@given(st.lists(st.integers(0, 359), max_size=30), st.integers(1, 8))
def test_the_greedy_rule(angles: list[int], k: int) -> None:
    hits = at_degrees(*angles) if angles else np.zeros((0, 2), np.float32)
    kept: list[int] = []
    for place, hit in enumerate(hits):
        if len(kept) < k and all(hits[other] @ hit < 0.999 for other in kept):
            kept.append(place)
    assert distinct_hits(hits, 0.999, k).tolist() == kept


def test_the_newest_near_item_of_the_same_source() -> None:
    recent = RecentVectors(window=2)
    assert not recent.knows("cam0")
    for name, angle in (("a", 0), ("b", 5), ("c", 40)):
        recent.remember("cam0", name, at_degrees(angle))
    recent.remember("cam1", "d", at_degrees(100))
    assert recent.knows("cam0")
    assert recent.nearest("cam0", at_degrees(6), COS_10) == "b"
    assert recent.nearest("cam0", at_degrees(60), COS_10) is None
    assert recent.nearest("cam0", at_degrees(100), COS_10) is None  # another source's
    assert recent.nearest("cam9", at_degrees(6), COS_10) is None
    recent.remember("cam0", "e", at_degrees(80))  # b leaves the window
    assert recent.nearest("cam0", at_degrees(6), COS_10) is None


def test_each_of_several_vectors_must_be_near() -> None:
    recent = RecentVectors()
    recent.remember("cam0", "clip", at_degrees(0, 90))
    assert recent.nearest("cam0", at_degrees(5, 85, 88), COS_10) == "clip"
    assert recent.nearest("cam0", at_degrees(5, 45), COS_10) is None


def test_sources_that_fell_silent_are_forgotten() -> None:
    recent = RecentVectors(sources=2)
    for source in ("a", "b", "a", "c"):
        recent.remember(source, source, at_degrees(0))
    assert [recent.knows(source) for source in "abc"] == [True, False, True]


@pytest.mark.parametrize("cosine", [0, -0.5, 1.01, float("nan"), True, "0.9"])
def test_no_cosine(cosine: float) -> None:
    with pytest.raises(InputError, match=r"distinct.*above 0 and at most 1"):
        checked_cosine(cosine, "distinct")
    assert checked_cosine(1, "distinct") == 1
