"""Readers beside a writer: no error, and never a state that was not."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from indexes import DIM, names

from mmedge.retrieval import upkeep
from mmedge.retrieval.index import Index

HERE = Path(__file__).parent
ITEMS = 24
# The writer gives all items the value n, in vectors, metadata and text at once. A reader that sees
# two values in one search, or a vector of another value than the metadata's, saw a torn state.
READER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop())
from test_retrieval_readers import check_state
from mmedge.retrieval.index import Index
with Index.open(Path(sys.argv[1]), read_only=True) as index:
    print("ready", flush=True)
    seen, searches = [], 0
    while not seen or seen[-1] < int(sys.argv[2]):
        value, searches = check_state(index), searches + 1
        if not seen or value != seen[-1]:
            seen.append(value)
print([sorted(seen) == seen, len(seen), searches])
"""


def vector_of(number: int, value: int) -> np.ndarray:
    """Vectors of one value are near to each other, those of two values are not."""
    base = np.random.default_rng(value).standard_normal(DIM)
    return base + 0.01 * np.random.default_rng([value, number]).standard_normal(DIM)


def write_value(index: Index, value: int) -> None:
    index.update(
        names(ITEMS),
        vectors=np.stack([vector_of(number, value) for number in range(ITEMS)]),
        metadata=[{"value": value}] * ITEMS,
        texts=[f"value {value}"] * ITEMS,
        durability="batch",
    )


def check_state(index: Index) -> int:
    """Search, check that all matches are of one value, and return it."""
    found = index.search(np.ones(DIM, np.float32), ITEMS + 10)
    assert len({match.id for match in found}) == len(found) == ITEMS
    (value,) = {int(str(match.metadata["value"])) for match in found}
    assert {match.text for match in found} == {f"value {value}"}
    true = {f"item{number}": vector_of(number, value) for number in range(ITEMS)}
    for match in found:
        vector = true[match.id]
        score = vector.sum() / np.linalg.norm(vector) / np.sqrt(DIM)
        assert match.score == pytest.approx(score, abs=3e-3)
    return value


def first_state(folder: Path) -> Index:
    index = Index.create(folder, dim=DIM)
    index.add(vectors=np.stack([vector_of(n, 0) for n in range(ITEMS)]), ids=names(ITEMS))
    write_value(index, 0)
    return index


@pytest.mark.parametrize("count", [1, 4, pytest.param(16, marks=pytest.mark.slow)])
def test_processes_read_whole_states(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "_TAIL_ROWS", 40)
    monkeypatch.setattr(upkeep, "_MERGED_ROWS", 100)
    last = 60
    with first_state(tmp_path / "a.index") as index:
        readers = [
            subprocess.Popen(
                [sys.executable, "-c", READER, str(index.path), str(last), str(HERE)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(count)
        ]
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "ready\n"
        for value in range(1, last + 1):
            write_value(index, value)
            if value % 20 == 0:
                index.compact()
        for reader in readers:
            out, errors = reader.communicate(timeout=120)
            assert reader.returncode == 0, errors
            in_order, states, _ = json.loads(out.lower())
            assert in_order
            assert states > 1


def test_threads_of_one_handle_read_whole_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "_TAIL_ROWS", 40)
    monkeypatch.setattr(upkeep, "_MERGED_ROWS", 100)
    errors: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                check_state(index)
        except BaseException as error:  # noqa: BLE001, shown below
            errors.append(error)

    with first_state(tmp_path / "a.index") as index:
        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for value in range(1, 40):
                write_value(index, value)
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert errors == []
        assert check_state(index) == 39
