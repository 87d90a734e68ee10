"""A collection of a Milvus server: its schema, and requests with errors that name the address."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np

from mmedge.closing import Closing
from mmedge.errors import InputError, RetrievalError
from mmedge.retrieval.stores.connection import connect, milvus_errors
from mmedge.retrieval.stores.rows import FORMAT, HEADER, Row
from mmedge.retrieval.stores.terms import TERMS
from mmedge.specs import Float32Array

__all__ = ["Collection"]

_FIELDS = {*HEADER, "body", TERMS, "vector"}
_GRAPH = {"M": 16, "efConstruction": 200}
_SLOW_S = 60.0  # for what takes a server longer: creating and loading
_MOST_ROWS = 16_384  # Milvus's limit for a page


class Collection(Closing):
    """A collection that holds mmedge's rows, created if it does not exist.

    Args:
        address: "http://HOST:19530", or a path that ends in ".db" for Milvus Lite.
        name: Letters, digits and underscores.
        dim: D, to create it; None if it must exist.
        space: Embedding-space fingerprint, for people who read its description.
        token: "USER:PASSWORD" or an API key.
        timeout_s: Limit of each request.

    Raises:
        BackendUnavailableError: If pymilvus is not installed or no server answers.
        RetrievalError: If it does not exist and `dim` is None, or is another program's.
    """

    def __init__(
        self,
        address: str,
        name: str,
        *,
        dim: int | None,
        space: str | None,
        token: str | None,
        timeout_s: float,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", name):
            raise InputError(f"Collection: got {name!r}, expected letters, digits and underscores.")
        self.place = f"collection '{name}' of Milvus at {address}"
        self._address = address
        self._name = name
        self._timeout_s = timeout_s
        self._closed = False
        self._client = connect(address, token, timeout_s)
        try:
            self.dim = self._open(dim, space)
        except BaseException:
            self._client.close()
            raise

    def query(
        self,
        expression: str,
        fields: Sequence[str],
        *,
        level: str = "Strong",
        first: int | None = None,
    ) -> list[Row]:
        """Return the rows for which an expression holds.

        Args:
            expression: A Milvus expression.
            fields: To read.
            level: "Strong" sees all that was acknowledged to anyone, "Session" all to this client.
            first: Only so many rows, those with the least keys, in the order of their keys.
        """
        page = {} if first is None else {"limit": min(first, _MOST_ROWS), "iterator": "True"}
        with self._errors("query"):
            found = self._client.query(
                self._name,
                filter=expression,
                output_fields=list(fields),
                consistency_level=level,
                timeout=self._timeout_s,
                **page,
            )
        rows: list[Row] = [dict(row) for row in found]
        return rows if first is None else sorted(rows, key=lambda row: str(row["key"]))

    def write(self, rows: Sequence[Row]) -> None:
        """Add rows; they are durable at return.

        An upsert, so that rows are there once though pymilvus sends a request again when its
        connection breaks.
        """
        with self._errors("write to"):
            self._client.upsert(self._name, list(rows), timeout=self._timeout_s)

    def delete(self, keys: Sequence[str]) -> None:
        """Delete rows by key."""
        with self._errors("delete from"):
            self._client.delete(self._name, ids=list(keys), timeout=self._timeout_s)

    def search(
        self, vectors: Float32Array, expression: str, rows: int, width: int
    ) -> list[list[Row]]:
        """Return the nearest rows to each vector with their "score", best first, without vectors.

        Args:
            vectors: (Q, D) float32.
            expression: A Milvus expression; only rows for which it holds are found.
            rows: How many, at most 16,384.
            width: Of the search in the graph, at least `rows`.
        """
        with self._errors("search"):
            found = self._client.search(
                self._name,
                data=list(np.ascontiguousarray(vectors, np.float32)),
                filter=expression,
                limit=rows,
                output_fields=[*HEADER, "body"],
                search_params={"params": {"ef": width}},
                consistency_level="Session",
                timeout=self._timeout_s,
            )
        return [
            [{**hit["entity"], "score": float(hit["distance"])} for hit in hits] for hits in found
        ]

    def close(self) -> None:
        """Close the connection."""
        self._closed = True
        self._client.close()

    def _open(self, dim: int | None, space: str | None) -> int:
        with self._errors("look up"):
            there = self._client.has_collection(self._name, timeout=self._timeout_s)
        if not there and dim is None:
            raise RetrievalError(
                f"Milvus at {self._address} has no collection '{self._name}'. Check the name, or "
                "pass dim to create it."
            )
        if not there and dim is not None:
            self._create(dim, space)
        with self._errors("describe"):
            described = self._client.describe_collection(self._name, timeout=self._timeout_s)
        fields = {field["name"]: field for field in described["fields"]}
        if set(fields) != _FIELDS:
            raise RetrievalError(
                f"The {self.place} was not made by this version of mmedge: got fields "
                f"{sorted(fields)}, expected {sorted(_FIELDS)}. Use another collection."
            )
        with self._errors("load"):
            self._client.load_collection(self._name, timeout=max(_SLOW_S, self._timeout_s))
        return int(fields["vector"]["params"]["dim"])

    def _create(self, dim: int, space: str | None) -> None:
        from pymilvus import DataType

        described = json.dumps({"mmedge": FORMAT, "dim": dim, "space": space})
        schema = self._client.create_schema(
            auto_id=False, enable_dynamic_field=False, description=described
        )
        schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=128)
        for name, length in (("writer", 64), ("item", 128), ("origin", 512)):
            schema.add_field(name, DataType.VARCHAR, max_length=length)
        for name in ("part", "parts", "revision"):
            schema.add_field(name, DataType.INT64)
        schema.add_field("deleted", DataType.BOOL)
        for name in ("id", "body", TERMS):
            schema.add_field(name, DataType.JSON)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
        index = self._client.prepare_index_params()
        index.add_index("vector", index_type="HNSW", metric_type="COSINE", params=_GRAPH)
        with self._errors("create"):
            # One shard, so that the rows of a batch become visible together.
            self._client.create_collection(
                self._name,
                schema=schema,
                index_params=index,
                num_shards=1,
                consistency_level="Strong",
                timeout=max(_SLOW_S, self._timeout_s),
            )

    def _errors(self, doing: str) -> AbstractContextManager[None]:
        if self._closed:
            raise RetrievalError(f"The {self.place} is closed. Open it again.")
        return milvus_errors(self._address, f"{doing} '{self._name}'", self._timeout_s)
