"""The hash of a model: what it covers, and when it is taken from memory."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmedge.runtimes.engines import model_hash
from mmedge.runtimes.engines.model_hash import model_sha256


def hashed(path: Path) -> NoReturn:
    raise AssertionError(f"{path} is hashed again")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with a weight beside it, m.data."""
    tensor = numpy_helper.from_array(np.arange(64, dtype=np.float32), "w")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [64]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [tensor]
    )
    path = tmp_path / "m.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]),
        path,
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    return path


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


@pytest.mark.parametrize("name", ["m.onnx", "m.data"])
def test_a_file_that_only_looks_the_same_is_hashed(model: Path, memory: Path, name: str) -> None:
    if name == "m.onnx":  # a byte more at the end is another field: make it one that may change
        with model.open("ab") as file:
            file.write(b"\x32\x01a")  # ModelProto.doc_string
    settle()
    found = model_sha256(model, memory)
    change(model.with_name(name))
    settle()
    assert model_sha256(model, memory) == model_sha256(model) != found


def test_a_file_put_in_place_of_another_is_hashed(model: Path, memory: Path) -> None:
    settle()
    found = model_sha256(model, memory)
    data = model.with_name("m.data")
    other = data.with_name("other")
    other.write_bytes(bytes(data.stat().st_size))
    os.utime(other, ns=(data.stat().st_atime_ns, data.stat().st_mtime_ns))
    other.replace(data)
    settle()
    assert model_sha256(model, memory) == model_sha256(model) != found


def test_a_file_that_was_written_just_now_is_not_remembered(
    model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_hash, "_SETTLED_NS", 60_000_000_000)
    model_sha256(model, memory)
    assert not memory.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": []}', b"\xff", b"[" * 100_000])
def test_a_damaged_memory_costs_the_hashing_alone(
    model: Path, memory: Path, content: bytes
) -> None:
    settle()
    found = model_sha256(model, memory)
    (place,) = memory.iterdir()
    place.write_bytes(content)
    assert model_sha256(model, memory) == found


def test_a_memory_that_others_can_write_is_not_believed(model: Path, memory: Path) -> None:
    settle()
    found = model_sha256(model, memory)
    (place,) = memory.iterdir()
    place.write_text(place.read_text().replace(found, "0" * 64))
    assert model_sha256(model, memory) == "0" * 64
    place.chmod(0o666)
    assert model_sha256(model, memory) == found


def test_a_memory_that_cannot_be_written_costs_the_hashing_alone(model: Path, memory: Path) -> None:
    memory.write_bytes(b"a file")
    settle()
    assert model_sha256(model, memory / "models") == model_sha256(model)
