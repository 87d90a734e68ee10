"""Export of an index to a file of vectors, and import of such files."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmedge.errors import InputError
from mmedge.files import write_atomic
from mmedge.media.frames import require
from mmedge.media.vectors import VectorRow, VectorRows
from mmedge.retrieval.embedding import check_space
from mmedge.retrieval.items import Item
from mmedge.specs import Array

if TYPE_CHECKING:
    from mmedge.retrieval.index import Index

__all__ = ["export_vectors", "import_vectors"]

_AT_ONCE = 1024  # items in a transaction


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

    Args:
        index: What to export.
        path: A .npz or a .parquet file; it is made in memory.

    Returns:
        Rows written.

    Raises:
        InputError: If the suffix is another, or pyarrow is missing for Parquet.
        StorageError: If the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix == ".npz":
        columns = _columns(list(index.items()), index.dim)
        made = io.BytesIO()
        np.savez(made, allow_pickle=False, space=np.array(index.space or ""), **columns)
        write_atomic(path, made.getvalue())
        return len(columns["ids"])
    if suffix != ".parquet":
        raise InputError(f"{path}: got {suffix or 'no suffix'}, expected .npz or .parquet.")
    return _export_parquet(index, path)


def _columns(items: list[Item], dim: int) -> dict[str, Array]:
    """Return the items' columns: a row a vector."""
    counts = [len(item.vectors) for item in items]

    def repeated(values: list[str] | list[float] | list[int], kind: type) -> Array:
        return np.repeat(np.array(values, kind), counts)

    return {
        "vectors": np.concatenate(
            [np.empty((0, dim), np.float16), *(item.vectors.astype(np.float16) for item in items)]
        ),
        "ids": repeated([item.id for item in items], np.str_),
        "times": repeated([np.nan if i.time is None else i.time for i in items], np.float64),
        "sources": repeated([item.source or "" for item in items], np.str_),
        "texts": repeated([item.text or "" for item in items], np.str_),
        "metadata": repeated([json.dumps(dict(item.metadata)) for item in items], np.str_),
        "content_hash": repeated([item.content_hash or "" for item in items], np.str_),
        "revision": repeated([item.revision for item in items], np.int64),
        "origin": repeated([item.origin for item in items], np.str_),
    }


def _export_parquet(index: Index, path: Path) -> int:
    what = f"{path}: Parquet files"
    arrow, parquet = require("pyarrow", what), require("pyarrow.parquet", what)
    schema = arrow.schema(
        [
            ("id", arrow.string()),
            ("vector", arrow.list_(arrow.float16(), index.dim)),
            ("time", arrow.float64()),
            ("source", arrow.string()),
            ("text", arrow.string()),
            ("metadata", arrow.string()),
            ("content_hash", arrow.string()),
            ("revision", arrow.int64()),
            ("origin", arrow.string()),
        ],
        metadata={"mmedge.space": index.space or ""},
    )
    rows, made = 0, io.BytesIO()
    with parquet.ParquetWriter(made, schema) as writer:
        for part in _parts(index):
            columns = _columns(part, index.dim)
            flat = arrow.array(columns.pop("vectors").reshape(-1))
            named = {
                "id": arrow.array(columns.pop("ids").tolist(), arrow.string()),
                "vector": arrow.FixedSizeListArray.from_arrays(flat, index.dim),
                "time": arrow.array(columns.pop("times"), from_pandas=True),
                "source": _texts(arrow, columns.pop("sources")),
                "text": _texts(arrow, columns.pop("texts")),
                "metadata": _texts(arrow, columns.pop("metadata")),
                "content_hash": _texts(arrow, columns.pop("content_hash")),
                "revision": arrow.array(columns.pop("revision")),
                "origin": arrow.array(columns.pop("origin").tolist(), arrow.string()),
            }
            batch = arrow.record_batch(list(named.values()), schema=schema)
            writer.write_batch(batch)
            rows += batch.num_rows
    write_atomic(path, made.getvalue())
    return rows


def _texts(arrow: Any, column: Array) -> Any:  # noqa: ANN401, pyarrow
    return arrow.array([text or None for text in column.tolist()], arrow.string())


def _parts(index: Index) -> Iterator[list[Item]]:
    items = index.items()
    while part := list(itertools.islice(items, _AT_ONCE)):
        yield part
