"""Files of vectors: columns found by name, widths and dtypes checked, nothing unpickled."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from mmedge.errors import InputError
from mmedge.media.vectors import open_vectors

VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3)


def write(path: Path, columns: dict[str, Any]) -> Path:
    """Write columns in the format of the suffix."""
    if path.suffix == ".npz":
        np.savez(path, **{name: np.asarray(column) for name, column in columns.items()})
        return path
    table = pa.table({n: list(c) if getattr(c, "ndim", 1) == 2 else c for n, c in columns.items()})
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".parquet", ".arrow"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_have_their_columns(tmp_path: Path, suffix: str, dtype: type) -> None:
    columns = {
        "vectors": VECTORS.astype(dtype),
        "ids": ["a", "b", "b", "c"],
        "time": [1.5, 2.5, 2.5, float("nan")],
        "text": ["x", "y", "y", ""],
        "count": [1, 2, 2, 3],
        "metadata": ['{"tag": ["k"]}', "", "", ""],
    }
    found = open_vectors(write(tmp_path / f"v{suffix}", columns))
    rows = list(found)
    assert (found.dim, found.count, len(rows)) == (3, 4, 4)
    assert [row.id for row in rows] == ["a", "b", "b", "c"]
    assert [row.time for row in rows] == [1.5, 2.5, 2.5, None]
    assert rows[0].metadata == {"count": 1, "tag": ["k"]}
    assert (rows[0].text, rows[3].text) == ("x", None)
    np.testing.assert_array_equal(np.stack([row.vector for row in rows]), VECTORS)


def test_a_plain_array_numbers_its_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", VECTORS)
    assert [row.id for row in open_vectors(tmp_path / "v.npy")] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("name", ["v.npy", "v.npz"])
def test_pickled_objects_are_refused(tmp_path: Path, name: str) -> None:
    objects = np.array([{"a": 1}, None], object)
    if name.endswith("y"):
        np.save(tmp_path / name, objects, allow_pickle=True)
    else:
        np.savez(tmp_path / name, vectors=objects)
    with pytest.raises(InputError, match="holds pickled objects"):
        open_vectors(tmp_path / name)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [1.0, 2.0]}, "named 'vector'"),
        ({"vectors": VECTORS, "embedding": VECTORS}, "named 'vector'"),
        ({"vectors": VECTORS.astype(np.int32)}, "expected (float16|lists of float16)"),
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_other_columns_are_named(
    tmp_path: Path, suffix: str, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        open_vectors(write(tmp_path / f"v{suffix}", columns))


def test_lengths_and_widths_must_agree(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'ids' has the shape \(2,\)"):
        open_vectors(write(tmp_path / "v.npz", {"vectors": VECTORS, "ids": ["a", "b"]}))
    ragged = write(tmp_path / "v.parquet", {"vector": [[1.0, 2.0], [1.0]]})
    with pytest.raises(InputError, match="row 1 of 'vector' has 1 values, expected 2"):
        list(open_vectors(ragged))


@pytest.mark.parametrize("name", ["v.npy", "v.npz", "v.parquet", "v.arrow", "v.csv"])
def test_damaged_and_foreign_files_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"no such file|expected one of"):
        open_vectors(tmp_path / name)
    (tmp_path / name).write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(InputError, match=r"cannot be read|expected one of|pickled"):
        open_vectors(tmp_path / name)


def header(shape: tuple[int, ...]) -> bytes:
    written = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(written, described)
    return written.getvalue()


@pytest.mark.parametrize("member", [header((1 << 40, 512)), header((-3, 4)), b"hello"])
def test_members_that_cannot_be_arrays_are_refused(tmp_path: Path, member: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "v.npz", "w") as archive:
        archive.writestr("vectors.npy", member)
    with pytest.raises(InputError, match="cannot be read"):
        open_vectors(tmp_path / "v.npz")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("revision", ["1", "b", "", "2"], "row 1: got the revision 'b'"),
        ("revision", [1.0, np.nan, 3.0, 4.0], "row 1: got the revision nan"),
        ("revision", [1.0, np.inf, 3.0, 4.0], "row 1: got the revision inf"),
        ("metadata", ["{}", "[" * 100_000, "{}", "{}"], "row 1 is not valid JSON"),
        ("metadata", ["{}", "nonsense", "{}", "{}"], "row 1 is not JSON"),
        ("metadata", [3, 4, 5, 6], "row 0: its metadata is 3, expected a JSON object"),
    ],
)
def test_cells_that_cannot_be_used_name_their_row(
    tmp_path: Path, column: str, values: list[Any], message: str
) -> None:
    path = write(tmp_path / "v.npz", {"vectors": VECTORS, column: values})
    with pytest.raises(InputError, match=message):
        list(open_vectors(path))
