"""A writer that is killed: nothing that was acknowledged is lost, and the index stays readable."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from indexes import ids, two_spaces
from killing import DIM, SPACE, state, vector_of

from mmedge.retrieval.index import Index

WRITER = Path(__file__).with_name("killing.py")


def killed_writer(
    folder: Path, seed: int, after_s: float, bundles: list[Path]
) -> list[dict[str, Any]]:
    """Run a writer, kill it a while after its first change, and return the lines it wrote."""
    with subprocess.Popen(
        [sys.executable, str(WRITER), str(folder), str(seed)] + [str(bundle) for bundle in bundles],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        lines = [writer.stdout.readline()]
        time.sleep(after_s)
        alive = writer.poll() is None
        writer.kill()
        lines += writer.stdout.readlines()
        assert alive, writer.stderr.read().decode()
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def expected_states(lines: list[dict[str, Any]]) -> list[dict[str, int]]:
    """The states an index may have: as acknowledged, or with the change that was under way."""
    (first, *rest) = lines
    held, pending = first["begin"], None
    for line in rest:
        if "done" in line:
            assert pending is not None
            held, pending = state(held, pending), None
        else:
            pending = line
    return [held] if pending is None else [held, state(held, pending)]


def check_index(folder: Path, allowed: list[dict[str, int]]) -> None:
    """Every item is there as a whole, with its own vector, words and filters; no other is."""
    with Index.open(folder) as index:
        items = list(index.items())
        held = {item.id: int(str(item.metadata["value"])) for item in items}
        space = int(index.space == "tiny-0002")
        assert held | {SPACE: space} in allowed
        assert len(index) == len(held)
        for item in items:
            true = vector_of(item.id, held[item.id], space)
            np.testing.assert_allclose(item.vectors[0], true / np.linalg.norm(true), atol=1e-3)
            assert item.text == f"value {held[item.id]}"
            assert item.id in ids(index.search(true, 3))
        everything = index.search(np.ones(DIM, np.float32), len(held) + 10)
        assert sorted(match.id for match in everything) == sorted(held)


def kill_rounds(folder: Path, rounds: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bundles = two_spaces(folder.parent)
    Index.create(folder, bundles[0]).close()
    changes = 0
    for number in range(rounds):
        lines = killed_writer(folder, 1000 * seed + number, float(rng.uniform(0, 0.25)), bundles)
        changes += len(lines) // 2
        check_index(folder, expected_states(lines))
    assert changes > rounds


def test_ten_kills_lose_nothing(tmp_path: Path) -> None:
    kill_rounds(tmp_path / "a.index", 10, 1)


@pytest.mark.slow
def test_two_hundred_kills_lose_nothing(tmp_path: Path) -> None:
    kill_rounds(tmp_path / "a.index", 200, 2)
