"""Filters and ranking inside Index.search."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from filters import NAMES, VECTOR, filters, items
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedge.errors import InputError
from mmedge.retrieval import And, Eq, Filter, In, Not, Query, Range, parse_filter
from mmedge.retrieval.filters import matches
from mmedge.retrieval.index import Index
from mmedge.retrieval.items import Item
from mmedge.specs import Float32Array

DIM, COUNT = 16, 5000
AXES = np.eye(DIM, dtype=np.float32)


def random_unit(count: int, seed: int) -> Float32Array:
    vectors = np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)
    unit: Float32Array = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    """5,000 items in two snapshots' worth of adds, three of them with a tag that no other has."""
    with Index.create(tmp_path_factory.mktemp("large") / "x.index", dim=DIM) as index:
        vectors = random_unit(COUNT, 0)
        for part in np.array_split(np.arange(COUNT), 5):
            index.add(
                vectors=vectors[part],
                ids=[f"item {place}" for place in part],
                times=[float(place) for place in part],
                sources=[f"cam{place % 4}" for place in part],
                metadata=[
                    {"place": int(place), "tags": ["rare"] if place % 2000 == 999 else ["common"]}
                    for place in part
                ],
                durability="batch",
            )
        yield index


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Index.create(tmp_path / "x.index", dim=DIM) as made:
        yield made


def ids(index: Index, query: object, k: int = 10, **options: object) -> list[str]:
    return [match.id for match in index.search(query, k, **options)]  # type: ignore[call-overload]


def test_a_tight_filter_loses_nothing(large: Index) -> None:
    query = random_unit(1, 1)[0]
    found = ids(large, query, where=Eq("tags", "rare"))
    assert set(found) == {"item 999", "item 2999", "item 4999"}
    order = np.argsort(-(random_unit(COUNT, 0)[[999, 2999, 4999]] @ query))
    assert found == [("item 999", "item 2999", "item 4999")[place] for place in order]
    for where in (In("id", ("item 7",)), Eq("place", 7), parse_filter("7 <= time < 8")):
        assert ids(large, query, where=where) == ["item 7"]
    assert ids(large, query, where=Eq("tags", "none")) == []


@pytest.mark.parametrize(
    "where",
    [
        Eq("source", "cam2"),
        And((Range("time", 100, 200), Not(Eq("source", "cam0")))),
        parse_filter("tags in (rare, none) or place < 50"),
    ],
)
def test_a_filter_finds_the_nearest_allowed_items(large: Index, where: Filter) -> None:
    queries = random_unit(3, 2)
    everything = large.search(queries, COUNT)
    allowed = {match.id for match in large.search(queries[0], COUNT, where=where)}
    assert 0 < len(allowed) < COUNT
    for found, every in zip(large.search(queries, 10, where=where), everything, strict=True):
        assert found == [match for match in every if match.id in allowed][:10]


@pytest.fixture(scope="module")
def changing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    with Index.create(tmp_path_factory.mktemp("changing") / "x.index", dim=1) as index:
        index.add(vectors=VECTOR, metadata=dict.fromkeys(NAMES))  # so that no field is unknown
        yield index


@settings(max_examples=60, deadline=None)
@given(filters, st.lists(items.filter(lambda item: bool(item.id)), max_size=3))
def test_a_search_agrees_with_the_definition(
    changing: Index, where: Filter, stored: list[Item]
) -> None:
    """One index, changed from example to example, so that kept filters follow."""
    every = {item.id: item for item in stored}
    changing.upsert(list(every.values()), durability="batch")
    held = {item.id for item in changing.items() if matches(where, item)}
    assert {match.id for match in changing.search(VECTOR[0], 1000, where=where)} == held
    changing.delete([name for name in every if len(name) % 2], durability="batch")


def test_an_unknown_field_names_the_nearest(large: Index) -> None:
    with pytest.raises(InputError, match=r"'tag'.*source, place, tags.*mean tags\?"):
        large.search(AXES[0], where=Eq("tag", "rare"))


def test_filters_follow_changes_of_this_and_other_processes(index: Index, tmp_path: Path) -> None:
    where = Eq("on", True)
    index.add(vectors=AXES[:3], ids=["a", "b", "c"], metadata=[{"on": True}, {"on": False}, {}])
    with Index.open(tmp_path / "x.index", read_only=True) as reader:
        assert ids(reader, AXES[0], where=where) == ["a"]
        index.update("b", metadata={"on": True})
        index.add(vectors=AXES[3], ids="d", metadata={"on": True})
        index.delete("a")
        for each in (reader, index):
            assert set(ids(each, AXES[0], where=where)) == {"b", "d"}
        index.compact()
        index.update("d", metadata={"on": False})
        for each in (reader, index):
            assert ids(each, AXES[0], where=where) == ["b"]


def test_an_item_of_many_vectors_is_one_match(index: Index) -> None:
    film = random_unit(200, 3)
    film[150] = AXES[0]
    index.add(vectors=[film, 0.9 * AXES[0] + 0.1 * AXES[1], AXES[1]], ids=["film", "near", "far"])
    first, second, third = index.search(AXES[0], 3)
    assert (first.id, first.part, second.id, third.id) == ("film", 150, "near", "far")
    assert first.score == pytest.approx(1, abs=1e-3)
    assert ids(index, AXES[0], 3, distinct=0.99) == ["film", "far"]  # frame 150 is near "near"


def test_an_item_behind_the_many_vectors_of_another_is_found(index: Index) -> None:
    """A film fills the list of the snapshot's nearest vectors; the tail has n worse items."""
    film = AXES[0] + 0.01 * random_unit(200, 3)
    index.add(vectors=[film, AXES[0] + 0.5 * AXES[1]], ids=["film", "second"])
    index.compact()
    index.add(vectors=np.repeat(AXES[:1] + 2 * AXES[2:3], 20, axis=0))
    assert ids(index, AXES[0], 5)[:2] == ["film", "second"]


def test_near_duplicates_make_room_for_others(index: Index) -> None:
    wall = AXES[0] + 0.01 * random_unit(300, 4)
    index.add(vectors=np.concatenate([wall, random_unit(50, 5)]))
    found = index.search(AXES[0], 10, distinct=0.97)
    assert len(found) == 10
    assert [match.score > 0.99 for match in found] == [True] + [False] * 9
    assert all(match.score > 0.99 for match in index.search(AXES[0], 10))


def test_a_wall_is_added_once_and_skipped_items_are_named(index: Index) -> None:
    wall = AXES[0] + 0.01 * random_unit(20, 4)
    for place in range(10):
        added = index.add(vectors=wall[place], ids=f"a{place}", sources="cam0", skip_near=0.97)
        assert added == (["a0"] if place == 0 else [])
        assert added.skipped == ({} if place == 0 else {f"a{place}": "a0"})
    assert index.add(vectors=wall[10], ids="b0", sources="cam1", skip_near=0.97) == ["b0"]
    names = [f"c{place}" for place in range(4)]
    vectors = np.stack([AXES[1], wall[11], AXES[1], AXES[2]])
    added = index.add(vectors=vectors, ids=names, sources=["cam0"] * 4, skip_near=0.97)
    assert added == ["c0", "c3"]
    assert added.skipped == {"c1": "a0", "c2": "c0"}
    assert index.add(vectors=wall[12], ids="d", sources="cam0") == ["d"]
    assert len(index) == 5
    with pytest.raises(InputError, match="skip_near"):
        index.add(vectors=wall[13], skip_near=2)


def test_newer_items_come_first(index: Index) -> None:
    now = time.time()
    index.add(
        vectors=np.stack([AXES[0], AXES[0] + 0.3 * AXES[1], AXES[0], AXES[0]]),
        ids=["old", "new", "never", "older"],
        times=[now - 3600, now, None, now - 7200],
    )
    assert ids(index, AXES[0], 2) != ["new", "old"]
    found = index.search(AXES[0], half_life_s=3600)
    assert [match.id for match in found] == ["new", "old", "older", "never"]
    np.testing.assert_allclose([m.score for m in found], [0.958, 0.5, 0.25, 0], atol=0.01)


def test_a_query_of_several_parts(index: Index) -> None:
    index.add(vectors=np.concatenate([AXES[:4], AXES[:1] + AXES[1:2]]), ids=list("abcde"))
    assert ids(index, Query([AXES[0], AXES[1]]), 1) == ["e"]
    assert ids(index, Query([AXES[0], AXES[1]], weights=[9, 1]), 1) == ["a"]
    assert ids(index, Query(AXES[0] + 0.6 * AXES[1], unlike=[AXES[1]]), 1) == ["a"]
    several = index.search([Query(AXES[2]), Query(AXES[3])], 1)
    assert [matches[0].id for matches in several] == ["c", "d"]
    with pytest.raises(InputError, match="cancel"):
        index.search(Query(AXES[0], unlike=AXES[0], without=1))
    with pytest.raises(InputError, match="2 weights for 1 part"):
        Query(AXES[0], weights=[1, 2])
    with pytest.raises(InputError, match="nothing to be like"):
        Query([])


def test_words_find_items_that_vectors_miss(index: Index) -> None:
    texts = [f"frame {place}" for place in range(400)]
    texts[300] = "the lost umbrella"
    vectors = AXES[0] + 0.2 * random_unit(400, 6)
    vectors[300] = AXES[5]
    index.add(vectors=vectors, texts=texts, ids=[str(place) for place in range(400)])
    assert "300" not in ids(index, AXES[0])
    found = index.search(Query(AXES[0], words="Umbrella!"), 3)
    assert "300" in [match.id for match in found]
    assert found[0].score == pytest.approx(1 / 61)
    index.update("300", texts="an empty hall")
    assert "300" not in ids(index, Query(AXES[0], words="umbrella"), 3)
    with pytest.raises(InputError, match="at least one word"):
        index.search(Query(AXES[0], words="?"))


@pytest.mark.parametrize("options", [{"half_life_s": 0}, {"distinct": 1.5}, {"distinct": True}])
def test_options_out_of_range_are_refused(index: Index, options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        index.search(AXES[0], **options)


def test_an_empty_index_finds_nothing(index: Index) -> None:
    for query in (AXES[0], Query(AXES[0], words="mug")):
        assert ids(index, query, half_life_s=60, distinct=0.9) == []
