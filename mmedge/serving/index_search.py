"""Searches, items and thumbnails of one index, as the search API's models."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol, TypeAlias
from urllib.parse import quote

import numpy as np

from mmedge.errors import InputError
from mmedge.retrieval.filter_text import parse_filter
from mmedge.retrieval.filters import Filter, check_fields, matches
from mmedge.retrieval.items import Item, Match
from mmedge.retrieval.queries import Query
from mmedge.retrieval.store import Change
from mmedge.serving.images import SourceFolders, Thumbnails
from mmedge.serving.problems import FieldError, RequestError
from mmedge.serving.search_models import (
    MAX_IMAGE_BYTES,
    Hit,
    ImageOptions,
    ItemResponse,
    ItemsQuery,
    ItemsResponse,
    SearchOptions,
    SearchRequest,
    SearchResponse,
    SimilarOptions,
    StatsResponse,
    TextQuery,
    Timing,
)
from mmedge.specs import Float32Array, Modality

__all__ = ["Embed", "IndexSearch"]

Embed: TypeAlias = Callable[[Any], Float32Array]
"""(1, D) vector of a text, or of the bytes of an image file."""

_SCANNED = 2000  # changes that one page of items looks at


class SearchedIndex(Protocol):
    """What is used of an Index."""

    @property
    def dim(self) -> int:
        """D, the length of a vector."""

    @property
    def space(self) -> str | None:
        """Embedding-space fingerprint of the vectors."""

    def __len__(self) -> int:
        """How many items there are."""

    def get(self, ids: Sequence[str]) -> list[Item | None]:
        """Return items by id, None for an id that is not there."""

    def changes(self, after: str | None, limit: int) -> list[Change]:
        """Return up to `limit` changes after a cursor, oldest first."""

    def search(
        self,
        query: Query,
        k: int,
        *,
        where: Filter | None,
        recall: float,
        modality: Modality | None,
        distinct: float | None,
    ) -> list[Match]:
        """Return the k items nearest to a query of vectors, best first."""


class IndexSearch:
    """Searches, items and thumbnails of one index; may be used from several threads at once.

    Args:
        name: Of the index.
        index: The index.
        embed: How queries are encoded, by modality; empty leaves searches by items and vectors.
        fields: Returns the metadata fields that items have.
        folders: Folders whose images may be shown.
    """

    def __init__(
        self,
        name: str,
        index: SearchedIndex,
        embed: Mapping[Modality, Embed],
        fields: Callable[[], Sequence[str]],
        folders: SourceFolders,
    ) -> None:
        self._name, self._index, self._embed, self._fields = name, index, embed, fields
        self._folders, self._thumbnails = folders, Thumbnails(folders)

    @property
    def shows_images(self) -> bool:
        """Whether there are folders whose images may be shown."""
        return bool(self._folders.folders)

    def stats(self) -> StatsResponse:
        """Return what the index holds and how it can be searched."""
        return StatsResponse(
            name=self._name,
            items=len(self._index),
            dim=self._index.dim,
            space=self._index.space,
            searchable_by=tuple(
                kind.value for kind in (Modality.TEXT, Modality.IMAGE) if kind in self._embed
            ),
            fields=self._known_fields(),
            images=self.shows_images,
            max_image_bytes=MAX_IMAGE_BYTES,
        )

    def search_text(self, query: TextQuery) -> SearchResponse:
        """Search by a text.

        Raises:
            InputError: If the index has no text encoder, or the filter cannot be used.
            TextError: If the text cannot be used.
        """
        return self._search(query, text=query.q)

    def search_image(self, image: bytes, options: ImageOptions) -> SearchResponse:
        """Search by the bytes of an image file.

        Raises:
            InputError: If the index has no image encoder, or as search_text.
            ImageError: If the bytes are not an image, or one that is too large.
        """
        return self._search(options, text=options.q, image=image)

    def similar(self, name: str, options: SimilarOptions) -> SearchResponse:
        """Search by an item's own vector; the item itself is left out.

        Raises:
            InputError: If there is no such item or part, or as search_text.
        """
        item = self._item(name)
        if options.part >= len(item.vectors):
            detail = f"part: got {options.part}, expected less than {len(item.vectors)}."
            raise RequestError(HTTPStatus.NOT_FOUND, detail)
        vector = item.vectors[options.part : options.part + 1]
        return self._search(options, text=options.q, like=vector, left_out=(name,))

    def search(self, request: SearchRequest) -> SearchResponse:
        """Search by a text, a vector, items, or several of them.

        Raises:
            InputError: If there is no such item, the vector has another length or is zero, or as
                search_text.
        """
        given = [*(self._item(name).vectors[:1] for name in request.like)]
        if request.vector is not None:
            given.append(self._unit(request.vector))
        return self._search(
            request,
            text=request.text,
            like=np.concatenate(given) if given else None,
            unlike=[self._item(name).vectors[:1] for name in request.unlike],
            left_out=request.like,
        )

    def item(self, name: str) -> ItemResponse:
        """Return an item.

        Raises:
            InputError: If there is no such item.
        """
        return ItemResponse(**self._facts(self._item(name)))

    def items(self, query: ItemsQuery) -> ItemsResponse:
        """Return some items, in the order in which they were last changed.

        Raises:
            InputError: If the filter or the cursor cannot be used.
        """
        where = self._filter(query.where)
        found: list[ItemResponse] = []
        after, scanned = query.after, 0
        while scanned < _SCANNED and len(found) < query.k:
            changes = self._index.changes(after, query.k)
            items = self._index.get([change.id for change in changes])
            for change, item in zip(changes, items, strict=True):
                after = change.cursor
                if item is not None and (where is None or matches(where, item)):
                    found.append(ItemResponse(**self._facts(item)))
                if len(found) == query.k:
                    break
            scanned += len(changes)
            if len(changes) < query.k:
                return ItemsResponse(items=tuple(found), next=None)
        return ItemsResponse(items=tuple(found), next=after)

    def thumbnail(self, name: str, side: int) -> bytes:
        """Return an item's thumbnail, JPEG.

        Raises:
            InputError: If there is no such item, or it has no image that may be shown.
        """
        item = self._item(name)
        try:
            return self._thumbnails.get(item.source or "", side)
        except InputError as error:
            raise RequestError(HTTPStatus.NOT_FOUND, str(error)) from error

    def _search(
        self,
        options: SearchOptions,
        *,
        text: str | None = None,
        image: bytes | None = None,
        like: Float32Array | None = None,
        unlike: Sequence[Float32Array] = (),
        left_out: Sequence[str] = (),
    ) -> SearchResponse:
        """Search by what is given, averaged, against what is not wanted.

        Args:
            options: Filter, number of items, and a text that is not wanted.
            text: Text that is encoded.
            image: Image file that is encoded.
            like: (Q, D) vectors.
            unlike: (1, D) vectors that are not wanted.
            left_out: Ids that are not returned.
        """
        started = time.perf_counter()
        where = self._filter(options.where)
        encoding = time.perf_counter()
        wanted = [] if like is None else [like]
        unwanted = list(unlike)
        for modality, content, parts in (
            (Modality.TEXT, text, wanted),
            (Modality.IMAGE, image, wanted),
            (Modality.TEXT, options.without, unwanted),
        ):
            if content is not None:
                parts.append(self._encoder(modality)(content))
        encoded = any(each is not None for each in (text, image, options.without))
        searching = time.perf_counter()
        query = Query(
            list(np.concatenate(wanted)),
            unlike=[each[0] for each in unwanted],
            words=options.words,
        )
        found = self._index.search(
            query,
            options.k + len(left_out),
            where=where,
            recall=options.recall,
            modality=_modality(text, image, wanted, unwanted),
            distinct=options.distinct,
        )
        done = time.perf_counter()
        kept = [match for match in found if match.id not in left_out][: options.k]
        hits = tuple(
            Hit(**self._facts(match), score=match.score, part=match.part) for match in kept
        )
        timing = Timing(
            encode_ms=_milliseconds(searching - encoding) if encoded else None,
            search_ms=_milliseconds(done - searching),
            total_ms=_milliseconds(time.perf_counter() - started),
        )
        return SearchResponse(results=hits, timing=timing)

    def _unit(self, numbers: Sequence[float]) -> Float32Array:
        """Return (1, D) float32, L2-normalised."""
        vector = np.array([numbers], np.float64)
        largest = np.abs(vector).max()
        if vector.shape[1] != self._index.dim or largest == 0:
            got = "zero" if largest == 0 else f"{vector.shape[1]} numbers"
            detail = f"vector: got {got}, expected {self._index.dim} numbers that are not all zero."
            raise RequestError(
                HTTPStatus.BAD_REQUEST, detail, FieldError(field="vector", message=detail)
            )
        scaled = vector / largest  # squares of large numbers would overflow
        unit: Float32Array = (scaled / np.linalg.norm(scaled)).astype(np.float32)
        return unit

    def _encoder(self, modality: Modality) -> Embed:
        if modality not in self._embed:
            raise RequestError(
                HTTPStatus.CONFLICT,
                f"This index cannot be searched by {modality.value}: it has no {modality.value} "
                "encoder. Start mmedge serve with --bundle, or search by an item or a vector.",
            )
        return self._embed[modality]

    def _filter(self, text: str | None) -> Filter | None:
        if text is None or not text.strip():
            return None
        try:
            where = parse_filter(text)
            check_fields(where, self._fields())
        except InputError as error:
            field = FieldError(field="where", message=str(error))
            raise RequestError(HTTPStatus.BAD_REQUEST, str(error), field) from error
        return where

    def _known_fields(self) -> tuple[str, ...]:
        return ("time", "source", "id", *(name for name in self._fields()))

    def _item(self, name: str) -> Item:
        item = self._index.get([name])[0]
        if item is None:
            raise RequestError(HTTPStatus.NOT_FOUND, "There is no item with this id.")
        return item

    def _facts(self, item: Item | Match) -> dict[str, object]:
        thumbnail = None
        if self._folders.shows(item.source):
            thumbnail = f"/api/thumbnails/{quote(item.id, safe='')}"
        return {
            "id": item.id,
            "time": item.time,
            "source": self._shown_source(item.source),
            "text": item.text,
            "metadata": dict(item.metadata),
            "thumbnail": thumbnail,
        }

    def _shown_source(self, source: str | None) -> str | None:
        """Return a source without the folders above those that are shown."""
        if source is None or not Path(source).is_absolute():
            return source
        for folder in self._folders.folders:
            if Path(source).is_relative_to(folder):
                return str(Path(source).relative_to(folder))
        return Path(source).name


def _modality(
    text: str | None, image: bytes | None, wanted: list[Any], unwanted: list[Any]
) -> Modality | None:
    """Return what a query of one part was encoded from; None for an item's or a ready vector."""
    if len(wanted) > 1 or unwanted:
        return None
    if text is not None:
        return Modality.TEXT
    return None if image is None else Modality.IMAGE


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 3)
