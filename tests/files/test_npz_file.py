"""Archives of arrays: read whole or in blocks, and bounded before anything is unpacked."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmedge.errors import InputError
from mmedge.files import npz_file
from mmedge.files.npz_file import open_npz, read_npz, write_npz

ARRAYS: dict[str, Any] = {
    "matrix": np.arange(21, dtype=np.float32).reshape(7, 3),
    "fortran": np.asfortranarray(np.arange(21.0).reshape(7, 3)),
    "big endian": np.arange(7, dtype=">i4"),
    "texts": np.array(["a", "", "ccc", "", "", "", "g"]),
    "empty texts": np.zeros(7, "<U0"),
    "flags": np.arange(7) % 2 == 0,
    "cube": np.arange(28, dtype=np.uint8).reshape(7, 2, 2),
    "none": np.empty((0, 4)),
}


def error(reason: str) -> InputError:
    return InputError(f"cannot be read ({reason})")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_arrays_come_back_whole_and_in_blocks(tmp_path: Path, save: Any, rows: int) -> None:
    path = tmp_path / "a.npz"
    save(path, scalar=np.array("x"), **ARRAYS)
    headers, whole = open_npz(path, error=error), read_npz(path, error=error)
    assert whole.pop("scalar") == headers.pop("scalar").read() == "x"
    assert headers.keys() == whole.keys() == ARRAYS.keys()
    for name, expected in ARRAYS.items():
        assert (headers[name].shape, headers[name].dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(whole[name], expected)
        blocks = list(headers[name].blocks(rows))
        assert all(len(block) == rows for block in blocks[:-1])
        np.testing.assert_array_equal(np.concatenate([expected[:0], *blocks]), expected)


def test_arrays_of_any_name_are_written(tmp_path: Path) -> None:
    arrays = {**ARRAYS, "file": np.ones(2), "allow_pickle": np.array(3), "a/b": np.zeros(1)}
    write_npz(tmp_path / "a.npz", arrays)
    read = read_npz(tmp_path / "a.npz", error=error)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)


def test_archives_that_unpack_to_far_more_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **{f"a{n}": np.zeros(1 << 18) for n in range(4)})
    assert read_npz(path, error=error)["a0"].size == 1 << 18
    monkeypatch.setattr(npz_file, "_HARMLESS_BYTES", 7 << 20)
    with pytest.raises(InputError, match=r"unpacks to 8,38\d,\d+, more than 100 times"):
        open_npz(path, error=error)
    np.savez(path, zeros=np.zeros(1 << 20))  # as large, and not compressed
    assert open_npz(path, error=error)["zeros"].shape == (1 << 20,)


def test_blocks_are_all_that_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, zeros=np.zeros((4096, 1024)))  # 32 MiB
    (array,) = open_npz(path, error=error).values()
    tracemalloc.start()
    rows = sum(len(block) for block in array.blocks(64))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == 4096
    assert most < 8 << 20


def test_a_header_that_disagrees_with_the_size_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 4)))
    content = (tmp_path / "a.npy").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", content.replace(b"(3, 4)", b"(3, 9)"))
    with pytest.raises(InputError, match=r"'a\.npy' has 224 bytes, and 344 by its header"):
        open_npz(tmp_path / "a.npz", error=error)


def test_damaged_data_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=np.full(10_000, 2.0))
    content = path.read_bytes()
    path.write_bytes(content[:-9000] + b"damaged" + content[-8993:])
    (array,) = open_npz(path, error=error).values()
    for read in (array.read, lambda: list(array.blocks(4))):
        with pytest.raises(InputError, match="CRC"):
            read()


@pytest.mark.parametrize(
    ("names", "message"),
    [(("a.npy", "b.npy"), "two of its arrays"), (("a.txt",), r"'a\.txt' is no array")],
)
def test_members_that_are_no_arrays_are_refused(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in names:
            archive.write(tmp_path / "a.npy", name)
    path = tmp_path / "a.npz"
    path.write_bytes(path.read_bytes().replace(b"b.npy", b"a.npy"))
    with pytest.raises(InputError, match=message):
        read_npz(tmp_path / "a.npz", error=error)
