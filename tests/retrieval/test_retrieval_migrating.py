"""Migration into another embedding space: whole, resumable, and invisible until it is done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from indexes import ids, two_spaces
from PIL import Image

from mmedge.errors import RetrievalError, SpaceMismatchError
from mmedge.retrieval import migrating
from mmedge.retrieval.embedding import Encoder
from mmedge.retrieval.index import Index
from mmedge.retrieval.items import Item
from mmedge.specs import Array


@pytest.fixture
def bundles(tmp_path: Path) -> list[Path]:
    return two_spaces(tmp_path)


@pytest.fixture
def folder(tmp_path: Path, bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A closed index of three photos and three texts."""
    monkeypatch.setattr(migrating, "_ITEMS_AT_ONCE", 2)
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 255, (9, 12, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    with Index.create(tmp_path / "a.index", bundles[0]) as index:
        index.add(images=[tmp_path / f"{number}.png" for number in range(3)], ids=["0", "1", "2"])
        index.add(texts=["red circle", "blue square", "green"], ids=["red", "blue", "green"])
    return tmp_path / "a.index"


def vectors_of(index: Index) -> Array:
    return np.concatenate([item.vectors for item in index.items()])


def test_every_item_is_embedded_again(folder: Path, bundles: list[Path]) -> None:
    counts = []
    with Index.open(folder) as index, Index.open(folder) as reader:
        before = vectors_of(index)
        assert index.migrate(bundles[1], progress=lambda *done: counts.append(done)) == 6
        assert index.space == reader.space == "tiny-0002"
        after = vectors_of(index)
        assert (np.abs(after - before).max(axis=1) > 0).all()
        for handle in (index, reader):  # both follow with the new bundle
            assert ids(handle.search("red circle", 1)) == ["red"]
            np.testing.assert_allclose(handle.embed(texts="green")[0], after[5], atol=3e-4)
        assert index.stats().migrating_to is None
        assert index.verify().problems == ()
    assert counts == [(2, 6), (4, 6), (6, 6)]
    with Index.open(folder) as index:
        assert index.bundle == bundles[1]
        assert ids(index.search(folder.parent / "1.png", 1)) == ["1"]


def test_an_interrupted_migration_goes_on_where_it_stopped(
    folder: Path, bundles: list[Path]
) -> None:
    class StopError(Exception):
        pass

    def stop(done: int, _: int) -> None:
        if done >= 4:
            raise StopError

    with Index.open(folder) as index:
        before = vectors_of(index)
        with pytest.raises(StopError):
            index.migrate(bundles[1], progress=stop)
        assert index.space == "tiny-0001"  # the old vectors serve
        np.testing.assert_array_equal(vectors_of(index), before)
        assert ids(index.search("red circle", 1)) == ["red"]
        assert index.stats().migrating_to == "tiny-0002"
        index.update("0", images=folder.parent / "2.png")  # what was collected for it is void
        index.delete("1")
        index.add(texts="red square", ids="late")
    with Index.open(folder) as index:
        assert index.migrate(bundles[1]) == 4  # "0", "blue" or so, "green", "late"
        assert len(index) == 6
        (zero, two) = index.get(["0", "2"])
        assert zero is not None
        assert two is not None
        np.testing.assert_array_equal(zero.vectors, two.vectors)
        assert index.verify().problems == ()


def test_items_without_a_source_are_named_or_dropped(folder: Path, bundles: list[Path]) -> None:
    with Index.open(folder) as index:
        index.add(vectors=np.eye(4, dtype=np.float32)[:2], ids=["ready", "other"])
        (folder.parent / "1.png").unlink()
        with pytest.raises(RetrievalError, match="3 items cannot be embedded again"):
            index.migrate(bundles[1])
        assert (index.space, len(index)) == ("tiny-0001", 8)

        def embed(encoder: Encoder, item: Item) -> Array | None:
            return encoder.texts(["a", "photo"]) if item.id == "other" else None

        index.migrate(bundles[1], embed=embed, drop_missing=True)
        assert sorted(item.id for item in index.items()) == [
            "0",
            "2",
            "blue",
            "green",
            *(["other", "red"]),
        ]
        (other,) = index.get("other")
        assert other is not None
        assert other.vectors.shape == (2, 4)


def test_a_bundle_of_the_same_space_changes_only_its_path(
    folder: Path, bundles: list[Path]
) -> None:
    moved = bundles[0].rename(bundles[0].with_name("moved.mmedge"))
    with Index.open(folder) as index:
        before = vectors_of(index)
        assert index.migrate(moved) == 0
        np.testing.assert_array_equal(vectors_of(index), before)
        assert ids(index.search("red circle", 1)) == ["red"]


def test_a_bundle_of_another_space_is_refused(folder: Path, bundles: list[Path]) -> None:
    with pytest.raises(SpaceMismatchError, match=r"tiny-0001.*tiny-0002"):
        Index.open(folder, bundle=bundles[1])
    with Index.open(folder, bundle=bundles[0]) as chosen, Index.open(folder) as index:
        index.migrate(bundles[1])
        with pytest.raises(SpaceMismatchError, match=r"tiny-0002.*tiny-0001"):
            chosen.search("red circle", 1)  # this handle was told which bundle to use
