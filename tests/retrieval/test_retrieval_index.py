"""What an index holds, finds and refuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from indexes import DIM, filled, ids, names, vectors
from PIL import Image

from mmedge.bundle import Bundle
from mmedge.errors import (
    BundleError,
    DTypeError,
    InputError,
    MmedgeError,
    RetrievalError,
    ShapeError,
    SpaceMismatchError,
    StorageError,
)
from mmedge.retrieval import Eq, Range
from mmedge.retrieval.index import Index
from mmedge.retrieval.items import Item
from mmedge.retrieval.store import VectorStore
from mmedge.specs import Modality


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Index.create(tmp_path / "a.index", dim=DIM) as made:
        yield made


def normalised(given: np.ndarray) -> np.ndarray:
    return given / np.linalg.norm(given, axis=-1, keepdims=True)


def test_added_items_are_found_after_reopening(tmp_path: Path) -> None:
    given = vectors(50)
    with Index.create(tmp_path / "a.index", dim=DIM) as index:
        returned = index.add(
            vectors=given,
            ids=names(50),
            times=[float(n) for n in range(50)],
            sources=[f"camera{n % 2}" for n in range(50)],
            texts=[f"text {n}" for n in range(50)],
            metadata=[{"n": n, "tags": ["a", "b"], "on": n % 2 == 0} for n in range(50)],
            content_hashes=[f"{n}" for n in range(50)],
        )
        assert returned == names(50)
    with Index.open(tmp_path / "a.index", read_only=True) as index:
        assert len(index) == 50
        (match, *_) = index.search(given[7], 3)
        assert (match.id, match.part, match.time, match.source) == ("item7", 0, 7.0, "camera1")
        assert match.metadata == {"n": 7, "tags": ["a", "b"], "on": False}
        assert math.isclose(match.score, 1, abs_tol=2e-3)
        (item,) = index.get("item7")
        assert item is not None
        assert (item.text, item.content_hash) == ("text 7", "7")
        np.testing.assert_allclose(item.vectors, normalised(given[7:8]), atol=1e-3)


def test_search_is_exact_and_ordered(index: Index) -> None:
    given, queries = vectors(300), vectors(5, seed=1)
    index.add(vectors=given, ids=names(300))
    true = normalised(queries) @ normalised(given).T
    for query, found, scores in zip(queries, index.search(queries, 10), true, strict=True):
        assert ids(found) == [f"item{n}" for n in np.argsort(-scores)[:10]]
        assert ids(index.search(query, 10)) == ids(found)
        np.testing.assert_allclose([m.score for m in found], np.sort(scores)[::-1][:10], atol=2e-3)


def test_shapes_of_results(index: Index) -> None:
    assert index.search(vectors(1)[0], 3) == []
    assert index.search(vectors(2), 3) == [[], []]
    assert index.search([], 3) == []
    index.add(vectors=vectors(3), ids=names(3))
    assert len(index.search(vectors(1)[0], 10)) == 3
    assert [len(found) for found in index.search(list(vectors(2)), 2)] == [2, 2]


def test_an_item_of_several_vectors_is_found_once_by_its_nearest(index: Index) -> None:
    given = vectors(6)
    index.add(vectors=[given[:3], given[3], given[4:]], ids=["video", "photo", "clip"])
    assert len(index) == 3
    (first, *rest) = index.search(given[2], 10)
    assert (first.id, first.part) == ("video", 2)
    assert sorted(ids(rest)) == ["clip", "photo"]
    (video,) = index.get(["video"])
    assert video is not None
    assert video.vectors.shape == (3, DIM)


def test_delete_and_add_again(index: Index) -> None:
    given = vectors(10)
    index.add(vectors=given, ids=names(10))
    assert index.delete(["item3", "item4", "unknown"]) == 2
    assert len(index) == 8
    assert "item3" not in index
    assert index.get(["item3", "item5"])[0] is None
    assert not {"item3", "item4"} & set(ids(index.search(given[3], 10)))
    index.add(vectors=given[3], ids="item3")
    assert index.search(given[3], 1)[0].id == "item3"


def test_update_changes_only_the_given_fields(index: Index) -> None:
    given = vectors(3)
    index.add(vectors=given[:2], ids=["a", "b"], times=[1, 2], metadata=[{"n": 1}, {"n": 2}])
    (before,) = index.get("a")
    index.update("a", metadata={"m": 5})
    (item,) = index.get("a")
    assert item is not None
    assert before is not None
    assert (item.metadata, item.time) == ({"m": 5}, 1.0)
    assert item.revision > before.revision
    np.testing.assert_array_equal(item.vectors, before.vectors)
    index.update(["a", "b"], vectors=[given[2], given[2]], times=[8, 9])
    assert [m.time for m in index.search(given[2], 2)] == [8.0, 9.0]
    assert len(index.search(given[0], 10)) == 2


def test_update_and_add_change_all_items_or_none(index: Index) -> None:
    index.add(vectors=vectors(2), ids=["a", "b"])
    with pytest.raises(InputError, match=r"'c'.*not in the index"):
        index.update(["a", "c"], metadata=[{"n": 1}, {"n": 2}])
    (item,) = index.get("a")
    assert item is not None
    assert item.metadata == {}
    with pytest.raises(InputError, match=r"'b'.*in the index already"):
        index.add(vectors=vectors(2), ids=["new", "b"])
    assert "new" not in index


def test_ids_are_made_where_none_are_given(index: Index) -> None:
    made = index.add(vectors=vectors(5))
    assert len(set(made)) == len(index) == 5
    assert all(name in index for name in made)


def test_filters_hold_inside_the_search(index: Index) -> None:
    given = vectors(100)
    index.add(
        vectors=given, ids=names(100), metadata=[{"n": n} for n in range(100)], times=range(100)
    )
    found = index.search(given[0], 5, where=Range("n", low=95))
    assert sorted(ids(found)) == ["item95", "item96", "item97", "item98", "item99"]
    index.update("item95", metadata={"n": 0})
    assert len(index.search(given[0], 5, where=Range("n", low=95))) == 4
    index.add(vectors=given[:1], ids="late", metadata={"n": 95})
    assert len(index.search(given[0], 5, where=Range("n", low=95))) == 5
    with pytest.raises(InputError, match="Did you mean n"):
        index.search(given[0], 5, where=Eq("N", 1))


def test_a_view_follows_other_handles(tmp_path: Path) -> None:
    given = vectors(40)
    with filled(tmp_path / "a.index", 10) as writer, Index.open(tmp_path / "a.index") as reader:
        for number in range(10, 40):
            assert len(reader) == len(reader.search(given[0], 100)) == number
            writer.add(vectors=given[number], ids=f"item{number}", durability="batch")
            assert reader.search(given[number], 1)[0].id == f"item{number}"
            writer.delete(f"item{number - 10}")
            assert f"item{number - 10}" not in ids(reader.search(given[number - 10], 100))
            writer.add(vectors=given[number - 10], ids=f"item{number - 10}", durability="batch")


def test_all_items_come_in_order_and_changes_once_an_id(index: Index) -> None:
    index.add(vectors=vectors(600), ids=names(600), durability="batch")
    assert [item.id for item in index.items(vectors=False)] == names(600)
    cursor, seen = None, []
    index.delete(["item1", "item2"])
    index.update("item3", metadata={"n": 1})
    while found := index.changes(cursor, 100):
        seen += found
        cursor = found[-1].cursor
    assert len(seen) == len({change.id for change in seen}) == 600
    assert [c.id for c in seen[-3:]] == ["item1", "item2", "item3"]
    assert [c.deleted for c in seen[-3:]] == [True, True, False]
    index.add(vectors=vectors(1), ids="item1")
    (change,) = index.changes(cursor, 100)
    assert not change.deleted
    assert index.revisions(["item1", "item2", "none"]) == [
        (change.revision, index.identity), (seen[-2].revision, index.identity), None
    ]  # fmt: skip
    with pytest.raises(InputError, match="cursor"):
        index.changes("other:3", 1)


def test_upsert_lets_the_later_change_win(index: Index) -> None:
    given = normalised(vectors(3)).astype(np.float32)
    old = Item("a", given[:1], revision=10, origin="x")
    assert index.upsert([old]) == 1
    assert index.upsert([old]) == 0
    assert index.upsert([dataclasses.replace(old, revision=9, metadata={"n": 1})]) == 0
    assert index.upsert([dataclasses.replace(old, origin="y", vectors=given[1:])]) == 1
    (item,) = index.get("a")
    assert item is not None
    assert (item.revision, item.origin, item.vectors.shape) == (10, "y", (2, DIM))
    assert index.delete(["a"], revision=9, origin="z") == 0
    assert index.delete(["a", "b"], revision=12, origin="x") == 1
    assert index.upsert([dataclasses.replace(old, revision=11)]) == 0
    assert index.upsert([Item("b", given[:1], revision=11)]) == 0  # deleted before it came
    assert index.upsert([dataclasses.replace(old, revision=0)]) == 1  # here and now
    (item,) = index.get("a")
    assert item is not None
    assert item.revision > 12


def test_an_index_is_a_vector_store(index: Index) -> None:
    store: VectorStore = index
    assert store.upsert([Item("a", vectors(2))]) == 1
    assert store.search(vectors(1), 1) != [[]]
    assert (len(store), store.dim, store.space) == (1, DIM, None)


def test_times_are_seconds_or_datetimes_with_a_zone(index: Index) -> None:
    moment = datetime(2026, 1, 2, tzinfo=timezone.utc)
    index.add(vectors=vectors(2), ids=["a", "b"], times=[moment, None])
    assert [item.time for item in index.get(["a", "b"]) if item] == [moment.timestamp(), None]
    with pytest.raises(InputError, match="time zone"):
        index.add(vectors=vectors(1), times=datetime(2026, 1, 2))


NAN = vectors(3)
NAN[1, 2] = math.nan
ZERO = vectors(3)
ZERO[2] = 0


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"vectors": vectors(2, dim=31)}, ShapeError, "got width 31, expected 32"),
        ({"vectors": [vectors(2), vectors(1, dim=8)[0]]}, ShapeError, r"vectors\[1\].*width 8"),
        ({"vectors": NAN}, InputError, r"vectors\[1\] holds NaN"),
        ({"vectors": [vectors(2), NAN]}, InputError, r"vectors\[1\] holds NaN"),
        ({"vectors": ZERO}, InputError, r"vectors\[2\] is zero"),
        ({"vectors": vectors(2).astype(np.int8)}, DTypeError, "int8"),
        ({"vectors": [np.empty((0, DIM))]}, ShapeError, "at least one"),
        ({"vectors": vectors(2)[None]}, ShapeError, r"\(1, 2, 32\)"),
        ({}, InputError, "got nothing"),
        ({"vectors": vectors(1), "images": "a.png"}, InputError, "one of them"),
        ({"vectors": vectors(2), "ids": ["a", "a"]}, InputError, r"\['a'\] come more than once"),
        ({"vectors": vectors(2), "ids": ["a"]}, InputError, "got 1 for 2"),
        ({"vectors": vectors(1), "ids": [""]}, InputError, "empty"),
        ({"vectors": vectors(1), "ids": [3]}, InputError, "got int"),
        ({"vectors": vectors(1), "ids": ["a\0b"]}, InputError, "NUL"),
        ({"vectors": vectors(1), "ids": ["\udcff"]}, InputError, "Unicode"),
        ({"vectors": vectors(2), "times": [1.0]}, InputError, "got 1 for 2"),
        ({"vectors": vectors(1), "times": [math.inf]}, InputError, "finite"),
        ({"vectors": vectors(1), "times": ["now"]}, InputError, "got str"),
        ({"vectors": vectors(1), "metadata": {"a": math.nan}}, InputError, "finite"),
        ({"vectors": vectors(1), "metadata": {"a": {"b": 1}}}, InputError, "got dict"),
        ({"vectors": vectors(1), "metadata": {"a": [1]}}, InputError, "got int"),
        ({"vectors": vectors(1), "metadata": {"a": 2**70}}, InputError, "64 bits"),
        ({"vectors": vectors(1), "metadata": {'a"': 1}}, InputError, "quote"),
        ({"vectors": vectors(1), "metadata": ["a"]}, InputError, "got str"),
        ({"vectors": vectors(1), "durability": "none"}, InputError, "durability"),
        ({"texts": "a red mug"}, RetrievalError, "no bundle"),
    ],
)
def test_items_that_cannot_be_added(
    index: Index, given: dict[str, object], error: type[MmedgeError], words: str
) -> None:
    with pytest.raises(error, match=words):
        index.add(**given)  # type: ignore[arg-type]
    assert len(index) == 0
    assert index.search(vectors(1)[0], 3) == []


@pytest.mark.parametrize(
    ("query", "k", "error"),
    [
        (vectors(1, dim=8)[0], 3, ShapeError),
        (NAN, 3, InputError),
        (ZERO[2], 3, InputError),
        (vectors(1), 0, InputError),
        (vectors(1), 2.5, InputError),
        (vectors(1).astype(np.int32), 3, MmedgeError),
        (7, 3, InputError),
    ],
)
def test_queries_that_cannot_be_searched(
    index: Index, query: object, k: int, error: type[MmedgeError]
) -> None:
    with pytest.raises(error):
        index.search(query, k)  # type: ignore[call-overload]


@pytest.mark.parametrize("recall", [0, 1.1, "high"])
def test_recall_is_a_share(index: Index, recall: float) -> None:
    with pytest.raises(InputError, match="recall"):
        index.search(vectors(1), 3, recall=recall)


def test_create_takes_a_free_place_and_one_of_bundle_and_dim(tmp_path: Path) -> None:
    filled(tmp_path / "a.index", 1).close()
    with pytest.raises(StorageError, match="exists already"):
        Index.create(tmp_path / "a.index", dim=DIM)
    with pytest.raises(InputError, match="either"):
        Index.create(tmp_path / "b.index")
    with pytest.raises(InputError, match="dim"):
        Index.create(tmp_path / "b.index", dim=0)
    with pytest.raises(BundleError):
        Index.create(tmp_path / "b.index", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.index"]


def test_a_closed_index_is_an_error(index: Index) -> None:
    index.close()
    index.close()
    for call in (lambda: len(index), lambda: index.search(vectors(1), 1), index.flush):
        with pytest.raises(RetrievalError, match="closed"):
            call()


def photo(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (9, 12, 3), np.uint8))


def test_images_and_texts_are_embedded_by_the_bundle(tiny_bundle: Bundle, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        photo(number).save(path)
    with Index.create(tmp_path / "a.index", tiny_bundle.path) as index:
        assert index.space == "tiny-0001"
        index.add(images=paths, texts=["a red circle", None, None])
        made = index.add(images=[photo(7), paths[0].read_bytes()])
        index.add(texts=["red circle", "blue square"], ids=["red", "blue"])
        file, *_, bytes_ = index.get([str(paths[0]), *made])
        red, blue = index.get(["red", "blue"])
        assert file is not None
        assert bytes_ is not None
        assert (file.source, file.text) == (str(paths[0]), "a red circle")
        assert file.content_hash == bytes_.content_hash
        assert bytes_.source is None
        assert red is not None
        assert (red.text, red.source, red.content_hash) == ("red circle", None, None)
        assert blue is not None
        assert ids(index.search("red circle", 1)) == ["red"]
        assert ids(index.search(photo(7), 1)) == [made[0]]
        assert ids(index.search(paths[1], 1)) == [str(paths[1])]
        assert [found[0].id for found in index.search(["red circle", "blue square"], 1)] == [
            "red",
            "blue",
        ]
        assert [found[0].id for found in index.search(paths, 1)][1:] == [str(p) for p in paths[1:]]
        index.update("blue", texts="green circle")
        assert ids(index.search("green circle", 1)) == ["blue"]
        index.update(str(paths[0]), texts="green circle")  # words alone: its vector is an image's
        (again,) = index.get(str(paths[0]))
        assert again is not None
        np.testing.assert_array_equal(again.vectors, file.vectors)
    with Index.open(tmp_path / "a.index") as index:
        assert ids(index.search("green circle", 1)) == ["blue"]


def test_an_image_that_cannot_be_read_adds_nothing(tiny_bundle: Bundle, tmp_path: Path) -> None:
    photo(1).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    with Index.create(tmp_path / "a.index", tiny_bundle.path) as index:
        with pytest.raises(InputError, match=r"bad\.png"):
            index.add(images=[tmp_path / "good.png", tmp_path / "bad.png"])
        assert len(index) == 0


def test_vectors_of_another_space_are_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with Index.create(tmp_path / "a.index", tiny_bundle.path) as index:
        given = vectors(2, dim=index.dim)
        index.add(vectors=given, space="tiny-0001")
        for call in (
            lambda: index.add(vectors=given, space="other"),
            lambda: index.search(given, 1, space="other"),
        ):
            with pytest.raises(SpaceMismatchError, match=r"tiny-0001.*other"):
                call()


def test_ready_vectors_name_their_space(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "a.index"
    with Index.create(path, dim=4, space="tiny-0001") as index:
        index.add(vectors=vectors(2, dim=4), ids=["a", "b"], space="tiny-0001")
        for call in (
            lambda: index.add(vectors=vectors(1, dim=4), space="other"),
            lambda: index.update("a", vectors=vectors(1, dim=4), space="other"),
            lambda: index.search(vectors(1, dim=4), 1, space="other"),
        ):
            with pytest.raises(SpaceMismatchError, match=r"tiny-0001.*other"):
                call()
        assert index.stats().space == index.space == "tiny-0001"
    with Index.open(path, bundle=tiny_bundle.path) as index:
        index.add(texts="red circle", ids="red")
        assert ids(index.search("red circle", 1)) == ["red"]
    other = Index.create(tmp_path / "b.index", dim=4, space="other")
    other.close()
    with pytest.raises(SpaceMismatchError, match=r"other.*tiny-0001"):
        Index.open(tmp_path / "b.index", bundle=tiny_bundle.path)


@pytest.mark.parametrize("space", ["", "a\x00b", "x" * 1025, "\ud800", 5])
def test_a_space_that_cannot_be_stored_is_refused(space: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="space: got"):
        Index.create(tmp_path / "a.index", dim=8, space=space)
    assert not (tmp_path / "a.index").exists()


def test_a_bundles_space_is_its_own(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="beside bundle="):
        Index.create(tmp_path / "a.index", tiny_bundle.path, space="tiny-0001")


def test_a_variant_that_shares_the_space_is_accepted(tiny_bundle: Bundle, tmp_path: Path) -> None:
    Index.create(tmp_path / "a.index", tiny_bundle.path).close()
    with Index.open(
        tmp_path / "a.index", bundle=tiny_bundle.path, precision="int8-dynamic"
    ) as index:
        index.add(texts="red circle", ids="red")
        assert ids(index.search("red circle", 1)) == ["red"]


def test_a_bundle_that_has_moved_is_named(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with Index.create(tmp_path / "a.index", tiny_bundle.path) as index:
        index.add(texts="red circle", ids="red")
        (item,) = index.get("red")
    tiny_bundle.path.rename(tmp_path / "moved.mmedge")
    with Index.open(tmp_path / "a.index") as index:
        assert item is not None
        assert ids(index.search(item.vectors[0], 1)) == ["red"]  # ready vectors need no bundle
        with pytest.raises(RetrievalError, match=r"tiny\.mmedge is not there"):
            index.search("red circle", 1)
    with Index.open(tmp_path / "a.index", bundle=tmp_path / "moved.mmedge") as index:
        assert ids(index.search("red circle", 1)) == ["red"]


def test_an_index_names_its_bundle_what_it_embeds_and_its_fields(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    with Index.create(tmp_path / "a.index", tiny_bundle.path) as index:
        assert index.bundle == tiny_bundle.path
        assert index.encodes == {Modality.IMAGE, Modality.TEXT}
        assert index.fields() == ()
        index.add(texts=["red"], metadata=[{"speed": 1, "colour": None}])
        assert index.fields() == ("colour", "speed")
    with Index.create(tmp_path / "b.index", dim=3) as index:
        assert index.bundle is None
        with pytest.raises(RetrievalError, match="no bundle"):
            _ = index.encodes


def test_an_index_remembers_its_folders(index: Index, tmp_path: Path) -> None:
    assert index.folders() == ()
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for name in ("photos", "link", "videos"):
        index.remember_folder(tmp_path / name)
    assert index.folders() == (tmp_path / "photos", tmp_path / "videos")
