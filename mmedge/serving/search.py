"""Page and API of an index."""

# No `from __future__ import annotations`: FastAPI is imported inside functions, and what it reads
# from annotations could not be found from text.

import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mmedge.errors import InputError
from mmedge.retrieval.index import Index
from mmedge.retrieval.schema import RECORD
from mmedge.serving.app import PROBLEMS, ServeOptions, Work, add_pages
from mmedge.serving.guard import Limits
from mmedge.serving.images import SourceFolders
from mmedge.serving.index_search import Embed, IndexSearch
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
from mmedge.specs import Modality

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["SearchPages", "open_path", "recognise"]

_PAGES = {
    "/": "search.html",
    "/search.css": "search.css",
    "/search.js": "search.js",
    "/results.js": "results.js",
    "/icon.svg": "icon.svg",
}
_NO_IMAGES = "Images are not shown. To show those that lie in a folder, add --root FOLDER."
_IMAGE_PATH = "/api/search/image"
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}


class SearchPages:
    """Page and API of an index.

    Args:
        search: The index.
        title: What it is, in a few words.
        hidden: Paths of which messages to clients show the name alone.
        close: Releases what is searched.
    """

    limits = Limits(bodies={_IMAGE_PATH: MAX_IMAGE_BYTES})

    def __init__(
        self, search: IndexSearch, title: str, hidden: Iterable[Path], close: Callable[[], None]
    ) -> None:
        self._search, self.title, self.hidden = search, title, tuple(hidden)
        self.notes = () if search.shows_images else (_NO_IMAGES,)
        self.close = close

    def add_routes(self, app: "FastAPI", work: Work) -> None:
        """Add the page and the API."""
        add_pages(app, _PAGES)
        _add_searches(app, work, self._search)
        _add_items(app, work, self._search)


def recognise(path: Path) -> bool:
    """Return whether a path holds an index."""
    return (path / RECORD).is_file()


def open_path(path: Path, options: ServeOptions) -> SearchPages:
    """Open an index for reading, and load the model of its queries.

    Raises:
        RetrievalError: If the index is of a newer format.
        IndexCorruptedError: If it is damaged.
        SpaceMismatchError: If the bundle is of another embedding space.
        StorageError: If it cannot be read.
        BundleError: If the bundle cannot be used.
        InputError: If a folder of images is none.
    """
    for folder in options.folders or ():
        if not folder.is_dir():
            raise InputError(f"--root {folder}: no such folder. Check the path.")
    with ExitStack() as stack:
        index = stack.enter_context(Index.open(path, bundle=options.bundle, read_only=True))
        embed = _encoders(index)
        shown = index.folders() if options.folders is None else options.folders
        folders = SourceFolders(shown)
        search = IndexSearch(path.name, index, embed, index.fields, folders)
        stack.pop_all()
    bundle = () if index.bundle is None else (index.bundle,)
    return SearchPages(search, path.name, (path, *bundle, *folders.folders), index.close)


def _encoders(index: Index) -> dict[Modality, Embed]:
    """Return how queries are encoded, with the model loaded."""
    if index.bundle is None:
        return {}
    if not index.bundle.is_dir():
        warnings.warn(
            f"{index.bundle}: the index's bundle is not there, so only its items can be searched "
            "by. Pass --bundle for searches by text and image.",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}
    encoders = index.encodes
    found: dict[Modality, Embed] = {}
    if Modality.TEXT in encoders:
        found[Modality.TEXT] = lambda text: index.embed(texts=[text])
    if Modality.IMAGE in encoders:
        found[Modality.IMAGE] = lambda image: index.embed(images=[image])
    return found


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
