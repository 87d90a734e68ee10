"""Requests and responses of the search API."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from typing_extensions import Self

__all__ = [
    "MAX_IMAGE_BYTES",
    "Hit",
    "ImageOptions",
    "ItemResponse",
    "ItemsQuery",
    "ItemsResponse",
    "MetadataModel",
    "SearchOptions",
    "SearchRequest",
    "SearchResponse",
    "SimilarOptions",
    "StatsResponse",
    "TextQuery",
    "ThumbnailOptions",
    "Timing",
]

MAX_IMAGE_BYTES = 20 << 20
_MAX_K = 200
_MAX_TEXT = 2000
_MAX_FILTER = 4000
_MAX_ID = 4096
_MAX_IDS = 32
_MAX_DIM = 65_536
_MAX_SIDE = 1024

_Text = Annotated[str, Field(min_length=1, max_length=_MAX_TEXT)]
_Id = Annotated[str, Field(min_length=1, max_length=_MAX_ID)]
MetadataModel: TypeAlias = dict[str, str | int | float | bool | list[str] | None]


class _Request(BaseModel):
    """A part of a request; unknown names are refused, so that a misspelt one is not ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SearchOptions(_Request):
    """Options of every search."""

    k: int = Field(24, ge=1, le=_MAX_K, description="Items wanted.")
    where: str | None = Field(
        None,
        max_length=_MAX_FILTER,
        description="Filter in its text form.",
        examples=['time > 2026-01-01 and tag = "kitchen"'],
    )
    recall: float = Field(
        0.95, gt=0, le=1, description="Wanted share of the true nearest items; 1 searches exactly."
    )
    without: _Text | None = Field(
        None, description="Text that the items are not to be like.", examples=[None]
    )
    words: _Text | None = Field(
        None,
        description="Words of the items' texts; items that hold any move up, and scores are those "
        "of the fused rankings.",
        examples=[None],
    )
    distinct: float | None = Field(
        None,
        gt=0,
        le=1,
        description="From this cosine on to a better result an item is left out as its "
        "near-duplicate.",
        examples=[None],
    )


class TextQuery(SearchOptions):
    """A search by text."""

    q: _Text = Field(description="Text.", examples=["a red mug"])


class ImageOptions(SearchOptions):
    """A search by an image, which is the request's body."""

    q: _Text | None = Field(None, description="Text that the items are to be like, too.")


class SimilarOptions(ImageOptions):
    """A search by an item of the index."""

    part: int = Field(0, ge=0, description="Which of the item's vectors.")


class SearchRequest(SearchOptions):
    """A search by any of: a text, a vector, items of the index; together they are averaged."""

    text: _Text | None = Field(None, description="Text.", examples=["a red mug"])
    vector: list[FiniteFloat] | None = Field(
        None,
        min_length=1,
        max_length=_MAX_DIM,
        description="Vector of the index's space; its length does not matter.",
        examples=[None],
    )
    like: list[_Id] = Field(
        [], max_length=_MAX_IDS, description="Items, which are left out of the results."
    )
    unlike: list[_Id] = Field(
        [], max_length=_MAX_IDS, description="Items that the results are not to be like."
    )

    @model_validator(mode="after")
    def _some_query(self) -> Self:
        if self.text is None and self.vector is None and not self.like:
            raise ValueError("Expected at least one of text, vector and like.")
        return self


class ItemsQuery(_Request):
    """Which items are listed."""

    k: int = Field(24, ge=1, le=_MAX_K, description="Items wanted.")
    where: str | None = Field(None, max_length=_MAX_FILTER, description="Filter, in its text form.")
    after: str | None = Field(
        None, max_length=200, description="The `next` of the page before; none starts at the first."
    )


class ThumbnailOptions(_Request):
    """Size of a thumbnail."""

    side: int = Field(320, ge=16, le=_MAX_SIDE, description="Longest side in pixels.")


class _Response(BaseModel):
    model_config = ConfigDict(frozen=True)


class ItemResponse(_Response):
    """An item of the index, without its vectors."""

    id: str = Field(description="Unique in the index.")
    time: float | None = Field(description="Seconds since 1970 (UTC) at which it was seen.")
    source: str | None = Field(
        description="Where it comes from. Of a file below a folder that is shown, the path from "
        "that folder; of any other file, the name."
    )
    text: str | None = Field(description="Its text, such as a caption.")
    metadata: MetadataModel = Field(description="Its fields, as filters name them.")
    thumbnail: str | None = Field(
        description="Where its thumbnail is, if its source is an image that may be shown."
    )


class Hit(ItemResponse):
    """An item that a search found."""

    score: float = Field(
        description="Cosine similarity in [-1, 1]; with `words` that of the fused rankings."
    )
    part: int = Field(description="Which of the item's vectors is nearest.")


class ItemsResponse(_Response):
    """Some items, in the order in which they were last changed."""

    items: tuple[ItemResponse, ...] = Field(
        description="At most k items; fewer, or none, where a filter passes few."
    )
    next: str | None = Field(description="`after` of the next page; null at the end.")


class Timing(_Response):
    """Where the time of a search went, measured in the server."""

    encode_ms: float | None = Field(description="Encoding the query; null where none was.")
    search_ms: float = Field(description="Searching the index.")
    total_ms: float = Field(description="Everything but the network.")


class SearchResponse(_Response):
    """What a search found, best first."""

    results: tuple[Hit, ...] = Field(description="At most k items.")
    timing: Timing


class StatsResponse(_Response):
    """What the index holds and how it can be searched."""

    name: str = Field(description="Name of the index.")
    items: int = Field(description="How many items it holds.")
    dim: int = Field(description="Length of a vector.")
    space: str | None = Field(description="Embedding-space fingerprint of the vectors.")
    searchable_by: tuple[str, ...] = Field(
        description="Kinds of queries besides vectors and items: text, image; none without a model."
    )
    fields: tuple[str, ...] = Field(description="Fields that a filter can name.")
    images: bool = Field(description="Whether there are folders whose images may be shown.")
    max_image_bytes: int = Field(description="Largest image file that is searched by.")
