"""Readers beside a writer: no error, and never a state that was not committed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import beside
import pytest
from beside import Plan, Progress, Reader
from killing import DIM

from mmedge.retrieval import upkeep
from mmedge.retrieval.index import Index

SEED = 5
LIMIT_S = 840.0  # for a machine that has much else to do
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True)
def small_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few rows make a snapshot, merge snapshots, and put vectors in lists."""
    monkeypatch.setattr(upkeep, "_TAIL_ROWS", 12)
    monkeypatch.setattr(upkeep, "_MERGED_ROWS", 48)
    monkeypatch.setattr(upkeep, "LISTED_ROWS", 20)


def first_state(folder: Path) -> tuple[Index, Plan, Progress]:
    index, plan, progress = Index.create(folder, dim=DIM), Plan(SEED), Progress(folder)
    progress.write(index, plan)
    return index, plan, progress


@pytest.mark.parametrize("count", [1, 4, pytest.param(16, marks=pytest.mark.slow)])
def test_processes_read_committed_states(tmp_path: Path, count: int) -> None:
    answers, states = 40, 6
    index, plan, progress = first_state(tmp_path / "a.index")
    command = [sys.executable, beside.__file__, index.path, str(SEED), str(answers), str(states)]
    with index:
        readers = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(count)
        ]
        until = time.monotonic() + LIMIT_S
        try:
            # As long as any reads, so that all read beside a writer.
            while any(reader.poll() is None for reader in readers) and time.monotonic() < until:
                progress.write(index, plan)
        finally:
            for reader in readers:
                reader.kill()  # nothing happens to those that have ended
            ended = [reader.communicate() for reader in readers]
    for reader, (out, errors) in zip(readers, ended, strict=True):
        assert reader.returncode == 0, errors
        seen = json.loads(out)
        assert seen["answers"] >= answers
        assert seen["states"] >= states


def test_threads_of_one_handle_read_committed_states(tmp_path: Path) -> None:
    errors: list[BaseException] = []
    index, plan, progress = first_state(tmp_path / "a.index")
    until = time.monotonic() + LIMIT_S

    def read() -> None:
        reader = Reader(progress, SEED)
        try:
            while (reader.answers < 100 or len(reader.states) < 6) and time.monotonic() < until:
                reader.check(index)
        except BaseException as error:  # noqa: BLE001, shown below
            errors.append(error)

    with index:
        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and time.monotonic() < until:
            progress.write(index, plan)
        for thread in threads:
            thread.join()
        assert errors == []
        assert time.monotonic() < until
