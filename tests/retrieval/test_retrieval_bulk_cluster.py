"""Bulk embedding on a real Ray cluster: each file once, whatever becomes of the workers."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from cluster import ENVIRONMENT
from PIL import Image

from mmedge.bundle import Bundle
from mmedge.errors import BackendError, RetrievalError
from mmedge.retrieval.bulk import Embedded, embed_files
from mmedge.retrieval.bulk_cluster import ClusterWorker
from mmedge.retrieval.bulk_pool import Batch, Reply
from mmedge.retrieval.index import Index

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.filterwarnings("default"),  # Ray's own
]
SCRIPT = Path(__file__).with_name("cluster.py")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of this module's own; no file of it lies in the user's folders."""
    folder = tempfile.mkdtemp(prefix="ray")  # pytest's are too long for the paths of sockets
    token = Path(folder) / "token"
    token.write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with subprocess.Popen(
            [sys.executable, str(SCRIPT), folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as head:
            assert head.stdout is not None
            yield head.stdout.readline().decode().strip()
            head.communicate()
    shutil.rmtree(folder)


@pytest.fixture
def index(tiny_bundle: Bundle, tmp_path: Path) -> Iterator[Index]:
    with Index.create(tmp_path / "photos.index", bundle=tiny_bundle.path) as made:
        yield made


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of 24 photos of one colour each, in the current folder."""
    monkeypatch.chdir(tmp_path)
    files = [f"{number:02}.png" for number in range(24)]
    for number, file in enumerate(files):
        Image.new("RGB", (8, 8), (10 * number, 255 - 10 * number, 7 * number)).save(file)
    return files


def check(index: Index, photos: list[str]) -> None:
    """Each photo is there once, with its own vector."""
    assert len(index) == len(photos)
    expected = index.model.encode_image(photos)
    for item, vector in zip(index.get(photos), expected, strict=True):
        assert item is not None
        np.testing.assert_allclose(item.vectors, vector[None], atol=2e-3)


def test_a_worker_is_killed_half_way(
    index: Index, photos: list[str], cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of the cluster is killed between two batches, and another during one."""
    embed, lock = ClusterWorker.embed, threading.Lock()
    done: list[Batch] = []
    killed: list[int] = []

    def kill(worker: ClusterWorker, least_done: int, before: int) -> None:
        with lock:
            if len(done) >= least_done and len(killed) == before:
                killed.append(worker.ready["pid"])
                os.kill(killed[-1], signal.SIGKILL)

    def embedding(worker: ClusterWorker, batch: Batch) -> Reply:
        kill(worker, 3, 0)
        reply = embed(worker, batch)
        done.append(batch)
        kill(worker, 5, 1)  # its reply is here, and counts
        return reply

    monkeypatch.setattr(ClusterWorker, "embed", embedding)
    seen: list[Embedded] = []
    result = embed_files(index, photos, batch=3, cluster=cluster, on_progress=seen.append)
    assert result == seen[-1] == Embedded(written=24)
    assert len(set(killed)) == 2
    check(index, photos)
    revisions = [item.revision for item in index.get(photos) if item is not None]
    assert embed_files(index, photos, batch=3, cluster=cluster) == Embedded(unchanged=24)
    assert [item.revision for item in index.get(photos) if item is not None] == revisions


def test_a_file_on_which_workers_die_is_skipped(
    index: Index, photos: list[str], cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = ClusterWorker.embed

    def embedding(worker: ClusterWorker, batch: Batch) -> Reply:
        if photos[4] in {name for _, name in batch.files}:
            os.kill(worker.ready["pid"], signal.SIGKILL)
        return embed(worker, batch)

    monkeypatch.setattr(ClusterWorker, "embed", embedding)
    done = embed_files(index, photos[:8], workers=1, batch=4, cluster=cluster)
    assert done.written == 7
    (skipped,) = done.skipped
    assert (skipped.position, skipped.path) == (4, photos[4])
    assert "twice" in skipped.reason
    check(index, photos[:4] + photos[5:8])


def test_a_bundle_that_cannot_be_loaded_ends_the_run(
    index: Index, photos: list[str], cluster: str, tiny_bundle: Bundle
) -> None:
    (tiny_bundle.path / "manifest.json").write_text("{}")
    with pytest.raises(BackendError, match="the same paths on every node"):
        embed_files(index, photos, cluster=cluster)
    assert len(index) == 0


def test_a_cluster_that_is_not_there_is_named(index: Index) -> None:
    with pytest.raises(RetrievalError, match="ray start --head"):
        embed_files(index, [], cluster="nowhere")
