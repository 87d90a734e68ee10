"""Snapshots: written, merged, compacted, replaced under readers, and rebuilt when damaged."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from indexes import DIM, filled, ids, names, vectors

from mmedge.errors import IndexCorruptedError, StorageError
from mmedge.retrieval import upkeep
from mmedge.retrieval.index import Index
from mmedge.specs import Float32Array


@pytest.fixture
def small_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "_TAIL_ROWS", 16)
    monkeypatch.setattr(upkeep, "_MERGED_ROWS", 64)


def files(index: Index) -> list[str]:
    return sorted(path.name for path in (index.path / "snapshots").iterdir())


def check(index: Index, live: dict[str, Float32Array]) -> None:
    """The index holds these items and finds each, through this handle and a fresh one."""
    query = vectors(1, seed=99)[0] / np.linalg.norm(vectors(1, seed=99)[0])
    true = {name: float(each @ query / np.linalg.norm(each)) for name, each in live.items()}
    assert len(index) == len(live)
    with Index.open(index.path, read_only=True) as fresh:
        for handle in (index, fresh):
            found = handle.search(query, len(live) + 5)
            assert {match.id: match.score for match in found} == pytest.approx(true, abs=2e-3)
            assert len(found) == len(live)


@pytest.mark.usefixtures("small_snapshots")
def test_snapshots_follow_a_long_random_history(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    live: dict[str, Float32Array] = {}
    with Index.create(tmp_path / "a.index", dim=DIM) as index:
        for round_ in range(60):
            given = vectors(int(rng.integers(1, 20)), seed=round_ + 1)
            added = names(len(given), f"{round_}-")
            index.add(vectors=given, ids=added, durability="batch")
            live |= dict(zip(added, given, strict=True))
            if round_ % 3 == 0:
                doomed = [name for name in live if rng.random() < 0.3]
                index.delete(doomed, durability="batch")
                live = {name: each for name, each in live.items() if name not in doomed}
            if round_ % 10 == 5:
                name = next(iter(live))
                index.update(name, vectors=given[0], durability="batch")
                live[name] = given[0] + 1e-3 * vectors(1, seed=7)[0]
                index.update(name, vectors=live[name], durability="batch")
            if round_ % 25 == 24:
                index.compact()
                assert len(files(index)) == 1
            if round_ % 6 == 0:
                check(index, live)
        check(index, live)
        assert len(files(index)) > 1


@pytest.mark.usefixtures("small_snapshots")
def test_mostly_deleted_indexes_compact_themselves(tmp_path: Path) -> None:
    with filled(tmp_path / "a.index", 400) as index:
        index.delete(names(390))
        record = sqlite3.connect(index.path / "record.sqlite")
        assert record.execute("SELECT count(*) FROM gone").fetchone() == (0,)
        record.close()
        assert len(index.search(vectors(1), 100)[0]) == 10


@pytest.mark.usefixtures("small_snapshots")
def test_compact_shrinks_the_files(tmp_path: Path) -> None:
    with filled(tmp_path / "a.index", 3000) as index:
        index.flush()
        index.delete(names(2990))
        index.compact()
        size = sum(path.stat().st_size for path in index.path.rglob("*") if path.is_file())
        assert size < 500_000  # deletions are remembered


@pytest.mark.usefixtures("small_snapshots")
@pytest.mark.parametrize("damage", ["missing", "cut", "rows", "header", "link"])
def test_a_damaged_snapshot_is_read_from_the_record(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = vectors(40)
    filled(tmp_path / "a.index", 40).close()
    (path,) = (tmp_path / "a.index" / "snapshots").iterdir()
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[:-8])
    elif damage in ("rows", "header"):
        data[-100 if damage == "rows" else 20] ^= 1
        path.write_bytes(data)
    with Index.open(tmp_path / "a.index") as index:
        if damage == "link":  # planted behind an open index
            path.symlink_to("/etc/passwd")
        assert ids(index.search(given[3], 1)) == ["item3"]
        assert "read from the record" in caplog.text
        if damage == "link":
            with pytest.raises(IndexCorruptedError, match="is a link"):
                index.add(vectors=vectors(1))
            path.unlink()
        index.add(vectors=vectors(20, seed=5), ids=names(20, "new"))
        assert ids(index.search(given[3], 1)) == ["item3"]
        index.compact()
        caplog.clear()
    with Index.open(tmp_path / "a.index") as index:
        assert ids(index.search(given[3], 1)) == ["item3"]
    assert not caplog.records


@pytest.mark.usefixtures("small_snapshots")
def test_readers_keep_what_they_have_mapped(tmp_path: Path) -> None:
    given = vectors(60)
    with filled(tmp_path / "a.index", 60) as index, Index.open(tmp_path / "a.index") as reader:
        for round_ in range(5):
            assert ids(reader.search(given[10], 1)) == ["item10"]
            index.compact()
            index.delete(f"item{round_}")
            assert len(reader.search(given[10], 100)) == 59 - round_


@pytest.mark.usefixtures("small_snapshots")
def test_a_full_disk_costs_only_the_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise StorageError("Cannot write: the disk is full.")

    monkeypatch.setattr(upkeep, "write_snapshot", full)
    with filled(tmp_path / "a.index", 40) as index:
        assert "disk is full" in caplog.text
        assert ids(index.search(vectors(40)[7], 1)) == ["item7"]
        with pytest.raises(StorageError):
            index.compact()
        assert len(index) == 40


def test_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    with filled(tmp_path / "a.index", 4) as index:
        for name in ("000099.f16", ".000098.f16.0123abcd.partial", "stray"):
            (index.path / "snapshots" / name).write_bytes(b"x")
        index.compact()
        assert len(files(index)) == 1
