"""Words, time decay and near-duplicates over a pool that grows: the k best, beyond doubt."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from mmedge.errors import InputError
from mmedge.retrieval.filter_sql import KeyMask, allowed
from mmedge.retrieval.ranking import Hits, Ranking, rank
from mmedge.retrieval.recency import decayed
from mmedge.specs import Float32Array

NOW, HOUR, DIM = 1_800_000_000.0, 3600.0, 16


class Items:
    """Items with one vector each, key and row being the same, and a record with their times."""

    def __init__(self, vectors: Float32Array, times: list[float | None], texts: list[str]) -> None:
        self.vectors = vectors.astype(np.float16)
        self.times = np.array([math.nan if time is None else time for time in times])
        self.keys = np.arange(1, len(vectors) + 1)
        self.record = sqlite3.connect(":memory:")
        self.record.execute("CREATE TABLE items(key INTEGER PRIMARY KEY, time REAL)")
        rows = zip(self.keys.tolist(), times, strict=True)
        self.record.executemany("INSERT INTO items VALUES (?, ?)", rows)
        self.record.execute("CREATE VIRTUAL TABLE words USING fts5(text)")
        found = [(key, text) for key, text in zip(self.keys.tolist(), texts, strict=True) if text]
        self.record.executemany("INSERT INTO words(rowid, text) VALUES (?, ?)", found)
        self.asked: list[int] = []

    def rank(
        self, ranking: Ranking, query: Float32Array, k: int, mask: KeyMask | None = None
    ) -> Hits:
        scores = (self.vectors.astype(np.float32) @ query).astype(np.float64)
        order = np.argsort(-scores, kind="stable")

        def nearest(n: int, mask: KeyMask | None) -> Hits:
            self.asked.append(n)
            keys = self.keys[order]
            places = order if mask is None else order[allowed(mask, keys)]
            chosen = places[:n]
            keys = self.keys[chosen]
            return Hits(keys, scores[chosen], np.zeros(len(chosen), np.int32), keys)

        return rank(ranking, k, nearest, lambda rows: self.vectors[rows - 1], self.record, mask)


def unit(rows: NDArray[np.float64]) -> Float32Array:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture
def items() -> Iterator[Items]:
    """3,000 items, a third of them a wall seen again and again, over 100 hours; some of no time."""
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(3000, DIM)))
    vectors[::3] = unit(vectors[0] + 0.01 * rng.normal(size=(1000, DIM)))
    times = [None if rng.random() < 0.1 else NOW - HOUR * 100 * rng.random() for _ in vectors]
    texts = [f"mug {place}" if place % 500 == 7 else "" for place in range(3000)]
    made = Items(vectors, times, texts)
    yield made
    made.record.close()


def test_similarity_alone_is_one_search(items: Items) -> None:
    found = items.rank(Ranking(), unit(np.ones(DIM)), 10)
    assert len(found.keys) == 10
    assert items.asked == [10]


@pytest.mark.parametrize("half_life", [HOUR / 60, HOUR, 50 * HOUR, 1e9])
@pytest.mark.parametrize("seed", [0, 1])
def test_decay_finds_what_a_full_ranking_finds(items: Items, half_life: float, seed: int) -> None:
    query = unit(np.random.default_rng(seed).normal(size=DIM))
    found = items.rank(Ranking(half_life_s=half_life, now=NOW), query, 10)
    scores = (items.vectors.astype(np.float32) @ query).astype(np.float64)
    expected, order = decayed(scores, items.times, NOW, half_life)
    assert found.keys.tolist() == items.keys[order[:10]].tolist()
    np.testing.assert_allclose(found.scores, expected[order[:10]])
    assert max(items.asked) <= 1024


def test_decay_respects_the_filter(items: Items) -> None:
    mask = np.zeros(3001, np.bool_)
    mask[2::3] = True
    ranking = Ranking(half_life_s=HOUR, now=NOW)
    found = items.rank(ranking, unit(np.ones(DIM)), 10, mask)
    assert len(found.keys) == 10
    assert (found.keys % 3 == 2).all()


@pytest.mark.parametrize("half_life", [None, HOUR])
def test_a_wall_seen_a_thousand_times_is_one_hit(items: Items, half_life: float | None) -> None:
    wall = items.vectors[0].astype(np.float32)
    ranking = Ranking(half_life_s=half_life, now=NOW, distinct=0.97)
    found = items.rank(ranking, wall, 5)
    assert (found.keys % 3 == 1).tolist() == [True, False, False, False, False]
    scores = (items.vectors.astype(np.float32) @ wall).astype(np.float64)
    order = np.argsort(-scores)
    if half_life is not None:
        order = decayed(scores, items.times, NOW, half_life)[1]
    walls = items.keys[order] % 3 == 1
    expected = [*items.keys[order][walls][:1], *items.keys[order][~walls][:4]]
    assert found.keys.tolist() == expected


def test_fewer_than_k_distinct_items_are_all(items: Items) -> None:
    mask = np.zeros(3001, np.bool_)
    mask[1::3] = True
    found = items.rank(Ranking(distinct=0.9), unit(np.ones(DIM)), 5, mask)
    assert len(found.keys) == 1


def test_a_newer_item_that_hides_others_lets_the_next_move_up() -> None:
    """The two best and old ones are near-duplicates of an item that is young and less similar."""
    degrees = [0.0, 0.5, 3.0] + [20.0 + place for place in range(70)]
    radians = np.deg2rad(degrees)
    vectors = np.zeros((len(degrees), DIM), np.float32)
    vectors[:, 0], vectors[:, 1] = np.cos(radians), np.sin(radians)
    times: list[float | None] = [NOW - HOUR, NOW - HOUR, NOW, *[NOW - 2 * HOUR] * 70]
    made = Items(vectors, times, [""] * len(degrees))
    query = np.eye(DIM, dtype=np.float32)[0]
    ranking = Ranking(half_life_s=HOUR, now=NOW, distinct=float(np.cos(np.deg2rad(3.5))))
    found = made.rank(ranking, query, 3)
    assert found.keys.tolist() == [3, 4, 8]
    made.record.close()


def test_words_are_fused_with_similarity(items: Items) -> None:
    query = items.vectors[7].astype(np.float32)
    found = items.rank(Ranking(words="mug"), query, 14)
    assert found.keys[0] == 8  # first by both
    by_words = {key for key in range(1, 3001) if (key - 1) % 500 == 7}
    assert by_words <= set(found.keys.tolist())  # six, wherever their vectors lie
    assert found.scores[0] == pytest.approx(1 / 61 + 1 / 61, rel=0.1)
    assert found.rows.tolist() == found.keys.tolist()
    mask = np.ones(3001, np.bool_)
    mask[8] = False
    assert 8 not in items.rank(Ranking(words="mug"), query, 10, mask).keys
    assert len(items.rank(Ranking(words="sofa"), query, 10).keys) == 10
    with pytest.raises(InputError, match="at least one word"):
        items.rank(Ranking(words="!"), query, 10)


def test_words_decay_and_distinct_go_together(items: Items) -> None:
    ranking = Ranking("mug", 10 * HOUR, NOW, 0.97)
    found = items.rank(ranking, items.vectors[0].astype(np.float32), 20)
    assert len(found.keys) == 20
    assert np.count_nonzero(found.keys % 3 == 1) <= 2
    assert (np.diff(found.scores) <= 0).all()


def test_an_empty_index_has_no_hits() -> None:
    made = Items(np.zeros((0, DIM), np.float32), [], [])
    for ranking in (Ranking(), Ranking("mug", HOUR, NOW, 0.9)):
        assert len(made.rank(ranking, unit(np.ones(DIM)), 5).keys) == 0
    made.record.close()
