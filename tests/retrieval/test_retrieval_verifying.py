"""Damage is found, repaired from the record, or recovered as far as it can be read."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from indexes import DIM, ids, names, vectors

from mmedge.errors import IndexCorruptedError, MmedgeError, RetrievalError, StorageError
from mmedge.retrieval import upkeep
from mmedge.retrieval.index import Index
from mmedge.retrieval.rows import item_crc
from mmedge.retrieval.schema import RECORD
from mmedge.retrieval.verifying import verify_index


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A closed index of 300 items with words, two snapshots and a tail."""
    monkeypatch.setattr(upkeep, "_TAIL_ROWS", 64)
    monkeypatch.setattr(upkeep, "_MERGED_ROWS", 64)
    with Index.create(tmp_path / "a.index", dim=DIM) as index:
        for start in range(0, 300, 100):
            part = slice(start, start + 100)
            index.add(
                vectors=vectors(300)[part],
                ids=names(300)[part],
                texts=[f"word{n}" for n in range(300)[part]],
                metadata=[{"n": n} for n in range(300)[part]],
                durability="batch",
            )
        index.delete(["item0", "item150"])
    return tmp_path / "a.index"


def sql(folder: Path, *statements: str) -> None:
    with closing(sqlite3.connect(folder / RECORD)) as record, record:
        for statement in statements:
            record.execute(statement)


def test_a_whole_index_has_no_problems(folder: Path) -> None:
    with Index.open(folder) as index:
        found = index.verify()
        assert (found.ok, found.problems) == (True, ())
        assert index.verify(repair=True).repaired == ()
        assert len(list((folder / "snapshots").iterdir())) == 3


@pytest.mark.parametrize("place", [0, 100, 200, 5000, -30])
def test_every_damage_of_a_snapshot_is_found_and_repaired(folder: Path, place: int) -> None:
    path = min((folder / "snapshots").iterdir())
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    with Index.open(folder) as index:
        index.search(vectors(1), 3)
        found = index.verify()
        assert not found.ok
        assert path.name in found.problems[0]
        assert index.verify(repair=True).ok
        assert index.verify().problems == ()
        assert ids(index.search(vectors(300)[7], 1)) == ["item7"]
        assert len(index.search(vectors(1), 400)[0]) == 298


def test_a_lost_text_index_is_made_again(folder: Path) -> None:
    sql(folder, "INSERT INTO words(words) VALUES ('delete-all')")
    assert "text index" in verify_index(folder).problems[0]
    assert verify_index(folder, repair=True).ok
    with closing(sqlite3.connect(folder / RECORD)) as record:
        found = record.execute("SELECT rowid FROM words WHERE words MATCH 'word7'").fetchall()
    assert found == [(8,)]
    assert verify_index(folder).problems == ()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE items SET metadata = '{\"n\": 8}' WHERE id = 'item7'",
        "UPDATE vectors SET vector = zeroblob(64) WHERE key = 8",
        "UPDATE vectors SET vector = zeroblob(1000000) WHERE key = 8",
        "DELETE FROM vectors WHERE key = 8",
        "DELETE FROM items WHERE id = 'item7'",
        "UPDATE about SET items = 5",
        "UPDATE about SET keys = 5",
    ],
)
def test_a_changed_record_is_found_and_the_rest_recovered(folder: Path, statement: str) -> None:
    sql(folder, statement)
    assert not verify_index(folder).ok
    with Index.open(folder) as index:
        done = index.verify(repair=True)
        assert done.ok
        assert verify_index(folder).problems == ()
        lost = statement.startswith("DELETE FROM items")
        assert len(index) == 298 - lost - sum(text.endswith("its vectors") for text in done.lost)
        assert ids(index.search(vectors(300)[9], 1)) == ["item9"]
        index.add(vectors=vectors(1), ids="new")
    assert (folder / "damaged" / RECORD).exists()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("id", b"item7"),
        ("time", "noon"),
        ("source", b"a.jpg"),
        ("text", b"word7"),
        ("metadata", "[1]"),
        ("metadata", "{"),
        ("modality", b"image"),
    ],
)
def test_an_item_of_other_types_is_damaged_whatever_its_checksum(
    folder: Path, column: str, value: object
) -> None:
    with closing(sqlite3.connect(folder / RECORD)) as record, record:
        record.execute(f"UPDATE items SET {column} = ? WHERE key = 8", (value,))  # noqa: S608
        covered = record.execute(
            """SELECT id, time, source, text, metadata, content_hash, modality
            FROM items WHERE key = 8"""
        ).fetchone()
        record.execute("UPDATE items SET crc = ? WHERE key = 8", (item_crc(covered),))
    with Index.open(folder) as index, pytest.raises(IndexCorruptedError, match="key 8"):
        index.search(vectors(300)[7], 1)
    assert verify_index(folder, repair=True).ok
    assert verify_index(folder).problems == ()


def test_vectors_that_the_record_lost_come_from_the_snapshots(folder: Path) -> None:
    sql(folder, "DELETE FROM vectors WHERE key < 90")
    done = verify_index(folder, repair=True)
    assert done.lost == ()
    with Index.open(folder) as index:
        assert len(index) == 298
        assert ids(index.search(vectors(300)[7], 1)) == ["item7"]


@pytest.mark.parametrize("page", range(1, 27, 2))
def test_a_bad_page_is_found_and_the_rest_recovered(folder: Path, page: int) -> None:
    place = page * 8192
    assert place + 8192 <= (folder / RECORD).stat().st_size
    with (folder / RECORD).open("r+b") as file:
        file.seek(place)
        file.write(np.random.default_rng(page).bytes(8192))
    with pytest.raises(IndexCorruptedError, match="--repair"):
        Index.open(folder)
    assert verify_index(folder).problems != ()
    done = verify_index(folder, repair=True)
    assert verify_index(folder).problems == ()
    with Index.open(folder) as index:
        assert len(index) >= 298 - max(100, len(done.lost))
        items = list(index.items())
        for item in items[::20]:
            assert ids(index.search(item.vectors[0], 1)) == [item.id]
        index.add(vectors=vectors(1), ids="new")
        missing = {*names(300), "new"} - {item.id for item in index.items()} - {"item0", "item150"}
        assert bool(missing) <= bool(done.lost)


def test_a_truncated_record_is_reported_as_damaged(folder: Path) -> None:
    data = (folder / RECORD).read_bytes()
    (folder / RECORD).write_bytes(data[: len(data) // 2 // 8192 * 8192])
    with pytest.raises(IndexCorruptedError, match="--repair"):
        Index.open(folder)
    done = verify_index(folder, repair=True)
    assert done.repaired
    with Index.open(folder) as index:
        assert index.verify().problems == ()


def test_paths_that_are_no_index(tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match="does not exist"):
        Index.open(tmp_path / "none.index")
    with pytest.raises(RetrievalError, match=r"without record\.sqlite"):
        Index.open(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RetrievalError, match="no folder"):
        Index.open(tmp_path / "file")
    (tmp_path / RECORD).write_text("no SQLite file at all, but long enough to be read as one" * 90)
    with pytest.raises(IndexCorruptedError, match="not a database"):
        Index.open(tmp_path)
    (tmp_path / RECORD).unlink()
    with closing(sqlite3.connect(tmp_path / RECORD)) as other, other:
        other.execute("CREATE TABLE t(a)")
    with pytest.raises(RetrievalError, match="another program"):
        Index.open(tmp_path)


def test_a_newer_format_is_named(folder: Path) -> None:
    sql(folder, "PRAGMA user_version = 7")
    with pytest.raises(RetrievalError, match=r"format 7.*reads 2.*Update mmedge"):
        Index.open(folder)
    with pytest.raises(RetrievalError, match="format 7"):
        verify_index(folder, repair=True)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER INSERT ON items BEGIN DELETE FROM items; END",
        "CREATE VIEW more AS SELECT load_extension('x')",
        "CREATE INDEX more ON items(lower(id))",
        "DROP INDEX items_time",
        "ALTER TABLE items ADD COLUMN more",
    ],
)
def test_a_planted_schema_is_refused(folder: Path, statement: str) -> None:
    sql(folder, statement)
    with pytest.raises(IndexCorruptedError, match="schema"):
        Index.open(folder)


@pytest.mark.parametrize("name", ["record.sqlite", "record.sqlite-wal", "lock", "snapshots"])
def test_planted_links_are_not_followed(folder: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    if (folder / name).exists():
        (folder / name).rename(target)
    (folder / name).symlink_to(target)
    with pytest.raises(IndexCorruptedError, match="is a link"):
        Index.open(folder)


def test_nonsense_numbers_are_refused(folder: Path) -> None:
    for statement in ("UPDATE about SET dim = 1000000000", "UPDATE about SET dim = 'x'"):
        sql(folder, statement)
        with pytest.raises(IndexCorruptedError, match="about"):
            Index.open(folder)


def hold_the_lock(folder: Path, ready: object, done: object) -> None:
    with Index.open(folder) as index, index._record.exclusive():
        ready.set()  # type: ignore[attr-defined]
        done.wait(60)  # type: ignore[attr-defined]


def test_another_writer_is_named_and_readers_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmedge.retrieval.record._WAIT_S", 0.05)
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold_the_lock, args=(folder, ready, done))
    other.start()
    try:
        assert ready.wait(60)
        with Index.open(folder) as index:
            with pytest.raises(RetrievalError, match=f"written by process {other.pid}"):
                index.add(vectors=vectors(1))
            assert len(index.search(vectors(1), 5)[0]) == 5
    finally:
        done.set()
        other.join()


def test_writing_through_a_reader_is_refused(folder: Path) -> None:
    with (
        Index.open(folder, read_only=True) as index,
        pytest.raises(RetrievalError, match="read_only"),
    ):
        index.add(vectors=vectors(1))


def test_a_full_disk_changes_nothing(folder: Path) -> None:
    with Index.open(folder) as index:
        index.delete("item1")
        writer = index._record._writer
        assert writer is not None
        writer.execute("PRAGMA max_page_count = 1")
        with pytest.raises(StorageError, match="disk is full"):
            index.add(vectors=vectors(2000), ids=names(2000, "new"))
        assert len(index) == 297
        assert ids(index.search(vectors(300)[7], 1)) == ["item7"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_searched_and_not_written(folder: Path) -> None:
    folder.chmod(0o555)
    try:
        with Index.open(folder) as index:
            assert ids(index.search(vectors(300)[7], 1)) == ["item7"]
            with pytest.raises(StorageError, match=r"read-only|permission"):
                index.add(vectors=vectors(1))
    finally:
        folder.chmod(0o755)


def test_a_forked_child_must_open_it_again(folder: Path) -> None:
    with Index.open(folder) as index:
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            try:
                len(index)
            except MmedgeError as error:
                os.write(writing, str(error).encode())
            finally:
                os._exit(0)
        os.close(writing)
        os.waitpid(child, 0)
        assert "Open it in the child" in os.read(reading, 1000).decode()
        os.close(reading)
        assert len(index) == 298
