"""An index in memory, its photos, and the application that serves it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from starlette.testclient import TestClient

from mmedge.models import DualEncoder
from mmedge.retrieval.filters import Filter, matches
from mmedge.retrieval.items import Item, Match
from mmedge.retrieval.queries import Query
from mmedge.retrieval.query_embedding import embedded_queries
from mmedge.retrieval.store import Change
from mmedge.serving.app import create_app
from mmedge.serving.guard import LOOPBACK, Guard, Limits
from mmedge.serving.images import SourceFolders
from mmedge.serving.index_search import Embed, IndexSearch
from mmedge.serving.search import SearchPages
from mmedge.specs import Float32Array, Modality

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 50, 220)}
ADDRESS = "http://127.0.0.1:8000"


class MemoryStore:
    """A SearchedIndex in a dict; `before_search` is called by every search, `asked` keeps it."""

    def __init__(self, dim: int, space: str | None = None) -> None:
        self.dim, self.space = dim, space
        self.stored: dict[str, Item] = {}
        self.before_search = lambda: None
        self.asked: dict[str, object] = {}
        self.modality: Modality | None = None

    def upsert(self, items: Sequence[Item]) -> None:
        self.stored.update({item.id: item for item in items})

    def get(self, ids: Sequence[str]) -> list[Item | None]:
        return [self.stored.get(name) for name in ids]

    def search(
        self,
        query: Query,
        k: int,
        *,
        where: Filter | None = None,
        recall: float = 0.95,
        modality: Modality | None = None,
        distinct: float | None = None,
    ) -> list[Match]:
        self.before_search()
        self.asked = {"recall": recall, "distinct": distinct, "words": query.words}
        self.modality = modality
        ((vector,), _, _) = embedded_queries(query, None, self.dim)  # type: ignore[arg-type]
        kept = [i for i in self.stored.values() if where is None or matches(where, i)]
        found = []
        for item in kept:
            scores = item.vectors @ vector
            part = int(scores.argmax())
            score = float(scores[part])
            found.append(
                Match(item.id, score, item.metadata, item.time, item.source, item.text, part)
            )
        return sorted(found, key=lambda match: -match.score)[:k]

    def changes(self, after: str | None, limit: int) -> list[Change]:
        start = int(after or 0)
        some = list(self.stored.values())[start : start + limit]
        return [Change(str(start + n), i.id, False, 0, "") for n, i in enumerate(some, start=1)]

    def __len__(self) -> int:
        return len(self.stored)

    def close(self) -> None: ...


def write_photos(folder: Path) -> dict[str, Path]:
    """A photo a colour, 64 x 48, by colour."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {colour: folder / f"{colour}.png" for colour in COLOURS}
    for colour, path in paths.items():
        Image.new("RGB", (64, 48), COLOURS[colour]).save(path)
    return paths


def photo_store(model: DualEncoder, photos: dict[str, Path]) -> MemoryStore:
    """A store of the photos, the embedding of each by a bundle."""
    store = MemoryStore(model.embedding_dim, model.space)
    vectors = model.encode_image(list(photos.values()))
    for number, (colour, path) in enumerate(photos.items()):
        store.upsert(
            [
                Item(
                    f"photos/{colour}.png",
                    vectors[number : number + 1],
                    time=1_767_225_600.0 + number,
                    source=str(path),
                    text=f"a {colour} wall" if colour == "red" else None,
                    metadata={"colour": colour, "tags": ["wall", colour], "weight": 1.5 * number},
                )
            ]
        )
    return store


def client_of(
    store: MemoryStore,
    model: DualEncoder | None,
    folders: Sequence[Path],
    *,
    limits: Limits | None = None,
    hidden: Sequence[Path] = (),
) -> TestClient:
    """A client of the application around a store; its errors are responses."""
    app = app_of(store, model, folders, limits=limits, hidden=hidden)
    return TestClient(app, base_url=ADDRESS, raise_server_exceptions=False)


def app_of(
    store: MemoryStore,
    model: DualEncoder | None,
    folders: Sequence[Path],
    *,
    limits: Limits | None = None,
    hidden: Sequence[Path] = (),
) -> Guard:
    """The application around a store."""

    def fields() -> list[str]:
        return sorted({name for item in store.stored.values() for name in item.metadata})

    embed: dict[Modality, Embed] = {}
    if model is not None:
        embed = {Modality.TEXT: model.encode_text, Modality.IMAGE: model.encode_image}
    search = IndexSearch("photos.index", store, embed, fields, SourceFolders(folders))
    pages = SearchPages(search, "photos.index", hidden, store.close)
    if limits is not None:
        pages.limits = limits
    return create_app(pages, frozenset(LOOPBACK))


def unit(*numbers: float) -> Float32Array:
    """(1, D) float32, L2-normalised."""
    vector = np.array([numbers], np.float32)
    return vector / np.linalg.norm(vector)
