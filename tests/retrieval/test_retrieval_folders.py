"""Indexing a folder, killed at any moment: it goes on where it was, and embeds nothing twice."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmedge.bundle import Bundle
from mmedge.files import sha256_file
from mmedge.models.embedding import EmbeddingModel
from mmedge.models.load import load_as
from mmedge.retrieval.index import Index
from mmedge.specs import Float32Array

WRITER = Path(__file__).with_name("indexing.py")


class Photos:
    """A folder of photos of one colour each, which change; and what is known of its index."""

    def __init__(self, root: Path, bundle: Path, model: EmbeddingModel) -> None:
        self.folder = root / "photos"
        self.folder.mkdir()
        self.index = root / "p.index"
        self.rng = np.random.default_rng(1)
        self.now: dict[str, str] = {}  # hash of the file, by id
        self.held: dict[str, tuple[int, str]] = {}  # revision and hash of the item
        self._bundle, self._model = bundle, model
        self._vectors: dict[str, Float32Array] = {}  # by hash

    def write(self, name: str) -> None:
        """Write a photo of a new colour."""
        file = self.folder / name
        while True:
            colour = tuple(int(each) for each in self.rng.integers(0, 256, 3))
            Image.new("RGB", (8, 8), colour).save(file)
            digest = sha256_file(file)
            if digest not in self._vectors:
                break
        (self._vectors[digest],) = self._model.encode_image(file)
        self.now[f"photos/{name}"] = digest

    def some(self, count: int) -> list[str]:
        """Names of files that are there."""
        names = [each.removeprefix("photos/") for each in sorted(self.now)]
        return self.rng.choice(names, min(count, len(names)), replace=False).tolist()

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()
        del self.now[f"photos/{name}"]

    def command(self) -> list[str]:
        options = ["--prune", "-m", str(self._bundle), "-o", str(self.index)]
        return [sys.executable, str(WRITER), str(self.folder), *options]

    def check(self, said: list[dict[str, Any]]) -> None:
        """Compare the index with the files and with what a run said before it was killed."""
        written = {name for line in said if line["call"] != "delete" for name in line["ids"]}
        deleted = {name for line in said if line["call"] == "delete" for name in line["ids"]}
        with Index.open(self.index, read_only=True) as index:
            items = {item.id: item for item in index.items()}
            assert len(index) == len(items)
        for name, item in items.items():
            assert item.content_hash is not None
            vector = self._vectors[item.content_hash]  # of a photo that was there
            np.testing.assert_allclose(item.vectors, vector[None], atol=2e-3)
            if name in self.held:
                revision, digest = self.held[name]
                again = item.revision != revision  # written by this run, which may not have said it
                assert again is (item.content_hash != digest)
        assert written <= set(items)
        assert all(items[name].content_hash == self.now[name] for name in written)
        assert not deleted & set(items)
        assert set(self.held) & set(self.now) <= set(items)  # nothing that was durable is gone
        self.held = {n: (item.revision, item.content_hash or "") for n, item in items.items()}


@pytest.fixture
def photos(tiny_bundle: Bundle, tmp_path: Path) -> Iterator[Photos]:
    with load_as(EmbeddingModel, tiny_bundle.path) as model:
        yield Photos(tmp_path, tiny_bundle.path, model)


def killed_run(command: list[str], writes: int, delay_s: float) -> list[dict[str, Any]]:
    """Run until so many writes are done and a little longer, kill, and return what it said."""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        lines = [run.stdout.readline() for _ in range(writes)]
        time.sleep(delay_s)
        run.kill()
        lines += run.stdout.readlines()
    return [json.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"\n")]


def kill_rounds(photos: Photos, files: int, rounds: int, writes: int, changed: int) -> None:
    for number in range(files):
        photos.write(f"{number:04}.png")
    for number in range(rounds):
        count, delay_s = photos.rng.integers(0, writes + 1), photos.rng.uniform(0, 0.05)
        if count == 0:
            delay_s *= 20  # while it starts
        said = killed_run(photos.command(), int(count), float(delay_s))
        if photos.index.exists():
            photos.check(said)
        for name in photos.some(changed):
            photos.write(name)
        photos.remove(photos.some(1)[0])
        photos.write(f"new{number}.png")
    for _ in range(2):
        before = dict(photos.held)
        done = subprocess.run([*photos.command(), "--json"], check=True, stdout=subprocess.PIPE)
        lines = done.stdout.splitlines()
        said = [line for line in lines if line.startswith(b'{"call"')]
        photos.check([json.loads(line) for line in said])
        assert {name: digest for name, (_, digest) in photos.held.items()} == photos.now
    assert photos.held == before
    (counts,) = json.loads(b"".join(lines))["sources"]
    assert counts["unchanged"] == files == len(photos.held)
    assert counts["added"] == counts["updated"] == counts["removed"] == counts["failed"] == 0


def test_a_run_that_is_killed_goes_on(photos: Photos) -> None:
    kill_rounds(photos, files=48, rounds=4, writes=3, changed=6)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_that_is_killed_two_hundred_times_goes_on(photos: Photos) -> None:
    kill_rounds(photos, files=400, rounds=200, writes=3, changed=12)
