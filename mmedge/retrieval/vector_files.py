"""Export of an index to a file of vectors, and import of such files."""

from __future__ import annotations

import io
import itertools
import json
import math
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

import numpy as np

from mmedge.errors import InputError
from mmedge.files import atomic_file
from mmedge.media.frames import require
from mmedge.media.vectors import VectorRow, VectorRows
from mmedge.retrieval.embedding import check_space
from mmedge.retrieval.items import Item
from mmedge.retrieval.moment import Moment

if TYPE_CHECKING:
    from mmedge.retrieval.index import Index

__all__ = ["export_vectors", "import_vectors"]

_AT_ONCE = 1024  # items in a transaction
_BUFFER_BYTES = 1 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date in a zip
# Text arrays of an .npz file, and the record's columns.
_TEXTS = {
    "ids": "id",
    "sources": "source",
    "texts": "text",
    "metadata": "metadata",
    "content_hash": "content_hash",
    "origin": "origin",
}


def import_vectors(index: Index, rows: VectorRows) -> int:
    """Add the items of a file of vectors, or replace those of the same id.

    Vectors are normalised. Rows of one id that follow each other are one item of several vectors.
    An item with a revision, as an export has, changes nothing if the index has a later one; so an
    import that was interrupted can be started again.

    Args:
        index: Where they go.
        rows: See mmedge.media.vectors.open_vectors.

    Returns:
        Items written.

    Raises:
        InputError: If a row cannot be used, or the vectors have another width than the index.
        SpaceMismatchError: If the file names another embedding space than the index's.
        RetrievalError: If another process goes on writing.
        StorageError: If the disk is full or read-only.
    """
    if rows.dim != index.dim:
        raise InputError(
            f"{rows.path}: its vectors have {rows.dim} dimensions, and {index.path} has "
            f"{index.dim}. Import it into an index of its own."
        )
    check_space(index.space, rows.space, f"{rows.path} has vectors")
    written = 0
    items = (_item(list(group)) for _, group in itertools.groupby(rows, lambda row: row.id))
    while part := list(itertools.islice(items, _AT_ONCE)):
        written += index.upsert(part)
    return written


def _item(rows: list[VectorRow]) -> Item:
    first = rows[0]
    return Item(
        first.id,
        np.stack([row.vector for row in rows]),
        time=first.time,
        source=first.source,
        text=first.text,
        metadata=first.metadata,
        content_hash=first.content_hash,
        revision=first.revision,
        origin=first.origin,
    )


def export_vectors(index: Index, path: Path) -> int:
    """Write all items with their vectors to a file: a row a vector, in float16 as they are stored.

    The file is that of one moment, and written as the index is read: memory does not grow with the
    vectors and texts.

    Args:
        index: What to export.
        path: A .npz or a .parquet file.

    Returns:
        Rows written.

    Raises:
        InputError: If the suffix is another, or pyarrow is missing for Parquet.
        IndexCorruptedError: If an item is damaged.
        StorageError: If the file cannot be written.
    """
    writers = {".npz": _write_npz, ".parquet": _write_parquet}
    suffix = path.suffix.lower()
    if suffix not in writers:
        raise InputError(f"{path}: got {suffix or 'no suffix'}, expected .npz or .parquet.")
    if suffix == ".parquet":
        require("pyarrow.parquet", f"{path}: Parquet files")
    with index.moment() as moment, atomic_file(path) as file:
        return writers[suffix](file, moment)


def _write_npz(file: BinaryIO, moment: Moment) -> int:
    """Write the arrays of an .npz file one after another, uncompressed as numpy.savez does."""
    counts = moment.counts()
    rows = int(counts.sum())
    times, revisions = np.empty(len(counts)), np.empty(len(counts), np.int64)
    with zipfile.ZipFile(file, "w") as archive:
        space = np.array(moment.space or "")
        with _member(archive, "space", (), space.dtype.str) as member:
            member.write(space.tobytes())
        with _member(archive, "vectors", (rows, moment.dim), "<f2") as member:
            for place, item in enumerate(moment.items()):
                member.write(item.vectors.astype("<f2").tobytes())
                times[place] = math.nan if item.time is None else item.time
                revisions[place] = item.revision
        for name, numbers in (("times", times), ("revision", revisions)):
            with _member(archive, name, (rows,), numbers.dtype.str) as member:
                member.write(np.repeat(numbers, counts).tobytes())
        for name, column in _TEXTS.items():
            # Text arrays are as wide as their longest text.
            width = max(1, max(map(len, moment.texts(column)), default=0))
            with (
                _member(archive, name, (rows,), f"<U{width}") as member,
                io.BufferedWriter(member, _BUFFER_BYTES) as buffered,
            ):
                for text, count in zip(moment.texts(column), counts.tolist(), strict=True):
                    cell = text.encode("utf-32-le").ljust(4 * width, b"\0")
                    for _ in range(count):
                        buffered.write(cell)
    return rows


def _member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: str) -> IO[bytes]:
    """Open an array of an archive for writing, its header written."""
    member = archive.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True)
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
    return member


def _write_parquet(file: BinaryIO, moment: Moment) -> int:
    arrow, parquet = (require(name, "Parquet files") for name in ("pyarrow", "pyarrow.parquet"))
    schema = arrow.schema(
        [
            ("id", arrow.string()),
            ("vector", arrow.list_(arrow.float16(), moment.dim)),
            ("time", arrow.float64()),
            ("source", arrow.string()),
            ("text", arrow.string()),
            ("metadata", arrow.string()),
            ("content_hash", arrow.string()),
            ("revision", arrow.int64()),
            ("origin", arrow.string()),
        ],
        metadata={"mmedge.space": moment.space or ""},
    )
    rows, items = 0, moment.items()
    with parquet.ParquetWriter(arrow.PythonFile(file, mode="w"), schema) as writer:
        while part := list(itertools.islice(items, _AT_ONCE)):
            owners = [item for item in part for _ in item.vectors]
            flat = np.concatenate([item.vectors.astype(np.float16) for item in part]).reshape(-1)
            columns = {
                "id": [item.id for item in owners],
                "vector": arrow.FixedSizeListArray.from_arrays(arrow.array(flat), moment.dim),
                "time": [item.time for item in owners],
                "source": [item.source or None for item in owners],
                "text": [item.text or None for item in owners],
                "metadata": [json.dumps(dict(item.metadata)) for item in owners],
                "content_hash": [item.content_hash or None for item in owners],
                "revision": [item.revision for item in owners],
                "origin": [item.origin for item in owners],
            }
            writer.write_table(arrow.table(columns, schema=schema))
            rows += len(owners)
    return rows
