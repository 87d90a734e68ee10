"""What an index holds and what a search finds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from mmedge.specs import Float32Array

__all__ = ["Added", "Item", "Match", "Metadata", "MetadataValue"]

MetadataValue: TypeAlias = str | int | float | bool | list[str] | None
"""A metadata field's value; a list of strings holds tags."""

Metadata: TypeAlias = Mapping[str, MetadataValue]


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One stored item with its vectors.

    Attributes:
        id: Unique in its index.
        vectors: (V, D) float32, L2-normalised: one, or several such as a video's frames.
        time: Seconds since 1970 (UTC) at which the item was seen.
        source: Where it comes from: a file, a camera.
        text: Searched as words by a hybrid search; a caption, say.
        metadata: Fields that a filter can name.
        content_hash: Hash of the source's content, so that an unchanged file is skipped.
        revision: Microseconds since 1970 of the last change; the later of two changes wins.
        origin: The index in which the last change was made.
    """

    id: str
    vectors: Float32Array = field(repr=False)
    time: float | None = None
    source: str | None = None
    text: str | None = None
    metadata: Metadata = field(default_factory=dict)
    content_hash: str | None = None
    revision: int = 0
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Match:
    """One item that a search found.

    Attributes:
        id: The item's.
        score: Cosine similarity in [-1, 1]; in a hybrid search the fused score, higher is better.
        metadata: The item's fields.
        time: Seconds since 1970 (UTC), where the item has one.
        source: Where the item comes from.
        text: The item's text.
        part: Which of the item's vectors is nearest to the query.
    """

    id: str
    score: float
    metadata: Metadata = field(default_factory=dict)
    time: float | None = None
    source: str | None = None
    text: str | None = None
    part: int = 0


class Added(list[str]):
    """The ids of the items that were added, in order.

    Attributes:
        skipped: Items that were not added, by id the id of the item that they are near to.
    """

    def __init__(self, ids: Iterable[str], skipped: Mapping[str, str]) -> None:
        super().__init__(ids)
        self.skipped = dict(skipped)
