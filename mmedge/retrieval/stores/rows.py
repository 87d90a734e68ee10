"""Rows of a collection: one for each vector of each version of an item, never rewritten.

A change of an item is a new version, in rows of its own; the greatest version by (revision, origin,
key) of which all rows are there is the item as it is now. Rows of lesser versions are deleted by
whoever finds them. Milvus has no transactions and no compare-and-set, so that two devices may write
one id at the same moment: both versions arrive and every reader takes the same one.

A row's key is "WRITER/EPOCH SEQUENCE/NUMBER". One writer's keys grow, and a batch of its rows is
acknowledged before the next is sent, so a reader that has seen a writer's key has seen every
lesser one of that epoch. A batch of unknown outcome ends its epoch: its rows may arrive late,
before a key that readers have passed, so the next try sends them again under the next epoch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from mmedge.errors import InputError
from mmedge.retrieval.items import Item
from mmedge.retrieval.stores.terms import TERMS, hash_text, terms_of
from mmedge.specs import Float32Array

__all__ = [
    "FORMAT",
    "HEADER",
    "MARK",
    "Row",
    "Version",
    "about_row",
    "deletion_row",
    "hash_id",
    "item_of",
    "item_rows",
    "mark_row",
    "versions_of",
    "winner",
]

Row: TypeAlias = dict[str, Any]

HEADER = ["key", "writer", "item", "part", "parts", "revision", "origin", "deleted", "id"]
MARK = -1
"""Part number of rows that are no item's: what the collection is, and writers' epochs."""

_MAX_BODY_BYTES = 65_000  # Milvus's limit for a JSON field is 65,536
_MAX_ORIGIN_BYTES = 512
FORMAT = 1


@dataclass(slots=True)
class Version:
    """One version of an item, as far as its rows are visible."""

    revision: int
    origin: str
    key: str
    deleted: bool
    parts: int
    rows: list[Row] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether all its rows are there."""
        return len(self.rows) == self.parts

    @property
    def order(self) -> tuple[int, str, str]:
        """The greater of two wins; of a batch that was sent twice, the one of the later key."""
        return self.revision, self.origin, self.key


def hash_id(id_: str) -> str:
    """Return what stands for an item's id in expressions."""
    return hash_text("id", id_, size=24)


def item_rows(item: Item, dim: int) -> list[Row]:
    """Return an item's rows, still without key and writer.

    Raises:
        InputError: If the vectors have another width, or a value cannot be stored.
    """
    if item.vectors.ndim != 2 or item.vectors.shape[1] != dim or len(item.vectors) == 0:
        raise InputError(
            f"Item {item.id!r}: got vectors of shape {item.vectors.shape}, expected (V, {dim})."
        )
    if not np.isfinite(item.vectors).all():
        raise InputError(f"Item {item.id!r}: its vectors hold NaN or infinity.")
    body = _body(
        item.id,
        {
            "time": item.time,
            "source": item.source,
            "text": item.text,
            "content_hash": item.content_hash,
            "metadata": dict(item.metadata),
        },
    )
    shared = _header(item.id, len(item.vectors), item.revision, item.origin)
    terms = terms_of(item)
    return [
        {**shared, "part": part, "deleted": False, "body": body, TERMS: terms, "vector": vector}
        for part, vector in enumerate(np.ascontiguousarray(item.vectors, np.float32))
    ]


def deletion_row(id_: str, revision: int, origin: str, dim: int) -> Row:
    """Return the row that remembers a deletion, still without key and writer."""
    return _hidden(_header(id_, 1, revision, origin), 0, _body(id_, {}), dim)


def mark_row(key: str, body: Mapping[str, Any], dim: int) -> Row:
    """Return a row that is no item's."""
    header = {"key": key, "writer": "", "item": key, "parts": 1, "revision": 0, "origin": ""}
    return _hidden({**header, "id": {}}, MARK, dict(body), dim)


def about_row(identity: str, dim: int, space: str | None) -> Row:
    """Return the row that says what a collection holds."""
    body = {"format": FORMAT, "identity": identity, "dim": dim, "space": space}
    return mark_row(f"!about/{identity}", body, dim)


def _header(id_: str, parts: int, revision: int, origin: str) -> Row:
    if len(origin.encode("utf-8", "surrogatepass")) > _MAX_ORIGIN_BYTES:
        raise InputError(f"Item {id_!r}: its origin is longer than {_MAX_ORIGIN_BYTES} bytes.")
    if not 0 <= revision < 2**63:
        raise InputError(f"Item {id_!r}: got revision {revision}, expected 0 to 2**63 - 1.")
    return {
        "item": hash_id(id_),
        "id": {"id": id_},
        "parts": parts,
        "revision": revision,
        "origin": origin,
    }


def _hidden(header: Row, part: int, body: Row, dim: int) -> Row:
    vector = np.zeros(dim, np.float32)  # every row has one; `deleted` keeps it out of searches
    vector[0] = 1
    terms: dict[str, list[str]] = {"t": []}
    return {**header, "part": part, "deleted": True, "body": body, TERMS: terms, "vector": vector}


def _body(id_: str, body: Row) -> Row:
    for name, value in body.get("metadata", {}).items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise InputError(f"Item {id_!r}: '{name}' is {value}, expected at most 64 bits.")
    try:
        text = json.dumps({"id": id_, **body}, allow_nan=False, ensure_ascii=False)
        size = len(text.encode("utf-8"))
    except (TypeError, ValueError) as error:  # a lone surrogate is a ValueError too
        raise InputError(f"Item {id_!r}: it cannot be written as JSON: {error}.") from error
    if size > _MAX_BODY_BYTES:
        raise InputError(
            f"Item {id_!r}: its text and metadata take {size:,} bytes of JSON, and a row of Milvus "
            f"holds {_MAX_BODY_BYTES:,}. Shorten them."
        )
    return body


def versions_of(rows: Sequence[Row]) -> dict[str, list[Version]]:
    """Return the versions by the hash of their item's id."""
    found: dict[str, dict[str, Version]] = {}
    for row in rows:
        if row["part"] == MARK:
            continue
        batch = row["key"].rsplit("/", 1)[0]
        key = f"{batch}/{row['revision']}/{row['origin']}"
        version = found.setdefault(row["item"], {}).setdefault(
            key, Version(row["revision"], row["origin"], batch, row["deleted"], row["parts"])
        )
        version.rows.append(row)
    return {item: list(versions.values()) for item, versions in found.items()}


def winner(versions: Sequence[Version]) -> Version | None:
    """Return the version that an item has now; None while none is whole."""
    return max((one for one in versions if one.whole), key=lambda one: one.order, default=None)


def item_of(version: Version) -> Item | None:
    """Return the item of a version whose rows were read with body and vector; None if deleted."""
    if version.deleted:
        return None
    rows = sorted(version.rows, key=lambda row: int(row["part"]))
    body = rows[0]["body"]
    vectors: Float32Array = np.array([row["vector"] for row in rows], np.float32)
    return Item(
        id=rows[0]["id"]["id"],
        vectors=vectors,
        time=body["time"],
        source=body["source"],
        text=body["text"],
        metadata=body["metadata"],
        content_hash=body["content_hash"],
        revision=version.revision,
        origin=version.origin,
    )
