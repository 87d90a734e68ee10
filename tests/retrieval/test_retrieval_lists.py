"""Inverted lists: what a search through a few of them finds, and how many it takes."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from indexes import two_spaces

from mmedge.bundle import Bundle
from mmedge.errors import IndexCorruptedError
from mmedge.retrieval import measuring, nearest, upkeep
from mmedge.retrieval.filters import Eq
from mmedge.retrieval.index import Index
from mmedge.retrieval.lists import ListQuery, build_lists, largest
from mmedge.retrieval.queries import Query
from mmedge.retrieval.query_embedding import query_kind
from mmedge.retrieval.schema import RECORD
from mmedge.retrieval.verifying import verify_index
from mmedge.retrieval.widths import Width, Widths
from mmedge.specs import Float32Array

ROWS, DIM = 3000, 32


def unit(vectors: Float32Array) -> Float32Array:
    normalised: Float32Array = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return normalised.astype(np.float32)


def clustered(count: int, seed: int) -> Float32Array:
    centres = np.random.default_rng(0).standard_normal((40, DIM))
    random = np.random.default_rng(seed)
    picked = centres[random.integers(0, 40, count)]
    return unit(picked + 0.5 * random.standard_normal((count, DIM)))


VECTORS = clustered(ROWS, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed index whose vectors lie in lists."""
    path = tmp_path_factory.mktemp("lists") / "x.index"
    with pytest.MonkeyPatch.context() as patch, Index.create(path, dim=DIM) as made:
        patch.setattr(upkeep, "LISTED_ROWS", 1000)
        made.add(
            vectors=VECTORS,
            ids=[f"{number:04d}" for number in range(ROWS)],
            metadata=[
                {"even": number % 2 == 0, "rare": number % 1000 == 7} for number in range(ROWS)
            ],
        )
        made.compact({"text": unit(clustered(60, 2) + 0.4)})
    return path


@pytest.fixture
def index(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """A copy of it."""
    monkeypatch.setattr(upkeep, "LISTED_ROWS", 1000)
    monkeypatch.setattr(nearest, "_FEW", 50)
    shutil.copytree(folder, tmp_path / "x.index")
    with Index.open(tmp_path / "x.index") as opened:
        yield opened


def exact_ids(query: Float32Array, k: int, among: np.ndarray | None = None) -> list[str]:
    scores = VECTORS.astype(np.float16).astype(np.float32) @ query
    if among is not None:
        scores[~among] = -2
    return [f"{number:04d}" for number in np.argsort(-scores, kind="stable")[:k]]


def recall(index: Index, queries: Float32Array, target: float, **given: object) -> float:
    shares = []
    for query in queries:
        found = {match.id for match in index.search(query, 10, recall=target, **given)}  # type: ignore[call-overload]
        shares.append(len(found & set(exact_ids(query, 10))) / 10)
    return float(np.mean(shares))


def segment(index: Index) -> nearest.Segment:
    with index._viewing() as (_, view):
        return view.segments[0]


def test_the_target_recall_is_reached_with_few_lists(index: Index) -> None:
    listed = segment(index)
    assert listed.lists is not None
    assert listed.widths is not None
    width = listed.widths.width("text", 0.95, 10)
    assert width is not None
    assert width.lists < len(listed.lists.centroids) // 4
    assert width.candidates < ROWS // 4
    assert recall(index, unit(clustered(60, 3) + 0.4), 0.95, modality="text") >= 0.93


def test_a_recall_of_one_is_exact(index: Index) -> None:
    queries = clustered(40, 4)
    assert recall(index, queries, 1.0) == 1
    query = queries[0]
    assert [match.id for match in index.search(query, 10, recall=1)] == exact_ids(query, 10)


def test_a_kind_that_was_not_measured_is_searched_exactly(index: Index) -> None:
    assert recall(index, clustered(40, 5), 0.5, modality="audio") == 1


def test_an_unknown_kind_takes_the_widest_search(index: Index) -> None:
    widths = segment(index).widths
    assert widths is not None
    assert set(widths.curves) == {"text", "vector"}
    found = [width for kind in widths.curves if (width := widths.width(kind, 0.95, 10))]
    assert widths.width(None, 0.95, 10) == Width(
        max(each.lists for each in found), max(each.candidates for each in found)
    )


@pytest.mark.parametrize("target", [0.5, 0.95])
def test_a_tight_filter_loses_nothing(index: Index, target: float) -> None:
    among = np.arange(ROWS) % 1000 == 7
    for query in clustered(20, 6):
        found = index.search(query, 10, where=Eq("rare", True), recall=target)
        assert [match.id for match in found] == exact_ids(query, 3, among)


def test_a_loose_filter_scans_more_lists(index: Index) -> None:
    among = np.arange(ROWS) % 2 == 0
    shares = []
    for query in clustered(40, 7):
        found = index.search(query, 10, where=Eq("even", True), recall=0.95, modality="text")  # type: ignore[arg-type]
        shares.append(len({each.id for each in found} & set(exact_ids(query, 10, among))) / 10)
    assert np.mean(shares) >= 0.93


def test_lists_that_hold_too_few_are_followed_by_a_whole_scan(index: Index) -> None:
    query = VECTORS[3]
    assert len(index.search(query, ROWS, recall=0.5)) == ROWS
    index.delete([f"{number:04d}" for number in range(ROWS) if number != 8])
    assert [match.id for match in index.search(query, 10, recall=0.5)] == ["0008"]


def test_later_changes_count_at_once(index: Index) -> None:
    index.delete(["0005"])
    index.add(vectors=VECTORS[5:6], ids=["again"])
    found = [match.id for match in index.search(VECTORS[5], 3, recall=0.9)]
    assert found[0] == "again"
    assert "0005" not in found
    with Index.open(index.path) as reader:
        assert [match.id for match in reader.search(VECTORS[5], 3, recall=0.9)] == found


def test_an_item_of_several_vectors_is_found_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "LISTED_ROWS", 1000)
    with Index.create(tmp_path / "x.index", dim=DIM) as made:
        made.add(vectors=[VECTORS[start : start + 10] for start in range(0, ROWS, 10)])
        made.compact()
        for recall_ in (0.9, 1.0):
            found = made.search(VECTORS[15], 20, recall=recall_)
            assert len({match.id for match in found}) == 20


def test_lists_hold_every_vector_once() -> None:
    vectors = VECTORS.astype(np.float16)
    lists, order = build_lists(vectors)
    assert sorted(order) == list(range(ROWS))
    assert (lists.starts[0], lists.starts[-1]) == (0, ROWS)
    again, same = build_lists(vectors)
    assert (order == same).all()
    assert (lists.centroids == again.centroids).all()


def test_equal_vectors_can_be_listed() -> None:
    lists, order = build_lists(np.repeat(VECTORS[:1], 100, axis=0).astype(np.float16))
    assert len(order) == lists.starts[-1] == 100


def test_the_nearest_lists_are_the_first_of_the_scan() -> None:
    lists, _ = build_lists(VECTORS.astype(np.float16))
    query = ListQuery(lists, VECTORS[5])
    assert set(query.nearest(7)) == set(np.argsort(-query.products)[:7])
    assert len(query.nearest(1000)) == len(lists.centroids)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"curves": 1, "queries": {}}',
        '{"curves": {"text": {"10": [[-3, 40, 0.99]]}}, "queries": {}}',
        '{"curves": {"text": {"10": [[3, 0, 0.99]]}}, "queries": {}}',
        '{"curves": {"text": {"10": [[3, 0.99]]}}, "queries": {}}',
        '{"curves": {"text": {"10": [[1' + "0" * 400 + ', 10, 0.99]]}}, "queries": {}}',
        '{"curves": {"text": {"10": [[3, 1' + "0" * 400 + ', 0.99]]}}, "queries": {}}',
        '{"curves": {"text": {"10": [[1, 10, 1' + "0" * 400 + ']]}}, "queries": {}}',
        "[" * 100_000,
        "x" * (1 << 21),
    ],
)
def test_damaged_widths_are_refused(text: str) -> None:
    with pytest.raises(IndexCorruptedError, match="compact"):
        Widths.from_json(text)


def test_a_match_below_the_best_candidates_is_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_CANDIDATES", (2, 4))
    estimates = np.array([0.9, 0.1, 0.8, 0.7, 0.6, 0.5], np.float32)
    needed = measuring._candidates_needed(
        estimates, np.array([2, 6]), [1, 2], np.array([0, 0, 1, 1]), estimates[[0, 1, 2, 5]]
    )
    assert needed[0, :2].tolist() == [1, 2]
    assert needed[0, 2:].min() > 4
    assert needed[1].tolist() == [1, 5, 2, 5]


def test_widths_are_kept() -> None:
    curves = {10: ((Width(1, 10), 0.5), (Width(4, 20), 0.97)), 100: ((Width(4, 100), 0.9),)}
    widths = Widths({"text": curves}, {"text": 30})
    assert Widths.from_json(widths.to_json()) == widths
    assert widths.width("text", 0.95, 10) == Width(4, 20)
    assert widths.width("text", 0.95, 11) is None
    assert widths.width("text", 0.95, 101) is None
    assert widths.width("image", 0.5, 10) is None


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 200), st.integers(0, 2**16))
def test_the_largest_values_are_found(size: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 900, size).astype(np.float32)  # with ties
    found = largest(values, count)
    assert len(set(found.tolist())) == len(found) == min(size, count)
    assert sorted(values[found]) == sorted(values)[-count:]


def test_an_item_with_almost_all_vectors_can_be_compacted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "LISTED_ROWS", 1000)
    with Index.create(tmp_path / "x.index", dim=DIM) as made:
        made.add(vectors=[VECTORS[:2990], *VECTORS[2990:]])
        made.compact()
        assert len(made.search(VECTORS[0], 20)) == 11


def test_an_index_whose_bundle_is_gone_can_be_compacted(
    tmp_path: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "LISTED_ROWS", 40)
    moved = tiny_bundle.path.rename(tmp_path / "clip.mmedge")
    with Index.create(tmp_path / "x.index", moved) as made:
        made.add(vectors=VECTORS[:60, : made.dim])
        moved.rename(tmp_path / "elsewhere.mmedge")
        made.compact()
        assert len(made.search(VECTORS[0, : made.dim], 5)) == 5


def listed(index: Index) -> tuple[int, dict[str, int | None]]:
    """How many lists there are, and how many of them each kind of query needs."""
    (stats, tail) = index.stats().segments
    assert tail.vectors == 0
    return stats.lists, stats.recall


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["vectors", "lists", "missing"])
def test_a_repaired_snapshot_has_the_lists_that_it_had(index: Index, damage: str) -> None:
    before = listed(index)
    assert before[1].keys() == {"text", "vector"}
    (path,) = (index.path / "snapshots").iterdir()
    if damage == "missing":
        path.unlink()
    else:
        flip(path, 1000 if damage == "vectors" else -1)
    with Index.open(index.path) as again:
        assert again.verify(repair=True).ok
        assert again.verify().problems == ()
        assert listed(again) == before
        assert recall(again, unit(clustered(60, 3) + 0.4), 0.95, modality="text") >= 0.93


def test_a_repair_lists_what_came_and_went_since(index: Index) -> None:
    index.add(vectors=clustered(50, 8), ids=[f"new{number}" for number in range(50)])
    index.delete([f"{number:04d}" for number in range(100)])
    (path,) = (index.path / "snapshots").iterdir()
    path.unlink()
    assert verify_index(index.path, repair=True).ok
    with Index.open(index.path) as again:
        lists, widths = listed(again)
        assert again.stats().segments[0].vectors == ROWS - 50
        assert lists > 100
        assert set(widths) == {"text", "vector"}
        assert again.search(clustered(50, 8)[7], 1, recall=0.9)[0].id == "new7"


def test_a_recovered_record_has_lists(index: Index) -> None:
    before = listed(index)
    index.close()
    with closing(sqlite3.connect(index.path / RECORD)) as record, record:
        record.execute("UPDATE vectors SET crc = crc + 1 WHERE row = 5")
    done = verify_index(index.path, repair=True)
    assert "recovered the record into a new one; the old one is in damaged/" in done.repaired
    assert done.lost == ()
    with Index.open(index.path) as again:
        assert listed(again) == before
        assert again.verify().problems == ()


def test_lists_are_measured_again_with_the_queries_of_the_last_time(index: Index) -> None:
    before = listed(index)
    index.compact()  # ready vectors: there is nothing to make queries of
    assert listed(index) == before
    index.compact({"audio": unit(clustered(60, 9))})
    assert listed(index)[1].keys() == {"audio", "vector"}


def test_a_kind_of_few_queries_or_none_is_not_measured(index: Index) -> None:
    index.compact({"text": np.empty((0, DIM), np.float32), "audio": clustered(19, 2)})
    assert listed(index)[1].keys() == {"vector"}


def test_damaged_widths_cost_no_match_and_are_repaired(index: Index) -> None:
    before = listed(index)
    with closing(sqlite3.connect(index.path / RECORD)) as record, record:
        record.execute("UPDATE snapshots SET widths = '{'")
    with Index.open(index.path) as opened:
        assert [match.id for match in opened.search(VECTORS[7], 5)] == exact_ids(VECTORS[7], 5)
        assert "widths" in opened.stats().damaged[0]
    assert "widths" in verify_index(index.path).problems[0]
    assert verify_index(index.path, repair=True).ok
    assert verify_index(index.path).problems == ()
    assert listed(index) == before


@pytest.mark.parametrize(
    "row", [("smell", b"\0" * 4 * DIM), ("text", b"\0"), ("text", "x" * 4 * DIM)]
)
def test_damaged_queries_are_refused(index: Index, row: tuple[str, object]) -> None:
    with closing(sqlite3.connect(index.path / RECORD)) as record, record:
        record.execute("INSERT INTO queries VALUES (?, ?)", row)
    with pytest.raises(IndexCorruptedError, match="compact"):
        index.compact()
    index.compact({"text": clustered(60, 2)})
    index.compact()


def test_a_migrated_index_has_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "LISTED_ROWS", 40)
    first, second = two_spaces(tmp_path)
    with Index.create(tmp_path / "x.index", first) as made:
        made.add(texts=[f"text {number}" for number in range(150)])
        made.compact()
        before = listed(made)
        assert before[0] > 0
        assert before[1].keys() == {"text"}
        made.migrate(second)
        after = listed(made)
        assert (after[0], after[1].keys()) == (before[0], {"text"})
        assert made.space == "tiny-0002"
        assert made.verify().problems == ()
        (path,) = (made.path / "snapshots").iterdir()
        path.unlink()
        assert made.verify(repair=True).ok
        assert listed(made) == after


def test_an_index_without_lists_gets_none_by_a_migration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "LISTED_ROWS", 10)
    first, second = two_spaces(tmp_path)
    with Index.create(tmp_path / "x.index", first) as made:
        made.add(texts=[f"text {number}" for number in range(20)])
        made.migrate(second)
        assert listed(made) == (0, {})


@pytest.mark.parametrize(
    ("query", "kind"),
    [
        ("red", "text"),
        (["red", "blue"], "text"),
        (Path("a.jpg"), "image"),
        (VECTORS[0], None),
        (VECTORS[:2], None),
        ([VECTORS[0], VECTORS[1]], None),
        (Query("red"), "text"),
        (Query(VECTORS[0]), None),
        (Query(["red", Path("a.jpg")]), "several"),
        (Query([VECTORS[0], VECTORS[1]]), "several"),
        (Query("red", unlike="blue"), "several"),
    ],
)
def test_a_mixture_is_no_measured_kind(query: object, kind: str | None) -> None:
    assert query_kind(query) == kind
