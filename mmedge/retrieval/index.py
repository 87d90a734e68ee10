"""Index: items with embeddings in a folder, searched by similarity."""

from __future__ import annotations

import os
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from PIL import Image

from mmedge.closing import Closing
from mmedge.errors import InputError, RetrievalError
from mmedge.files import atomic_directory
from mmedge.preprocess.decode import ImageSource
from mmedge.preprocess.waveform import AudioSource
from mmedge.retrieval import storing, upkeep
from mmedge.retrieval.adding import Given, encoded
from mmedge.retrieval.duplicates import checked_cosine, near_recent, recent_items
from mmedge.retrieval.embedding import Encoder, bundle_space, check_space
from mmedge.retrieval.filter_sql import AllowedItems
from mmedge.retrieval.filters import Filter
from mmedge.retrieval.inputs import (
    Time,
    Vectors,
    checked_ids,
    checked_k,
    checked_recall,
)
from mmedge.retrieval.items import Added, Item, Match, Metadata
from mmedge.retrieval.queries import Query
from mmedge.retrieval.query_embedding import embedded_queries
from mmedge.retrieval.ranking import Ranking
from mmedge.retrieval.recency import checked_half_life
from mmedge.retrieval.record import Durability, Record
from mmedge.retrieval.rows import read_items, read_stored
from mmedge.retrieval.schema import MAX_DIM, SNAPSHOTS, About, create_record, read_about
from mmedge.retrieval.searching import search_view
from mmedge.retrieval.store import Change
from mmedge.retrieval.view import StaleError, View, Views
from mmedge.specs import Array, Float32Array, Modality

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Index"]

_TRIES = 20  # to begin a transaction in which no snapshot is being replaced


class Index(Closing):
    """Items with embeddings, their ids, times, sources, texts and metadata, in a folder.

    Made by `Index.create` or `Index.open`. Any number of processes may have an index open and
    search it while one writes; writers wait for each other, a change at a time. Every search, `get`
    and `changes` sees the index as it was at one moment. Safe in several threads; after a fork,
    open it again in the child. It implements `mmedge.retrieval.store.VectorStore`.

    `durability` says when a change survives a power failure: `full`, once the call has returned;
    `batch`, once `flush`, `close` or a later `full` call has returned, and a power failure before
    that takes back whole calls, the last ones first. A killed process loses nothing in either.
    """

    def __init__(self, record: Record, encoder: Encoder) -> None:
        self._record = record
        self._encoder = encoder
        self._views = Views(record.folder)
        self._filters = AllowedItems()

    @classmethod
    def create(
        cls,
        path: Path | str,
        bundle: Path | str | None = None,
        dim: int | None = None,
        *,
        precision: str | None = None,
        backend: str | None = None,
    ) -> Self:
        """Make an empty index.

        Args:
            path: Its folder, which must not exist; NAME.index by custom.
            bundle: Dual-encoder bundle that embeds what is added and searched for. Its path and
                the fingerprint of its embedding space are stored.
            dim: D, for an index of ready vectors alone; in place of `bundle`.
            precision: Variant of the bundle, as for mmedge.load. Stored too.
            backend: As for mmedge.load. Not stored.

        Raises:
            InputError: If neither or both of bundle and dim are given, or dim is out of range.
            BundleError: If the bundle cannot be used.
            SpaceMismatchError: If the bundle's variants do not share an embedding space.
            StorageError: If something stands at `path`, or it cannot be written.
        """
        folder = Path(path)
        if (bundle is None) == (dim is None):
            raise InputError("Index.create: pass either bundle= or dim=, for ready vectors alone.")
        space = None if bundle is None else bundle_space(bundle, precision)
        width = dim if space is None else space.dim
        if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= MAX_DIM:
            raise InputError(f"dim: got {width!r}, expected 1 to {MAX_DIM}.")
        about = About(
            uuid=uuid.uuid4().hex,
            dim=width,
            space=None if space is None else space.fingerprint,
            bundle=None if bundle is None else os.path.realpath(bundle),
            precision=precision,
        )
        with atomic_directory(folder, replace=False) as beside:
            (beside / SNAPSHOTS).mkdir()
            create_record(beside, about)
        return cls.open(folder, backend=backend)

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        bundle: Path | str | None = None,
        precision: str | None = None,
        backend: str | None = None,
        read_only: bool = False,
    ) -> Self:
        """Open an index.

        The bundle is loaded when something is first embedded; an index of ready vectors needs none.

        Args:
            path: Its folder.
            bundle: Bundle to embed with; None for the one that it was made with. It may be another
                of the same embedding space, an int8 variant for one.
            precision: Variant of the bundle, as for mmedge.load.
            backend: As for mmedge.load.
            read_only: Whether changes are refused.

        Raises:
            RetrievalError: If it is no index, or one of a newer format.
            IndexCorruptedError: If it is damaged.
            SpaceMismatchError: If the bundle is of another embedding space.
            StorageError: If it cannot be read.
        """
        with ExitStack() as stack:
            record = stack.enter_context(Record(Path(path), read_only=read_only))
            with record.reading() as connection:
                about = read_about(connection)
            if bundle is None:
                chosen, variant = about.bundle, precision or about.precision
            else:
                chosen, variant = os.path.realpath(bundle), precision
                found = bundle_space(bundle, precision)
                check_space(about.space, found.fingerprint, f"{bundle} makes vectors")
            encoder = Encoder(chosen, variant, backend, record.folder)
            index = cls(record, encoder)
            stack.pop_all()
        return index

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
        return None if self._encoder.bundle is None else Path(self._encoder.bundle)

    @property
    def encodes(self) -> frozenset[Modality]:
        """What the bundle embeds; loads it.

        Raises:
            RetrievalError: If there is none.
            BundleError: If it cannot be opened.
        """
        return frozenset(self._encoder.model.encoders)

    def fields(self) -> tuple[str, ...]:
        """Return the names of all metadata fields that items have, sorted."""
        with self._record.reading() as connection:
            return tuple(name for (name,) in connection.execute("SELECT name FROM fields"))

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

    def add(  # noqa: PLR0913, what an item consists of
        self,
        *,
        images: ImageSource | Iterable[ImageSource] | None = None,
        texts: str | Sequence[str | None] | None = None,
        audio: AudioSource | Iterable[AudioSource] | None = None,
        vectors: Vectors | None = None,
        ids: str | Sequence[str] | None = None,
        times: Time | Sequence[Time | None] | None = None,
        sources: str | Sequence[str | None] | None = None,
        metadata: Metadata | Sequence[Metadata | None] | None = None,
        content_hashes: Sequence[str | None] | None = None,
        modality: Modality | None = None,
        space: str | None = None,
        skip_near: float | None = None,
        durability: Durability = "full",
    ) -> Added:
        """Add N new items, all or none of them.

        Args:
            images: Images to embed, as for DualEncoder.encode_image.
            texts: Beside images, audio or vectors: the items' words, which a hybrid search finds
                and no vector holds. Alone: texts to embed, whose words are stored as well.
            audio: Sounds to embed, as for DualEncoder.encode_audio.
            vectors: Ready vectors, normalised here: (N, D) floats, or a sequence of (D,) and (V, D)
                arrays for items of several vectors, such as a video's frames. A search finds an
                item by its nearest vector, once.
            ids: Unique in the index. None takes the path of an item that was given by one, and
                otherwise makes random ids.
            times: When each item was seen: seconds since 1970 (UTC), or a datetime with a time
                zone. A file's own time is not taken.
            sources: Where each item comes from. None takes the path of an image or a sound that
                was given by one, as it was given; `migrate` reads it again from there.
            metadata: Fields of each item that filters can name: str, int, float, bool, None, or a
                list of str for tags.
            content_hashes: Hash of each item's content. None takes the sha256 of a file, or of
                bytes; images in memory have none.
            modality: What ready vectors were encoded from, so that `migrate` can do it again from
                `sources` or `texts`.
            space: Fingerprint of the embedding space of ready vectors; None if unknown.
            skip_near: From this cosine on an item that is near to one of the last 32 of the same
                source is not added, as a camera sees the same wall a thousand times; name the
                camera in `sources`. None adds all.
            durability: See Index.

        Returns:
            The ids of what was added, in order; its `skipped` names what was not.

        Raises:
            InputError: If there is nothing to add or it cannot be used (a wrong width, NaN, a zero
                vector, an image that cannot be read), an id comes twice or is in the index: change
                that item with `update`, or replace it with `upsert`.
            SpaceMismatchError: If the vectors are of another embedding space.
            RetrievalError: If another process goes on writing, or there is no bundle to embed with.
            StorageError: If the disk is full or read-only.
        """
        about = self._about()
        check_space(about.space, space, "these vectors are")
        if skip_near is not None:
            skip_near = checked_cosine(skip_near, "skip_near")
        given = Given(images, audio, vectors, texts)
        content = encoded(given, self._encoder, about.dim, about.space)
        items = storing.new_items(content, ids, texts, times, sources, metadata, content_hashes)
        near: dict[str, str] = {}
        if items:
            kind = content.modality or modality
            with self._record.writing(durability) as connection:
                storing.check_unchanged(about, connection)
                if skip_near is not None:
                    recent = recent_items(connection, (item.source for item in items))
                    near = near_recent(items, recent, skip_near)
                    items = [item for item in items if item.id not in near]
                storing.add(connection, items, None if kind is None else Modality(kind).value)
            upkeep.after_write(self._record)
        return Added((item.id for item in items), near)

    def update(  # noqa: PLR0913, what an item consists of
        self,
        ids: str | Sequence[str],
        *,
        images: ImageSource | Iterable[ImageSource] | None = None,
        texts: str | Sequence[str | None] | None = None,
        audio: AudioSource | Iterable[AudioSource] | None = None,
        vectors: Vectors | None = None,
        times: Time | Sequence[Time | None] | None = None,
        sources: str | Sequence[str | None] | None = None,
        metadata: Metadata | Sequence[Metadata | None] | None = None,
        content_hashes: Sequence[str | None] | None = None,
        space: str | None = None,
        durability: Durability = "full",
    ) -> None:
        """Change items that are there, all or none of them; what is not given stays.

        Args:
            ids: Of the items.
            images: As for add; the items' vectors are replaced.
            texts: New words. The vectors of items that were embedded from a text follow; those of
                others stay.
            audio: As images.
            vectors: As images.
            times: As for add.
            sources: As for add.
            metadata: Replaces all fields of an item.
            content_hashes: As for add.
            space: As for add.
            durability: See Index.

        Raises:
            InputError: As for add, and if an id comes twice or is not in the index; nothing is
                changed.
            SpaceMismatchError: As for add.
            RetrievalError: As for add.
            StorageError: As for add.
        """
        about = self._about()
        check_space(about.space, space, "these vectors are")
        names = checked_ids(ids)
        content = None
        if images is not None or audio is not None or vectors is not None:
            given = Given(images, audio, vectors)
            content = encoded(given, self._encoder, about.dim, about.space)
        changes = storing.changes_of(
            names, content, texts, times, sources, metadata, content_hashes
        )
        words = {name: text for name, text in changes.texts.items() if text is not None}
        with self._record.reading() as connection:
            embedded = storing.embedded_from_text(connection, words) if content is None else []
        if embedded:
            given = Given(texts=[words[name] for name in embedded])
            again = encoded(given, self._encoder, about.dim, about.space)
            changes.vectors.update(zip(embedded, again.vectors, strict=True))
        with self._record.writing(durability) as connection:
            storing.check_unchanged(about, connection)
            storing.update(connection, changes)
        upkeep.after_write(self._record)

    def upsert(self, items: Sequence[Item], *, durability: Durability = "full") -> int:
        """Add items or replace them whole; see VectorStore.upsert.

        An item of revision 0 is a change made here and now, and always wins. Items of other
        revisions come from another store: one that is older (by revision, then origin) than what
        is stored, a deletion included, changes nothing.

        Raises:
            InputError: If an item cannot be used, or an id comes twice.
            RetrievalError: If another process goes on writing.
            StorageError: If the disk is full or read-only.
        """
        checked = storing.checked_items(items, self._about().dim)
        with self._record.writing(durability) as connection:
            written = storing.upsert(connection, checked)
        upkeep.after_write(self._record)
        return written

    def delete(
        self,
        ids: str | Sequence[str],
        *,
        revision: int | None = None,
        origin: str = "",
        durability: Durability = "full",
    ) -> int:
        """Delete items and remember the deletions for `changes`; see VectorStore.delete.

        Args:
            ids: Of the items; one that is not there is passed over.
            revision: Of a deletion made in another store, in microseconds since 1970; a later
                change of an item stands then. None for one made here and now.
            origin: The store in which it was made; "" for here.
            durability: See Index.

        Returns:
            How many items there were.

        Raises:
            InputError: If an id is no string or comes twice.
            RetrievalError: If another process goes on writing.
            StorageError: If the disk is full or read-only.
        """
        names = checked_ids(ids)
        with self._record.writing(durability) as connection:
            deleted = storing.delete(connection, names, revision, origin)
        upkeep.after_write(self._record)
        return deleted

    def get(self, ids: str | Sequence[str]) -> list[Item | None]:
        """Return items with their vectors by id, None for an id that is not there.

        Raises:
            InputError: If an id is no string or comes twice.
            IndexCorruptedError: If an item is damaged.
        """
        names = checked_ids(ids)
        with self._record.reading() as connection:
            stored = read_stored(connection, names)
            keys = [held.key for held in stored.values()]
            items = {
                row.item.id: row.item for row in read_items(connection, keys, vectors=True).values()
            }
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
        content = encoded(given, self._encoder, about.dim, about.space, hashed=False)
        return np.concatenate([*content.vectors, np.empty((0, about.dim), np.float32)])

    @overload
    def search(  # type: ignore[overload-overlap]
        self,
        query: str | os.PathLike[str] | bytes | Image.Image | Query,
        k: int = ...,
        *,
        where: Filter | None = ...,
        recall: float = ...,
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
            recall: Share of the true k nearest that an approximate search must find on average.
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
        about = self._about()
        check_space(about.space, space, "this query is")
        if half_life_s is not None:
            half_life_s = checked_half_life(half_life_s)
        if distinct is not None:
            distinct = checked_cosine(distinct, "distinct")
        now = time.time()
        vectors, words, single = embedded_queries(query, self.embed, about.dim)
        with self._viewing() as (connection, view):
            storing.check_unchanged(about, connection)
            found = search_view(
                view,
                connection,
                vectors,
                k,
                where=where,
                recall=recall,
                rankings=[Ranking(each, half_life_s, now, distinct) for each in words],
                filters=self._filters,
            )
        return found[0] if single else found

    def changes(self, after: str | None, limit: int) -> list[Change]:
        """Return up to `limit` changes after a cursor; see VectorStore.changes.

        An id comes once, at its last change.

        Raises:
            InputError: If the cursor is not of this index, or the limit is below 1.
            IndexCorruptedError: If an item is damaged.
        """
        with self._record.reading() as connection:
            return storing.changes(connection, after, checked_k(limit))

    def cursor(self, name: str) -> str | None:
        """Return a cursor kept by `set_cursor`; None if there is none."""
        with self._record.reading() as connection:
            found = connection.execute("SELECT cursor FROM cursors WHERE name = ?", (name,))
            held = found.fetchone()
        return None if held is None else str(held[0])

    def set_cursor(self, name: str, cursor: str | None) -> None:
        """Keep a cursor as durably as the items; None forgets it.

        Raises:
            RetrievalError: If another process goes on writing.
            StorageError: If the disk is full or read-only.
        """
        with self._record.writing() as connection:
            connection.execute("DELETE FROM cursors WHERE name = ?", (name,))
            if cursor is not None:
                connection.execute("INSERT INTO cursors VALUES (?, ?)", (name, cursor))

    def flush(self) -> None:
        """Make all changes durable, those made with durability="batch" too.

        Raises:
            RetrievalError: If another process goes on writing.
            StorageError: If the disk is full or read-only.
        """
        with self._record.writing("full"):
            pass  # syncing a transaction syncs all before it

    def compact(self) -> None:
        """Write one snapshot of all vectors without those that are gone, and shrink the files.

        Searches go on meanwhile. It happens by itself where most vectors are gone.

        Raises:
            RetrievalError: If another process goes on writing.
            StorageError: If the disk is full or read-only.
        """
        upkeep.compact(self._record)

    def close(self) -> None:
        """Make all changes durable and release files and the model."""
        self._record.close()
        self._encoder.close()

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
