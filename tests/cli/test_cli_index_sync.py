"""`mmedge index push` and `pull` between two devices, by Milvus Lite and by a real server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run
from servers import new_name, server_address

from mmedge.retrieval.index import Index

pytest.importorskip("pymilvus")
DIM = 4


@pytest.fixture(
    params=["lite", pytest.param("server", marks=pytest.mark.server)],
)
def remote(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, ...]:
    """Arguments that name a server and a collection that does not exist yet."""
    monkeypatch.chdir(tmp_path)
    if request.param == "server":
        return server_address(), "-c", new_name()
    pytest.importorskip("milvus_lite")
    return "store.db", "--collection", "photos"


def counts(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, int, int]:
    document: dict[str, Any] = json.loads(run(capsys, "index", *arguments, "--json"))
    assert {"index", "server"} < document.keys()
    return document["changes"], document["written"], document["deleted"]


def make(name: str, ids: Sequence[str], dim: int = DIM) -> None:
    with Index.create(name, dim=dim) as index:
        index.add(vectors=np.eye(dim, dtype=np.float32)[: len(ids)], ids=ids, texts=list(ids))


def test_two_devices_exchange_their_changes(
    remote: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    make("a.index", ["mug", "cat", "car"])
    make("b.index", ["tree"])
    text = run(capsys, "index", "push", "a.index", *remote)
    assert text.splitlines()[-1] == "3 changes: 3 written, 0 deleted"
    assert counts(capsys, "push", "b.index", *remote) == (1, 1, 0)
    assert counts(capsys, "pull", "b.index", *remote) == (4, 3, 0)
    with Index.open("b.index") as index:
        index.delete("cat")
        index.update("mug", texts="a red mug")
    assert counts(capsys, "push", "b.index", *remote) == (3, 1, 1)
    assert counts(capsys, "push", "b.index", *remote) == (0, 0, 0)
    assert counts(capsys, "pull", "a.index", *remote)[1:] == (2, 1)
    with Index.open("a.index") as one, Index.open("b.index") as two:
        held = [
            {item.id: (item.text, item.revision) for item in each.items()} for each in (one, two)
        ]
    assert held[0] == held[1]
    assert {name: text for name, (text, _) in held[0].items()} == {
        "mug": "a red mug", "car": "car", "tree": "tree"
    }  # fmt: skip


def test_everything_is_sent_and_fetched_again(
    remote: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    make("a.index", ["mug", "cat"])
    counts(capsys, "push", "a.index", *remote)
    assert counts(capsys, "push", "a.index", *remote, "--everything") == (2, 0, 0)
    with Index.create("b.index", dim=DIM) as index:
        counts(capsys, "pull", "b.index", *remote)
        index.delete(["mug", "cat"])
    assert counts(capsys, "pull", "b.index", *remote) == (0, 0, 0)
    assert counts(capsys, "pull", "b.index", *remote, "--everything") == (2, 0, 0)


def test_mistakes_are_one_message(
    remote: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    make("a.index", ["mug"])
    counts(capsys, "push", "a.index", *remote)
    make("wide.index", ["mug"], dim=DIM + 1)
    server = remote[0]
    for arguments, message in [
        (("wide.index", *remote), f"vectors of length {DIM} of space None, expected length 5"),
        (("gone.index", *remote), "gone.index: no index"),
        (("a.index", server, "-c", "no name"), "expected letters, digits and underscores"),
        (("a.index", "ftp://server"), "Expected http://HOST:19530"),
    ]:
        for command in ("push", "pull"):
            err = run(capsys, "index", command, *arguments, code=1)
            assert message in " ".join(err.split())
            assert "Traceback" not in err
