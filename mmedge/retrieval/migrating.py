"""Re-embedding an index into another space: collected beside the vectors in use, then swapped."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from mmedge.errors import InputError, RetrievalError
from mmedge.retrieval import rows, upkeep
from mmedge.retrieval.embedding import Encoder, Space, bundle_space
from mmedge.retrieval.inputs import checked_vectors, query_vectors
from mmedge.retrieval.items import Item
from mmedge.retrieval.measuring import MAX_QUERIES, sample_texts
from mmedge.retrieval.record import Record
from mmedge.retrieval.rows import ItemRow
from mmedge.retrieval.schema import About, read_about
from mmedge.specs import Array, Float32Array, Modality

__all__ = ["Embed", "Migration", "migrate"]

Embed: TypeAlias = Callable[[Encoder, Item], Array | None]
"""Makes the (V, D) vectors of an item; None where it does not know how."""

_ITEMS_AT_ONCE = 64  # that are embedded and made durable together


@dataclass(frozen=True, slots=True)
class Migration:
    """What a migration does.

    Attributes:
        bundle: Bundle of the new space.
        precision: Of its variants.
        backend: As for mmedge.load.
        embed: Embeds items in its own way; the others are read from their sources and texts.
        drop_missing: Whether items that cannot be embedded again are deleted.
        progress: Called with the number of items that are done, and of all.
    """

    bundle: str
    precision: str | None = None
    backend: str | None = None
    embed: Embed | None = None
    drop_missing: bool = False
    progress: Callable[[int, int], None] | None = None


def migrate(record: Record, migration: Migration) -> int:
    """Re-embed an index; see Index.migrate.

    Returns:
        How many items were embedded by this call.
    """
    space = bundle_space(migration.bundle, migration.precision)
    with record.reading() as connection:
        about = read_about(connection)
    if about.space == space.fingerprint:
        with record.writing() as connection:
            connection.execute(
                "UPDATE about SET bundle = ?, precision = ?",
                (os.path.realpath(migration.bundle), migration.precision),
            )
        return 0
    _begin(record, migration, space)
    done = 0
    with Encoder(
        migration.bundle, migration.precision, migration.backend, record.folder
    ) as encoder:
        while True:
            failed: dict[str, str] = {}
            done += _collect(record, migration, encoder, space, failed)
            if failed and not migration.drop_missing:
                shown = "; ".join(f"'{name}': {text}" for name, text in list(failed.items())[:3])
                raise RetrievalError(
                    f"{record.folder}: {len(failed)} items cannot be embedded again ({shown}). The "
                    "index is as it was; the others are kept for the next migrate. Bring the "
                    "sources back, pass embed=, or drop these items with drop_missing=True."
                )
            if _swap(record, space, failed, _queries(record, encoder, space)):
                return done


def _begin(record: Record, migration: Migration, space: Space) -> None:
    """Set what is collected for; forget what was collected for another space."""
    with record.writing() as connection:
        about = read_about(connection)
        if about.next_space != space.fingerprint:
            connection.execute("DELETE FROM vectors WHERE epoch != ?", (about.epoch,))
        connection.execute(
            "UPDATE about SET next_dim = ?, next_space = ?, next_bundle = ?, next_precision = ?",
            (
                space.dim,
                space.fingerprint,
                os.path.realpath(migration.bundle),
                migration.precision,
            ),
        )


def _collect(
    record: Record,
    migration: Migration,
    encoder: Encoder,
    space: Space,
    failed: dict[str, str],
) -> int:
    """Embed all items that have no vectors of the next epoch; return how many were."""
    after = embedded = 0
    while True:
        with record.reading() as connection:
            about = read_about(connection)
            _check_target(about, space)
            keys = _waiting(connection, about, after)
            held = rows.read_items(connection, keys, vectors=False)
        if not keys:
            return embedded
        after = keys[-1]
        vectors = _embedded(list(held.values()), migration, encoder, space.dim, failed)
        with record.writing("batch") as connection:
            _check_target(read_about(connection), space)
            now = rows.read_items(connection, vectors, vectors=False)
            same = [
                (key, each)
                for key, each in vectors.items()
                if key in now and now[key].seq == held[key].seq
            ]
            rows.replace_vectors(connection, same, epoch=about.epoch + 1)
        embedded += len(same)
        if migration.progress is not None:
            migration.progress(embedded, about.items)


def _waiting(connection: sqlite3.Connection, about: About, after: int) -> list[int]:
    found = connection.execute(
        """SELECT key FROM items WHERE key > ? AND NOT EXISTS
        (SELECT 1 FROM vectors WHERE vectors.key = items.key AND epoch = ?)
        ORDER BY key LIMIT ?""",
        (after, about.epoch + 1, _ITEMS_AT_ONCE),
    )
    return [key for (key,) in found]


def _check_target(about: About, space: Space) -> None:
    if about.next_space != space.fingerprint:
        raise RetrievalError(
            f"The migration to the space {space.fingerprint} was ended by another, to "
            f"{about.next_space or about.space}. Open the index again."
        )


def _embedded(
    held: Sequence[ItemRow],
    migration: Migration,
    encoder: Encoder,
    dim: int,
    failed: dict[str, str],
) -> dict[int, Float32Array]:
    """Return vectors by item key; what cannot be embedded is put into `failed`."""
    found: dict[int, Float32Array] = {}
    by_modality: dict[Modality, list[ItemRow]] = {}
    for row in held:
        own = None if migration.embed is None else migration.embed(encoder, row.item)
        if own is not None:
            (found[row.key],) = checked_vectors([own], dim, what=f"embed('{row.item.id}')")
        elif row.modality == Modality.TEXT.value and row.item.text is not None:
            by_modality.setdefault(Modality.TEXT, []).append(row)
        elif row.modality in (Modality.IMAGE.value, Modality.AUDIO.value) and row.item.source:
            by_modality.setdefault(Modality(row.modality), []).append(row)
        else:
            failed[row.item.id] = "it was added as a ready vector or without a source"
    for modality, some in by_modality.items():
        found |= _by_modality(modality, some, encoder, dim, failed)
    return found


def _by_modality(
    modality: Modality, some: list[ItemRow], encoder: Encoder, dim: int, failed: dict[str, str]
) -> dict[int, Float32Array]:
    texts = [row.item.text or "" for row in some]
    files = [Path(row.item.source or "") for row in some]
    try:
        if modality is Modality.IMAGE:
            made = encoder.images(files)
        else:
            made = encoder.texts(texts) if modality is Modality.TEXT else encoder.audio(files)
    except InputError as error:
        if len(some) == 1:
            failed[some[0].item.id] = str(error)
            return {}
        found: dict[int, Float32Array] = {}
        for row in some:  # one by one, to find which it is
            found |= _by_modality(modality, [row], encoder, dim, failed)
        return found
    vectors = checked_vectors(made, dim)
    return {row.key: each for row, each in zip(some, vectors, strict=True)}


def _queries(record: Record, encoder: Encoder, space: Space) -> dict[str, Float32Array] | None:
    """Return queries with which lists are measured; None if the vectors lie in none."""
    with record.reading() as connection:
        if not upkeep.has_lists(connection):
            return None
        texts = sample_texts(connection)
    if Modality.TEXT not in encoder.model.encoders:
        return {}
    texts = texts or encoder.labels()[:MAX_QUERIES]
    if not texts:
        return {}
    return {Modality.TEXT.value: query_vectors(encoder.texts(texts), space.dim)}


def _swap(
    record: Record,
    space: Space,
    failed: dict[str, str],
    queries: dict[str, Float32Array] | None,
) -> bool:
    """Take the collected vectors into use; False if items without them have come meanwhile."""
    with record.exclusive():
        with record.reading() as connection:
            about = read_about(connection)
            _check_target(about, space)
            waiting = _waiting(connection, about, 0)
            while waiting:
                held = rows.read_items(connection, waiting, vectors=False)
                if any(row.item.id not in failed for row in held.values()):
                    return False
                waiting = _waiting(connection, about, waiting[-1])
            new = replace(about, epoch=about.epoch + 1, dim=space.dim)
            written = upkeep.write_rows(record, connection, new, 0, queries)
        with record.writing() as connection:
            doomed = rows.read_stored(connection, failed)
            own, now = about.uuid, rows.now_us()
            rows.delete_items(connection, {name: (held, now, own) for name, held in doomed.items()})
            connection.execute("DELETE FROM snapshots")
            connection.execute("DELETE FROM gone")
            connection.execute("DELETE FROM queries")
            connection.execute("DELETE FROM cursors")  # other stores hold vectors of another space
            upkeep.name_snapshot(connection, written, queries)
            connection.execute(
                """UPDATE about SET epoch = epoch + 1, generation = generation + 1, dim = next_dim,
                space = next_space, bundle = next_bundle, precision = next_precision,
                next_dim = NULL, next_space = NULL, next_bundle = NULL, next_precision = NULL"""
            )
        upkeep.drop_other_epochs(record)
        upkeep.remove_orphans(record)
    return True
