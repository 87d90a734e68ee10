"""Near-duplicates among hits, and among what a source showed last."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedge.errors import InputError
from mmedge.retrieval.duplicates import RECENT, checked_cosine, distinct_hits, near_recent
from mmedge.retrieval.items import Item
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


def item(name: str, *angles: float, source: str | None = "cam0") -> Item:
    return Item(name, at_degrees(*angles), source=source)


def test_the_newest_near_item_of_the_same_source() -> None:
    recent = {"cam0": [item("a", 0), item("b", 5), item("c", 40)]}
    new = [
        item("near", 6),
        item("far", 60),
        item("near far", 61),  # compared with what came before it in the same call
        item("near near", 15.5),  # near to a skipped one alone
        item("elsewhere", 6, source="cam1"),
        item("nowhere", 6, source=None),
        item("nowhere again", 6, source=None),
    ]
    expected = {"near": "b", "near far": "far", "nowhere again": "nowhere"}
    assert near_recent(new, recent, COS_10) == expected
    assert near_recent(new, {}, 1.0) == {"nowhere again": "nowhere"}


def test_items_outside_the_window_are_not_compared() -> None:
    axes = np.eye(RECENT + 1, dtype=np.float32)
    items = [Item(str(place), axes[place : place + 1]) for place in range(RECENT + 1)]
    again = Item("again", axes[:1])
    assert near_recent([*items[:-1], again], {}, COS_10) == {"again": "0"}
    assert near_recent([*items, again], {}, COS_10) == {}


def test_each_of_several_vectors_must_be_near() -> None:
    recent = {"cam0": [item("clip", 0, 90)]}
    assert near_recent([item("a", 5, 85, 88)], recent, COS_10) == {"a": "clip"}
    assert near_recent([item("a", 5, 45)], recent, COS_10) == {}


@pytest.mark.parametrize("cosine", [0, -0.5, 1.01, float("nan"), True, "0.9"])
def test_no_cosine(cosine: float) -> None:
    with pytest.raises(InputError, match=r"distinct.*above 0 and at most 1"):
        checked_cosine(cosine, "distinct")
    assert checked_cosine(1, "distinct") == 1
