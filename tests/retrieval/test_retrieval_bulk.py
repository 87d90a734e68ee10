"""Bulk embedding: each file once, whatever becomes of the workers."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from indexes import two_spaces
from PIL import Image

from mmedge.bundle import Bundle
from mmedge.errors import BackendError, InputError, RetrievalError
from mmedge.retrieval import bulk_pool
from mmedge.retrieval.bulk import Embedded, embed_files
from mmedge.retrieval.bulk_pool import Batch, Reply
from mmedge.retrieval.bulk_process import ProcessWorker
from mmedge.retrieval.index import Index
from mmedge.retrieval.record import Durability, Record


@pytest.fixture
def index(tiny_bundle: Bundle, tmp_path: Path) -> Iterator[Index]:
    with Index.create(tmp_path / "photos.index", bundle=tiny_bundle.path) as made:
        yield made


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    """Twelve photos of one colour each."""
    files = []
    for number in range(12):
        file = tmp_path / f"{number:02}.png"
        Image.new("RGB", (8, 8), (20 * number, 255 - 20 * number, 7 * number)).save(file)
        files.append(str(file))
    return files


def check(index: Index, photos: list[str]) -> None:
    """Each photo is there, with its own vector."""
    assert len(index) == len(photos)
    expected = index._encoder.images(photos)
    for item, vector in zip(index.get(photos), expected, strict=True):
        assert item is not None
        assert np.allclose(item.vectors[0], vector, atol=2e-3)
        assert item.source == item.id


def test_every_file_is_embedded_once(index: Index, photos: list[str]) -> None:
    seen: list[Embedded] = []
    files = (Path(photo) for photo in [*photos, photos[0]])
    done = embed_files(index, files, workers=2, batch=5, on_progress=seen.append)
    assert done == seen[-1] == Embedded(written=12)
    check(index, photos)


def test_a_second_run_handles_only_changes(index: Index, photos: list[str]) -> None:
    embed_files(index, photos[:7], workers=1, batch=4)
    Image.new("RGB", (8, 8), (9, 9, 200)).save(photos[3])
    index.add(vectors=np.ones(4), ids=photos[8], sources=photos[8])  # of no known file
    assert embed_files(index, photos, workers=1, batch=4) == Embedded(written=6, unchanged=6)
    check(index, photos)


def test_no_transaction_leaves_a_changed_file_without_its_item(
    index: Index, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill between two transactions the index would be as it is at the end of one."""
    embed_files(index, photos[:8], workers=1, batch=4)
    index.update(photos[1], metadata={"tag": "kitchen"}, texts="a red mug", times=7.0)
    for photo in photos[:6]:
        Image.new("RGB", (8, 8), (200, 9, 9)).save(photo)
    writing, held = Record.writing, []

    @contextmanager
    def watched(record: Record, durability: Durability = "full") -> Iterator[sqlite3.Connection]:
        with writing(record, durability) as connection:
            yield connection
        with Index.open(record.folder, read_only=True) as reader:
            items = reader.get(photos[:8])
            held.append([item is not None and len(item.vectors) for item in items])

    monkeypatch.setattr(Record, "writing", watched)
    assert embed_files(index, photos, workers=1, batch=4).written == 10
    assert len(held) >= 3
    assert all(each == [1] * 8 for each in held)
    check(index, photos)
    (item,) = index.get([photos[1]])
    assert item is not None
    assert (item.metadata, item.text, item.time) == ({"tag": "kitchen"}, "a red mug", 7.0)


def test_items_of_changed_files_can_be_embedded_again_by_another_bundle(
    index: Index, photos: list[str], tmp_path: Path
) -> None:
    """An item of a ready vector that a run embeds from its file is one of an image from then on."""
    index.add(vectors=np.ones(4), ids=photos[0], sources=photos[0])
    embed_files(index, photos[:3], workers=1)
    _, other = two_spaces(tmp_path)
    assert index.migrate(other) == 3


def test_a_file_that_is_no_image_is_skipped(index: Index, photos: list[str]) -> None:
    Path(photos[2]).write_text("no image")
    Path(photos[9]).unlink()
    done = embed_files(index, photos, workers=1, batch=5)
    assert done.written == 10
    assert sorted((each.position, each.path) for each in done.skipped) == [
        (2, photos[2]),
        (9, photos[9]),
    ]
    assert all(each.reason for each in done.skipped)


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_batch_of_a_dead_worker_is_done_again(
    index: Index, photos: list[str], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Workers are killed as they take any batch first, or when they have replied to it."""
    embed, first = ProcessWorker.embed, []

    def killed(worker: ProcessWorker, batch: Batch) -> Reply:
        if batch.tries == 0:
            first.append(batch)
        if batch.tries == 0 and when == "before":
            os.kill(worker._process.pid, signal.SIGKILL)
            worker._process.wait()
        reply = embed(worker, batch)
        if batch.tries == 0:
            os.kill(worker._process.pid, signal.SIGKILL)
        return reply

    monkeypatch.setattr(ProcessWorker, "embed", killed)
    assert embed_files(index, photos, workers=2, batch=3) == Embedded(written=12)
    check(index, photos)
    assert len(first) >= 4


def test_a_file_on_which_workers_die_is_skipped(
    index: Index, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = ProcessWorker.embed

    def killed(worker: ProcessWorker, batch: Batch) -> Reply:
        if photos[4] in {name for _, name in batch.files}:
            os.kill(worker._process.pid, signal.SIGKILL)
            worker._process.wait()
        return embed(worker, batch)

    monkeypatch.setattr(ProcessWorker, "embed", killed)
    done = embed_files(index, photos, workers=1, batch=4)
    assert done.written == 11
    (skipped,) = done.skipped
    assert (skipped.position, skipped.path) == (4, photos[4])
    assert "ended with code -9, twice" in skipped.reason
    check(index, photos[:4] + photos[5:])


def test_workers_that_all_die_end_the_run(
    index: Index, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def died(worker: ProcessWorker, _: Batch) -> Reply:
        raise worker._died()

    monkeypatch.setattr(bulk_pool, "_MOST_DEATHS", 2)
    monkeypatch.setattr(ProcessWorker, "embed", died)
    with pytest.raises(BackendError, match="3 workers died in a row"):
        embed_files(index, photos, workers=1, batch=4)
    assert len(index) == 0


def test_a_bundle_that_cannot_be_loaded_ends_the_run(
    index: Index, photos: list[str], tiny_bundle: Bundle
) -> None:
    (tiny_bundle.path / "manifest.json").write_text("{}")
    with pytest.raises(BackendError, match="A worker cannot load"):
        embed_files(index, photos, workers=2)


def test_errors_while_drawing_files_are_raised(index: Index, photos: list[str]) -> None:
    def files() -> Iterator[str]:
        yield from photos[:4]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        embed_files(index, files(), workers=1, batch=2)


def test_an_index_of_ready_vectors_is_refused(tmp_path: Path) -> None:
    with (
        Index.create(tmp_path / "ready.index", dim=4) as index,
        pytest.raises(RetrievalError, match="no bundle"),
    ):
        embed_files(index, ["a.jpg"])


@pytest.mark.parametrize(("workers", "batch"), [(0, 1), (1, 0)])
def test_no_workers_are_refused(index: Index, workers: int, batch: int) -> None:
    with pytest.raises(InputError, match="at least 1"):
        embed_files(index, [], workers=workers, batch=batch)
