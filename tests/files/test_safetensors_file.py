"""Safetensors files: read by the original, and never trusted."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mmedge.errors import InputError
from mmedge.files.safetensors_file import pack_safetensors, read_safetensors, write_safetensors
from mmedge.specs import Array

ARRAYS: dict[str, Array] = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "empty": np.empty((0, 4), np.float16),
    "mask": np.array([True, False]),
    "scalar": np.array(7, np.int64),
    "b": np.arange(5, dtype=">i4"),
}


def test_the_original_reads_what_is_written_and_back(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, ARRAYS, {"name": "größe"})
    for made in (load_file(path), read_safetensors(path, error=InputError)[0]):
        assert made.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(made[name], array)
    assert read_safetensors(path, error=InputError)[1] == {"name": "größe"}
    assert path.read_bytes() == pack_safetensors(dict(reversed(ARRAYS.items())), {"name": "größe"})
    save_file({"a": ARRAYS["a"]}, path)
    np.testing.assert_array_equal(read_safetensors(path, error=InputError)[0]["a"], ARRAYS["a"])


@pytest.mark.parametrize(
    ("arrays", "texts", "message"),
    [
        ({"a": np.zeros(2, np.uint32)}, {}, "got uint32"),
        ({"a": np.array(["x"])}, {}, "got <U1"),
        ({"a": np.zeros((1,) * 17)}, {}, "at most 16 axes"),
        ({"__metadata__": np.zeros(2)}, {}, "a name other than"),
        ({"a\udc80": np.zeros(2)}, {}, "not valid Unicode"),
        ({}, {"a": "x\udc80"}, "not valid Unicode"),
        ({}, {"a": "x" * (1 << 24)}, "Shorten them"),
        ({"a": np.broadcast_to(np.zeros(1, np.int8), 1 << 30)}, {}, "expected at most"),
    ],
)
def test_what_no_reader_takes_is_not_written(
    arrays: dict[str, Array], texts: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(InputError, match=message):
        write_safetensors(path, arrays, texts)
    assert not path.exists()


def packed(header: object, body: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 40,
        (2).to_bytes(8, "little") + b"[]",
        packed({"a": {**ENTRY, "shape": [3]}}),
        packed({"a": {**ENTRY, "shape": [-2]}}),
        packed({"a": {**ENTRY, "shape": [2.0]}}),
        packed({"a": {**ENTRY, "shape": [1] * 17}}),
        packed({"a": {**ENTRY, "data_offsets": [8, 16]}}),
        packed({"a": {**ENTRY, "data_offsets": [8, 0]}}),
        packed({"a": {**ENTRY, "dtype": "BF16"}}),
        packed({"a": {**ENTRY, "shape": [0, 1 << 62], "data_offsets": [0, 0]}}),
        packed({"a": {**ENTRY, "shape": [0, 1 << 70], "data_offsets": [0, 0]}}),
        packed({"a": 3}),
        packed({"__metadata__": {"x": 1}}),
    ],
)
def test_a_damaged_file_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"x\.safetensors"):
        read_safetensors(path, error=InputError)


@settings(max_examples=60)
@given(st.integers(0, 400), st.integers(0, 255))
def test_any_changed_byte_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    data = bytearray(pack_safetensors(ARRAYS, {"a": "b"}))
    data[at % len(data)] = value
    path.write_bytes(bytes(data))
    with contextlib.suppress(InputError):  # and nothing else
        read_safetensors(path, error=InputError)
