"""Page and API of an index."""

# No `from __future__ import annotations`: FastAPI is imported inside functions, and what it reads
# from annotations could not be found from text.

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mmedge.serving.app import PROBLEMS, Work, add_pages
from mmedge.serving.guard import Limits
from mmedge.serving.index_search import IndexSearch
from mmedge.serving.search_models import (
    MAX_IMAGE_BYTES,
    ImageOptions,
    ItemResponse,
    ItemsQuery,
    ItemsResponse,
    SearchRequest,
    SearchResponse,
    SimilarOptions,
    StatsResponse,
    TextQuery,
    ThumbnailOptions,
)

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["SearchPages"]

_PAGES = {
    "/": "search.html",
    "/search.css": "search.css",
    "/search.js": "search.js",
    "/results.js": "results.js",
    "/icon.svg": "icon.svg",
}
_IMAGE_PATH = "/api/search/image"
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}


class SearchPages:
    """Page and API of an index.

    Args:
        search: The index.
        title: What it is, in a few words.
        hidden: Paths of which messages to clients show the name alone.
        closing: Called by close.
    """

    limits = Limits(bodies={_IMAGE_PATH: MAX_IMAGE_BYTES})

    def __init__(self, search: IndexSearch, title: str, hidden: Iterable[Path] = ()) -> None:
        self._search, self.title, self.hidden = search, title, tuple(hidden)

    def add_routes(self, app: "FastAPI", work: Work) -> None:
        """Add the page and the API."""
        add_pages(app, _PAGES)
        _add_searches(app, work, self._search)
        _add_items(app, work, self._search)

    def close(self) -> None:
        """Close the index and the model."""


def _add_searches(app: "FastAPI", work: Work, search: IndexSearch) -> None:
    from fastapi import Query, Request

    @app.get("/api/search", responses=PROBLEMS, tags=["search"])
    async def search_by_text(query: Annotated[TextQuery, Query()]) -> SearchResponse:
        """Search by a text."""
        return await work(partial(search.search_text, query))

    @app.post("/api/search", responses=PROBLEMS, tags=["search"])
    async def search_by_several(request: SearchRequest) -> SearchResponse:
        """Search by a text, a vector, items, or several of them."""
        return await work(partial(search.search, request))

    image_body = {
        "required": True,
        "description": f"An image file of at most {MAX_IMAGE_BYTES} bytes.",
        "content": {"image/*": _BINARY, "application/octet-stream": _BINARY},
    }

    @app.post(
        _IMAGE_PATH,
        responses=PROBLEMS,
        tags=["search"],
        openapi_extra={"requestBody": image_body},
    )
    async def search_by_image(
        request: Request, options: Annotated[ImageOptions, Query()]
    ) -> SearchResponse:
        """Search by an image, whose file is the body, and a text if one is given."""
        return await work(partial(search.search_image, await request.body(), options))

    @app.get("/api/similar/{id:path}", responses=PROBLEMS, tags=["search"])
    async def search_by_item(
        id: str,  # noqa: A002, the name in the API
        options: Annotated[SimilarOptions, Query()],
    ) -> SearchResponse:
        """Search by an item, which is left out of the results, and a text if one is given."""
        return await work(partial(search.similar, id, options))


def _add_items(app: "FastAPI", work: Work, search: IndexSearch) -> None:
    from fastapi import Query, Response

    @app.get("/api/items", responses=PROBLEMS, tags=["items"])
    async def items(query: Annotated[ItemsQuery, Query()]) -> ItemsResponse:
        """List items in the order in which they were last changed."""
        return await work(partial(search.items, query))

    @app.get("/api/items/{id:path}", responses=PROBLEMS, tags=["items"])
    async def item(id: str) -> ItemResponse:  # noqa: A002, the name in the API
        """Return an item."""
        return await work(partial(search.item, id))

    jpeg = {"description": "The thumbnail.", "content": {"image/jpeg": _BINARY}}

    @app.get(
        "/api/thumbnails/{id:path}",
        response_class=Response,
        responses={**PROBLEMS, 200: jpeg},
        tags=["items"],
    )
    async def thumbnail(
        id: str,  # noqa: A002, the name in the API
        options: Annotated[ThumbnailOptions, Query()],
    ) -> Response:
        """Return an item's image, scaled down, as JPEG."""
        data = await work(partial(search.thumbnail, id, options.side))
        headers = {"cache-control": "private, max-age=60"}
        return Response(data, media_type="image/jpeg", headers=headers)

    @app.get("/api/stats", responses=PROBLEMS, tags=["items"])
    async def stats() -> StatsResponse:
        """Return what the index holds and how it can be searched."""
        return await work(search.stats)
