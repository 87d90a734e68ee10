"""Index: items with embeddings in a folder, searched by similarity."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmedge.errors import InputError
from mmedge.files import atomic_directory
from mmedge.preprocess.decode import ImageSource
from mmedge.preprocess.waveform import AudioSource
from mmedge.retrieval import storing, upkeep
from mmedge.retrieval.adding import Given, encoded
from mmedge.retrieval.duplicates import checked_cosine, near_recent, recent_items
from mmedge.retrieval.embedding import Encoder, bundle_space, check_space
from mmedge.retrieval.inputs import Time, Vectors, checked_ids, checked_space, query_vectors
from mmedge.retrieval.items import Added, Item, Metadata
from mmedge.retrieval.measuring import MAX_QUERIES, sample_texts
from mmedge.retrieval.migrating import Embed, Migration, migrate
from mmedge.retrieval.reading import IndexReader
from mmedge.retrieval.record import Durability, Record
from mmedge.retrieval.schema import MAX_DIM, SNAPSHOTS, About, create_record, read_about
from mmedge.retrieval.verifying import Verification, verify_index
from mmedge.specs import Array, Float32Array, Modality

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Index"]


class Index(IndexReader):
    """Items with embeddings, their ids, times, sources, texts and metadata, in a folder.

    Made by `Index.create` or `Index.open`. Any number of processes may have an index open and
    search it while one writes; writers wait for each other, a change at a time. Every search, `get`
    and `changes` sees the index as it was at one moment. Safe in several threads; after a fork,
    open it again in the child. It implements `mmedge.retrieval.store.VectorStore`.

    `durability` says when a change survives a power failure: `full`, once the call has returned;
    `batch`, once `flush`, `close` or a later `full` call has returned, and a power failure before
    that takes back whole calls, the last ones first. A killed process loses nothing in either.
    """

    @classmethod
    def create(
        cls,
        path: Path | str,
        bundle: Path | str | None = None,
        dim: int | None = None,
        *,
        precision: str | None = None,
        backend: str | None = None,
        space: str | None = None,
    ) -> Self:
        """Make an empty index.

        Args:
            path: Its folder, which must not exist; NAME.index by custom.
            bundle: Dual-encoder bundle that embeds what is added and searched for. Its path and
                the fingerprint of its embedding space are stored.
            dim: D, for an index of ready vectors alone; in place of `bundle`.
            precision: Variant of the bundle, as for mmedge.load. Stored too.
            backend: As for mmedge.load. Not stored.
            space: Beside `dim`, fingerprint of the ready vectors' embedding space: any text that
                names the model, a bundle's fingerprint say. Bundles, stores and vectors of another
                are refused. None if unknown.

        Raises:
            InputError: If neither or both of bundle and dim are given, dim is out of range, or
                space cannot be used or is given with a bundle, which has its own.
            BundleError: If the bundle cannot be used.
            SpaceMismatchError: If the bundle's variants do not share an embedding space.
            StorageError: If something stands at `path`, or it cannot be written.
        """
        folder = Path(path)
        if (bundle is None) == (dim is None):
            raise InputError("Index.create: pass either bundle= or dim=, for ready vectors alone.")
        if space is not None:
            if bundle is not None:
                raise InputError("space: got one beside bundle=, which has its own. Leave it out.")
            space = checked_space(space)
        found = None if bundle is None else bundle_space(bundle, precision)
        width = dim if found is None else found.dim
        if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= MAX_DIM:
            raise InputError(f"dim: got {width!r}, expected 1 to {MAX_DIM}.")
        about = About(
            uuid=uuid.uuid4().hex,
            dim=width,
            space=space if found is None else found.fingerprint,
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
            index = cls(record, encoder, follow=bundle is None)
            stack.pop_all()
        return index

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
            images: Images to embed, as for EmbeddingModel.encode_image.
            texts: Beside images, audio or vectors: the items' words, which a hybrid search finds
                and no vector holds. Alone: texts to embed, whose words are stored as well.
            audio: Sounds to embed, as for EmbeddingModel.encode_audio.
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
        content = encoded(given, self._encoder_of(about), about.dim, about.space)
        items = storing.new_items(content, ids, texts, times, sources, metadata, content_hashes)
        near: dict[str, str] = {}
        if items:
            kind = content.modality or modality
            with self._record.writing(durability) as connection:
                storing.check_unchanged(about, read_about(connection))
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
        modality: Modality | None = None,
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
            modality: As for add; None leaves what the items were encoded from.
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
            content = encoded(given, self._encoder_of(about), about.dim, about.space)
            if content.modality is None and modality is not None:
                content = replace(content, modality=Modality(modality))
        changes = storing.changes_of(
            names, content, texts, times, sources, metadata, content_hashes
        )
        words = {name: text for name, text in changes.texts.items() if text is not None}
        with self._record.reading() as connection:
            embedded = storing.embedded_from_text(connection, words) if content is None else []
        if embedded:
            given = Given(texts=[words[name] for name in embedded])
            again = encoded(given, self._encoder_of(about), about.dim, about.space)
            changes.vectors.update(zip(embedded, again.vectors, strict=True))
        with self._record.writing(durability) as connection:
            storing.check_unchanged(about, read_about(connection))
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

    def remember_folder(self, folder: Path | str) -> None:
        """Record that a folder is indexed: `mmedge serve` shows images that lie in it.

        Raises:
            RetrievalError: If another process goes on writing.
            StorageError: If the disk is full or read-only.
        """
        path = os.path.realpath(folder)
        if Path(path) not in self.folders():
            with self._record.writing() as connection:
                connection.execute("INSERT OR IGNORE INTO folders VALUES (?)", (path,))

    def flush(self) -> None:
        """Make all changes durable, those made with durability="batch" too.

        Raises:
            RetrievalError: If another process goes on writing.
            StorageError: If the disk is full or read-only.
        """
        with self._record.writing("full"):
            pass  # syncing a transaction syncs all before it

    def compact(self, queries: Sequence[str] | Mapping[str, Array] | None = None) -> None:
        """Write one snapshot of all vectors without those that are gone, and shrink the files.

        Deletions are forgotten once all stores have them with which this index exchanges changes.

        From 20,000 vectors on they are put in lists, so that a search looks at the nearest few of
        them alone. How many it takes is measured here: queries of each kind are answered exactly,
        and the lists counted that hold what they find. A kind that was not measured, or a recall
        that the lists do not reach, is searched exactly; `stats` says so. It takes memory for all
        vectors; searches go on meanwhile, and writers wait.

        Args:
            queries: Texts such as users search for, or (Q, D) vectors of queries by modality, of
                which the first 200 of a kind are taken. None takes the texts of items, or the
                labels of the bundle, where that is in its place, and otherwise the queries of the
                last time. Stored vectors are taken besides.

        Raises:
            InputError: If a query cannot be used.
            RetrievalError: If another process goes on writing.
            StorageError: If the disk is full or read-only.
        """
        upkeep.compact(self._record, self._measured_queries(queries))

    def _measured_queries(
        self, queries: Sequence[str] | Mapping[str, Array] | None
    ) -> dict[str, Float32Array] | None:
        about = self._about()
        if isinstance(queries, Mapping):
            return {
                Modality(kind).value: query_vectors(np.asarray(vectors), about.dim)
                for kind, vectors in queries.items()
            }
        texts = list(queries or ())
        if queries is None:
            present = self.bundle is not None and self.bundle.is_dir()
            if about.rows < upkeep.LISTED_ROWS or not present or Modality.TEXT not in self.encodes:
                return None
            with self._record.reading() as connection:
                texts = sample_texts(connection)
            texts = texts or self._encoder_of(about).labels()
        return {Modality.TEXT.value: self.embed(texts=texts[:MAX_QUERIES])} if texts else {}

    def verify(self, *, repair: bool = False) -> Verification:
        """Check every page, item and vector, and repair what is damaged if asked to.

        An index too damaged to be opened is checked by mmedge.retrieval.verifying.verify_index,
        which also says what a repair does.

        Raises:
            RetrievalError: If another process goes on writing.
            StorageError: If the disk is full or read-only.
            IndexCorruptedError: If nothing of a damaged record can be read.
        """
        return verify_index(self.path, repair=repair)

    def migrate(
        self,
        bundle: Path | str,
        *,
        precision: str | None = None,
        backend: str | None = None,
        embed: Embed | None = None,
        drop_missing: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Embed all items again with another bundle, whose embedding space the index takes.

        Images and sounds are read again from their sources, texts from the stored text. The old
        vectors serve all readers until every item has its new ones; then all are swapped in one
        transaction. Another process may go on changing the index meanwhile. A migration that was
        interrupted goes on where it stopped when it is called again with the same bundle.
        Revisions stay, and cursors of pushes to other stores are forgotten. Vectors that lay in
        lists do so again, measured with the texts of items or the labels of the new bundle.

        Args:
            bundle: Dual-encoder bundle. If it is of the index's space, only its path is stored.
            precision: Variant of the bundle, as for mmedge.load.
            backend: As for mmedge.load.
            embed: Called with the new bundle's encoder and an item; returns its (D,) or (V, D)
                vectors, or None to read it from its source or text. For items of several vectors,
                or without either.
            drop_missing: Whether items that cannot be embedded again are deleted at the end.
            progress: Called with the number of items embedded by this call, and of all.

        Returns:
            How many items were embedded by this call.

        Raises:
            RetrievalError: If items cannot be embedded again and drop_missing is off: the first
                are named, and the index stays in the old space. Also if another process goes on
                writing.
            BundleError: If the bundle cannot be used.
            SpaceMismatchError: If its variants do not share an embedding space.
            InputError: If `embed` returns vectors that cannot be used.
            StorageError: If the disk is full or read-only.
        """
        wanted = Migration(str(bundle), precision, backend, embed, drop_missing, progress)
        return migrate(self._record, wanted)

    def close(self) -> None:
        """Make all changes durable and release files and the model."""
        super().close()
