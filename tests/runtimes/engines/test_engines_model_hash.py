"""The hash of a model, and its cache."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NoReturn

import pytest
from engine_graphs import linear_graph

from mmedge.runtimes.engines import model_hash
from mmedge.runtimes.engines.model_hash import model_sha256


def hashed(path: Path) -> NoReturn:
    raise AssertionError(f"{path} is hashed again")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with external data, m.onnx.data."""
    return linear_graph(tmp_path / "m.onnx", external=True)


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where hashes are remembered, also those of files that are a moment old."""
    monkeypatch.setattr(model_hash, "_SETTLED_NS", 20_000_000)
    return tmp_path / "memory"


def settle() -> None:
    """Let the clock of the file system move on, which goes in steps of some milliseconds."""
    time.sleep(0.05)


def change(path: Path) -> None:
    """Change a byte; size and time of modification stay."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_model_is_not_hashed_again_while_its_files_are_the_same(
    model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle()
    found = model_sha256(model, memory)
    assert found == model_sha256(model)
    monkeypatch.setattr(model_hash, "sha256_file", hashed)
    assert model_sha256(model, memory) == found
    assert memory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["m.onnx", "m.onnx.data"])
def test_a_file_of_the_same_size_and_time_is_hashed(model: Path, memory: Path, name: str) -> None:
    if name == "m.onnx":  # a byte more at the end is another field: make it one that may change
        with model.open("ab") as file:
            file.write(b"\x32\x01a")  # ModelProto.doc_string
    settle()
    found = model_sha256(model, memory)
    change(model.with_name(name))
    settle()
    assert model_sha256(model, memory) == model_sha256(model) != found


def test_a_replaced_file_is_hashed(model: Path, memory: Path) -> None:
    settle()
    found = model_sha256(model, memory)
    data = model.with_name("m.onnx.data")
    other = data.with_name("other")
    other.write_bytes(bytes(data.stat().st_size))
    os.utime(other, ns=(data.stat().st_atime_ns, data.stat().st_mtime_ns))
    other.replace(data)
    settle()
    assert model_sha256(model, memory) == model_sha256(model) != found


def test_a_recent_file_is_not_remembered(
    model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_hash, "_SETTLED_NS", 60_000_000_000)
    model_sha256(model, memory)
    assert not memory.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": []}', b"\xff", b"[" * 100_000])
def test_a_damaged_memory_is_ignored(model: Path, memory: Path, content: bytes) -> None:
    settle()
    found = model_sha256(model, memory)
    (place,) = memory.iterdir()
    place.write_bytes(content)
    assert model_sha256(model, memory) == found


def test_a_memory_that_others_can_write_is_ignored(model: Path, memory: Path) -> None:
    settle()
    found = model_sha256(model, memory)
    (place,) = memory.iterdir()
    place.write_text(place.read_text().replace(found, "0" * 64))
    assert model_sha256(model, memory) == "0" * 64
    place.chmod(0o666)
    assert model_sha256(model, memory) == found


def test_a_memory_that_cannot_be_written_is_ignored(model: Path, memory: Path) -> None:
    memory.write_bytes(b"a file")
    settle()
    assert model_sha256(model, memory / "models") == model_sha256(model)
