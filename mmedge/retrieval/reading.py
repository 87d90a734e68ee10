"""The reading half of an index: what it holds, and what a search finds in it."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from mmedge.closing import Closing
from mmedge.errors import RetrievalError
from mmedge.models.embedding import EmbeddingModel
from mmedge.preprocess.decode import ImageSource
from mmedge.preprocess.waveform import AudioSource
from mmedge.retrieval import storing
from mmedge.retrieval.adding import Given, encoded
from mmedge.retrieval.duplicates import checked_cosine
from mmedge.retrieval.embedding import Encoder, check_space
from mmedge.retrieval.filter_sql import AllowedItems
from mmedge.retrieval.filters import Filter
from mmedge.retrieval.inputs import checked_ids, checked_k, checked_recall
from mmedge.retrieval.items import Item, Match
from mmedge.retrieval.moment import Moment
from mmedge.retrieval.nearest import Probing
from mmedge.retrieval.queries import Query
from mmedge.retrieval.query_embedding import embedded_queries, is_vector, query_kind
from mmedge.retrieval.ranking import Ranking
from mmedge.retrieval.recency import checked_half_life
from mmedge.retrieval.record import Record
from mmedge.retrieval.rows import read_deletions, read_items, read_stored
from mmedge.retrieval.schema import About, read_about
from mmedge.retrieval.searching import search_view
from mmedge.retrieval.stats import IndexStats, read_stats
from mmedge.retrieval.store import Change
from mmedge.retrieval.throughput import BulkModel
from mmedge.retrieval.view import StaleError, View, Views
from mmedge.specs import Array, Float32Array, Modality

__all__ = ["IndexReader"]

_TRIES = 20  # to begin a transaction in which no snapshot is being replaced


class IndexReader(Closing):
    """What an index can do without being changed; see mmedge.Index.

    Args:
        record: The index's record.
        encoder: Encodes queries.
        follow: Whether another encoder is taken when a migration has given the index another
            bundle: not where the caller chose one.
    """

    def __init__(self, record: Record, encoder: Encoder, *, follow: bool) -> None:
        self._record = record
        self._encoder = encoder
        self._follow = follow
        self._encoder_lock = threading.Lock()
        self._views = Views(record.folder)
        self._filters = AllowedItems()

    @property
    def path(self) -> Path:
        """The index's folder."""
        return self._record.folder

    @property
    def identity(self) -> str:
        """Names this index for good: the origin of its own changes."""
        return self._about().uuid

    @property
    def dim(self) -> int:
        """D, the length of a vector."""
        return self._about().dim

    @property
    def space(self) -> str | None:
        """Embedding-space fingerprint of the vectors; None for vectors of unknown origin."""
        return self._about().space

    @property
    def bundle(self) -> Path | None:
        """The bundle that embeds; None in an index of ready vectors."""
        encoder = self._encoder_of(self._about())
        return None if encoder.bundle is None else Path(encoder.bundle)

    @property
    def model(self) -> EmbeddingModel:
        """That bundle, loaded when this is first read.

        Raises:
            RetrievalError: If there is none, or it is not where it was.
            BundleError: If it cannot be opened.
        """
        return self._encoder_of(self._about()).model

    @property
    def bulk_model(self) -> BulkModel:
        """That bundle, loaded to embed many images and sounds; raises as `model`."""
        return self._encoder_of(self._about()).bulk_model

    @property
    def encodes(self) -> frozenset[Modality]:
        """What the bundle embeds; loads it.

        Raises:
            RetrievalError: If there is none.
            BundleError: If it cannot be opened.
        """
        return frozenset(self._encoder_of(self._about()).model.encoders)

    def fields(self) -> tuple[str, ...]:
        """Return the names of all metadata fields that items have, sorted."""
        with self._record.reading() as connection:
            return tuple(name for (name,) in connection.execute("SELECT name FROM fields"))

    def folders(self) -> tuple[Path, ...]:
        """Return the folders that were indexed; see Index.remember_folder."""
        with self._record.reading() as connection:
            return tuple(Path(path) for (path,) in connection.execute("SELECT path FROM folders"))

    def __len__(self) -> int:
        return self._about().items

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        with self._record.reading() as connection:
            return name in read_stored(connection, [name])

    def __repr__(self) -> str:
        about = self._about()
        return f"<Index {self.path}: {about.items} items, {about.dim} dimensions>"

    def get(self, ids: str | Sequence[str], *, vectors: bool = True) -> list[Item | None]:
        """Return items by id, None for an id that is not there.

        Args:
            ids: Of the items.
            vectors: Whether their vectors are read; (0, D) otherwise.

        Raises:
            InputError: If an id is no string or comes twice.
            IndexCorruptedError: If an item is damaged.
        """
        names = checked_ids(ids)
        with self._record.reading() as connection:
            stored = read_stored(connection, names)
            keys = [held.key for held in stored.values()]
            held = read_items(connection, keys, vectors=vectors)
        items = {row.item.id: row.item for row in held.values()}
        return [items.get(name) for name in names]

    def items(self, *, vectors: bool = True) -> Iterator[Item]:
        """Yield all items in the order in which they were added.

        Items that are changed meanwhile are yielded as they were or as they are, never torn.

        Args:
            vectors: Whether their vectors are read; (0, D) otherwise.
        """
        after = 0
        while True:
            with self._record.reading() as connection:
                rows = storing.items_after(connection, after, vectors=vectors)
            if not rows:
                return
            after = rows[-1].key
            yield from (row.item for row in rows)

    @contextmanager
    def moment(self) -> Iterator[Moment]:
        """Yield the index as it is now, which stays so within the block.

        What is written meanwhile stays in the record's log until the block ends.
        """
        with self._record.reading() as connection:
            yield Moment(connection)

    def embed(
        self,
        *,
        images: ImageSource | Iterable[ImageSource] | None = None,
        texts: str | Sequence[str] | None = None,
        audio: AudioSource | Iterable[AudioSource] | None = None,
    ) -> Float32Array:
        """Return the (N, D) vectors that the index's bundle makes of images, texts or sounds.

        Raises:
            InputError: If nothing is given or several, or it cannot be used.
            SpaceMismatchError: If the bundle is of another embedding space.
            RetrievalError: If there is no bundle.
        """
        about = self._about()
        given = Given(images, audio, None, texts)
        content = encoded(given, self._encoder_of(about), about.dim, about.space, hashed=False)
        return np.concatenate([*content.vectors, np.empty((0, about.dim), np.float32)])

    @overload
    def search(  # type: ignore[overload-overlap]
        self,
        query: str | os.PathLike[str] | bytes | Image.Image | Query,
        k: int = ...,
        *,
        where: Filter | None = ...,
        recall: float = ...,
        modality: Modality | None = ...,
        half_life_s: float | None = ...,
        distinct: float | None = ...,
        space: str | None = ...,
    ) -> list[Match]: ...

    @overload
    def search(
        self,
        query: Sequence[str] | Sequence[ImageSource] | Sequence[Query],
        k: int = ...,
        *,
        where: Filter | None = ...,
        recall: float = ...,
        modality: Modality | None = ...,
        half_life_s: float | None = ...,
        distinct: float | None = ...,
        space: str | None = ...,
    ) -> list[list[Match]]: ...

    @overload
    def search(
        self,
        query: Array,
        k: int = ...,
        *,
        where: Filter | None = ...,
        recall: float = ...,
        modality: Modality | None = ...,
        half_life_s: float | None = ...,
        distinct: float | None = ...,
        space: str | None = ...,
    ) -> Any: ...  # noqa: ANN401, by the number of its axes

    def search(
        self,
        query: ImageSource
        | Query
        | Sequence[str]
        | Sequence[ImageSource]
        | Sequence[Query]
        | Array,
        k: int = 10,
        *,
        where: Filter | None = None,
        recall: float = 0.95,
        modality: Modality | None = None,
        half_life_s: float | None = None,
        distinct: float | None = None,
        space: str | None = None,
    ) -> list[Match] | list[list[Match]]:
        """Return the k items nearest to a query, best first.

        Args:
            query: A str is a text, even one that looks like a path; a Path, bytes, a PIL image or
                a uint8 array (H, W, 3) is an image; a floating-point array (D,) is a vector; a
                Query is several of these at once, and words. A sequence of texts, of images or of
                Querys, or an array (Q, D), is Q queries.
            k: Matches a query, at most.
            where: Condition on the items; see mmedge.retrieval.filters.
            recall: Share of the true k nearest that an approximate search must find on average; 1
                for an exact search. See `Index.compact`.
            modality: What a query that is a vector was encoded from; None if unknown. A text takes
                a wider search than an image for the same recall.
            half_life_s: After so many seconds an item's score has halved, so that newer items come
                first; see mmedge.retrieval.recency.decayed. None for scores without decay.
            distinct: From this cosine on to a better match an item is left out as its
                near-duplicate, and others are found in its place; None for none.
            space: Fingerprint of the embedding space of a query that is a vector; None if unknown.

        Returns:
            Matches of a single query, or a list of such lists for several.

        Raises:
            InputError: If the query, k, the filter or another option cannot be used.
            SpaceMismatchError: If the query's vector is of another embedding space.
            RetrievalError: If there is no bundle to embed the query with.
            IndexCorruptedError: If the record is damaged.
        """
        k, recall = checked_k(k), checked_recall(recall)
        if half_life_s is not None:
            half_life_s = checked_half_life(half_life_s)
        if distinct is not None:
            distinct = checked_cosine(distinct, "distinct")
        now = time.time()
        kind = query_kind(query) if modality is None else Modality(modality).value
        embedded = None
        if not is_vector(query):  # embedded before the transaction, which would be a long one
            about = self._about()
            embedded = embedded_queries(query, self.embed, about.dim)
        with self._viewing() as (connection, view):
            check_space(view.about.space, space, "this query is")
            if embedded is None:
                embedded = embedded_queries(query, self.embed, view.about.dim)
            else:
                storing.check_unchanged(about, view.about)
            vectors, words, single = embedded
            found = search_view(
                view,
                connection,
                vectors,
                k,
                where=where,
                probing=Probing(kind, recall),
                rankings=[Ranking(each, half_life_s, now, distinct) for each in words],
                filters=self._filters,
            )
        return found[0] if single else found

    def changes(self, after: str | None, limit: int) -> list[Change]:
        """Return up to `limit` changes after a cursor; see VectorStore.changes.

        An id comes once, at its last change.

        Raises:
            InputError: If the cursor is not of this index, or the limit is below 1.
            RetrievalError: If `compact` has forgotten deletions after it.
        """
        with self._record.reading() as connection:
            return storing.changes(connection, after, checked_k(limit))

    def revisions(self, ids: Sequence[str]) -> list[tuple[int, str] | None]:
        """Return revision and origin of each item or of its deletion; None for an unknown id.

        Raises:
            InputError: If an id is no string or comes twice.
        """
        names = checked_ids(ids)
        with self._record.reading() as connection:
            found = read_deletions(connection, names)
            for name, held in read_stored(connection, names).items():
                found[name] = (held.revision, held.origin)
        return [found.get(name) for name in names]

    def cursor(self, name: str) -> str | None:
        """Return a cursor kept by `set_cursor`; None if there is none."""
        with self._record.reading() as connection:
            found = connection.execute("SELECT cursor FROM cursors WHERE name = ?", (name,))
            held = found.fetchone()
        return None if held is None else str(held[0])

    def _about(self) -> About:
        with self._record.reading() as connection:
            return read_about(connection)

    @contextmanager
    def _viewing(self) -> Iterator[tuple[sqlite3.Connection, View]]:
        for _ in range(_TRIES):
            with self._record.reading() as connection:
                try:
                    view = self._views.at(connection)
                except StaleError:
                    continue
                yield connection, view
                return
        raise RetrievalError(f"{self.path}: its snapshots change all the time. Search again.")

    def _encoder_of(self, about: About) -> Encoder:
        with self._encoder_lock:
            if self._follow and about.bundle != self._encoder.bundle:
                self._encoder.close()
                self._encoder = self._encoder.with_bundle(about.bundle, about.precision)
            return self._encoder

    def stats(self) -> IndexStats:
        """Return how many items and vectors there are, and what they take."""
        with self._viewing() as (connection, view):
            return read_stats(connection, view, self.path)

    def close(self) -> None:
        """Release files and the model."""
        self._record.close()
        self._encoder.close()
