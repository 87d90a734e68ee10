"""A power failure at any moment: what was acknowledged is there, and the index is readable."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killing import DIM, SPACE, random_change, state
from powerloss import CALLS, Disk

from mmedge.retrieval.index import Index
from mmedge.retrieval.verifying import verify_index

HERE = Path(__file__).parent
WRITER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop())
from mmedge.retrieval import upkeep
from mmedge.retrieval.index import Index
from killing import apply
upkeep._TAIL_ROWS, upkeep._MERGED_ROWS = 12, 48
index = Index.open(Path(sys.argv[1]))
for number, change in enumerate(json.loads(sys.argv[2]), 1):
    apply(index, change, 0, [], sys.argv[3])
    print(number, flush=True)
index.close()
"""


def random_changes(count: int) -> tuple[list[dict[str, Any]], list[dict[str, int]]]:
    """Changes without migrations, and the states from before the first to after the last."""
    rng, states, changes = np.random.default_rng(3), [{SPACE: 0}], []
    while len(changes) < count:
        change = random_change(rng, states[-1], len(changes) + 1)
        if change["call"] != "migrate":
            changes.append(change)
            states.append(state(states[-1], change))
    return changes, states


def record_writer(folder: Path, log: Path, changes: list[dict[str, Any]], durability: str) -> None:
    options = ["-f", "-xx", "-s", "1000000", "-e", f"trace={CALLS}", "-o", str(log)]
    arguments = [str(folder), json.dumps(changes), durability, str(HERE)]
    done = subprocess.run(
        ["strace", *options, sys.executable, "-c", WRITER, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr[:100]}")
    assert done.returncode == 0, done.stderr


def check_losses(tmp_path: Path, changes_count: int, every: int, durability: str) -> None:
    """Lose the power after every so many steps of a writer, in four ways each."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    folder, log = tmp_path / "a.index", tmp_path / "log"
    Index.create(folder, dim=DIM).close()
    disk = Disk(folder)
    changes, states = random_changes(changes_count)
    record_writer(folder, log, changes, durability)
    rng, losses = np.random.default_rng(0), 0
    for step, _ in enumerate(disk.replay(log)):
        if step % every:
            continue
        for kind in ("nothing", "names", "some", "all"):
            shutil.rmtree(folder)
            (folder / "snapshots").mkdir(parents=True)
            for path, content in disk.after_power_loss(kind, rng).items():
                if not path.name.endswith("-shm"):  # shared memory
                    path.write_bytes(content)
            done = disk.said.count(b"\n")
            with Index.open(folder) as index:
                held = {item.id: int(str(item.metadata["value"])) for item in index.items()}
                first = done if durability == "full" else 0
                assert held | {SPACE: 0} in states[first : done + 2], (step, kind, done)
                everything = index.search(np.ones(DIM, np.float32), len(held) + 10)
                assert sorted(match.id for match in everything) == sorted(held)
            if step % (16 * every) == 0:
                assert verify_index(folder, repair=True).lost == ()
                assert verify_index(folder).problems == ()
            losses += 1
    assert disk.said.count(b"\n") == changes_count
    assert losses > 4 * changes_count


def test_a_power_failure_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    check_losses(tmp_path, 12, 7, "full")


def test_a_power_failure_takes_back_whole_calls_of_a_batch(tmp_path: Path) -> None:
    check_losses(tmp_path, 12, 7, "batch")


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["full", "batch"])
def test_no_moment_of_a_power_failure_loses_anything(tmp_path: Path, durability: str) -> None:
    check_losses(tmp_path, 40, 1, durability)
