"""Exports: what other programs read in them, what comes back, and the memory that they take."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from indexes import names, vectors
from stores import contents

from mmedge.errors import InputError, SpaceMismatchError
from mmedge.media.vectors import open_vectors
from mmedge.retrieval.index import Index
from mmedge.retrieval.vector_files import export_vectors, import_vectors

DIM = 8


def varied(folder: Path) -> Index:
    """Items of one and several vectors, with all fields and with none."""
    index = Index.create(folder / "a.index", dim=DIM, space="clip")
    index.add(vectors=vectors(3, dim=DIM), ids=["a", "b", "c"])
    index.add(
        vectors=[vectors(4, 1, DIM), vectors(1, 2, DIM)],
        ids=["vidéo \U0001f408", "photo"],
        times=[1.5, 2.5],
        sources=["cam0", None],
        texts=["a red mug\nbeside a cat", None],
        metadata=[{"tag": ["é"], "n": 3}, {"x": 0.1}],
        content_hashes=[None, "abc"],
    )
    index.delete("b")
    return index


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_an_export_comes_back(tmp_path: Path, suffix: str) -> None:
    with varied(tmp_path) as index, Index.create(tmp_path / "b.index", dim=DIM) as other:
        assert export_vectors(index, tmp_path / f"v{suffix}") == 7
        rows = open_vectors(tmp_path / f"v{suffix}")
        assert (rows.dim, rows.count, rows.space) == (DIM, 7, "clip")
        assert import_vectors(other, rows) == 4
        assert contents(other) == contents(index)
        with (
            Index.create(tmp_path / "c.index", dim=DIM, space="siglip") as third,
            pytest.raises(SpaceMismatchError, match=r"siglip.*clip"),
        ):
            import_vectors(third, rows)


def test_numpy_reads_an_export(tmp_path: Path) -> None:
    with varied(tmp_path) as index:
        export_vectors(index, tmp_path / "v.npz")
    with np.load(tmp_path / "v.npz", allow_pickle=False) as arrays:
        assert arrays["vectors"].shape == (7, DIM)
        assert arrays["vectors"].dtype == np.float16
        assert arrays["ids"].tolist() == ["a", "c", *4 * ["vidéo \U0001f408"], "photo"]
        assert arrays["sources"].tolist() == ["", "", *4 * ["cam0"], ""]
        np.testing.assert_array_equal(arrays["times"], [np.nan, np.nan, 1.5, 1.5, 1.5, 1.5, 2.5])
        assert json.loads(arrays["metadata"][2]) == {"tag": ["é"], "n": 3}
        assert arrays["revision"].dtype == np.int64
        assert str(arrays["space"]) == "clip"


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_an_empty_index_is_exported(tmp_path: Path, suffix: str) -> None:
    with Index.create(tmp_path / "a.index", dim=DIM) as index:
        assert export_vectors(index, tmp_path / f"v{suffix}") == 0
    assert (tmp_path / f"v{suffix}").is_file()


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_an_export_does_not_hold_all_in_memory(tmp_path: Path, suffix: str) -> None:
    path, width, count = tmp_path / f"v{suffix}", 256, 12_000
    with Index.create(tmp_path / "a.index", dim=width) as index:
        for start in range(0, count, 2000):
            index.add(
                vectors=vectors(2000, start, width),
                ids=names(2000, f"{start}/"),
                texts=["x" * 200] * 2000,
                durability="batch",
            )
        export_vectors(index, path)  # what is imported for it does not count
        tracemalloc.start()
        export_vectors(index, path)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 2 * width * count  # its vectors


def test_a_moment_is_unchanged(tmp_path: Path) -> None:
    with varied(tmp_path) as index, Index.open(tmp_path / "a.index") as writer:
        with index.moment() as moment:
            before = [item.id for item in moment.items()]
            writer.delete("a")
            writer.add(vectors=vectors(1, dim=DIM), ids="new")
            assert [item.id for item in moment.items()] == before == list(moment.texts("id"))
            assert moment.counts().tolist() == [1, 1, 4, 1]
        assert {item.id for item in index.items()} == {*before, "new"} - {"a"}


def test_another_suffix_writes_nothing(tmp_path: Path) -> None:
    with varied(tmp_path) as index, pytest.raises(InputError, match=r"expected \.npz or \.parquet"):
        export_vectors(index, tmp_path / "v.csv")
    assert not (tmp_path / "v.csv").exists()
