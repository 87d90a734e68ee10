"""Push and pull between an index on a device and a store beyond it.

Both copy changes in the order of their source and keep the cursor of what the other side has
acknowledged in the index's record. A call that ends early, by a link that drops say, goes on from
there the next time; what is sent twice changes nothing. Of two changes to one item the later counts
(by revision, then origin) on both sides, deletions included, so devices that push and pull through
one store come to hold the same items. Contents cross the link only where the other side has none
as late: of its own pushes a device reads ids and revisions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import groupby

from mmedge.errors import InputError, SpaceMismatchError
from mmedge.retrieval.store import Change, SyncedStore, VectorStore

__all__ = ["Synced", "pull", "push", "pushed_to"]

_PUSH, _PULL = "push ", "pull "  # names of cursors begin so


@dataclass(frozen=True, slots=True)
class Synced:
    """What a push or pull did.

    Attributes:
        changes: Read from the source; those that the other side had already are among them.
        written: Items added or replaced.
        deleted: Items deleted.
    """

    changes: int = 0
    written: int = 0
    deleted: int = 0


def push(
    index: SyncedStore,
    store: VectorStore,
    *,
    batch: int = 500,
    on_progress: Callable[[Synced], None] | None = None,
    everything: bool = False,
) -> Synced:
    """Send an index's changes since the last push to a store.

    Args:
        index: On the device.
        store: Beyond it.
        batch: Changes sent and acknowledged at a time.
        on_progress: Called after each batch with what was done so far.
        everything: From the first change, for a store that has lost some.

    Returns:
        What was done.

    Raises:
        SpaceMismatchError: If the two hold vectors of different spaces or lengths.
        MmedgeError: As the two sides' methods; call again to go on.
    """
    name = f"{_PUSH}{store.identity}"
    return _copy(index, store, index, name, batch, on_progress, everything=everything)


def pull(
    index: SyncedStore,
    store: VectorStore,
    *,
    batch: int = 500,
    on_progress: Callable[[Synced], None] | None = None,
    everything: bool = False,
) -> Synced:
    """Fetch a store's changes since the last pull into an index.

    Args:
        index: On the device.
        store: Beyond it.
        batch: Changes fetched and made durable at a time.
        on_progress: Called after each batch with what was done so far.
        everything: From the first change, for an index that has lost some.

    Returns:
        What was done.

    Raises:
        SpaceMismatchError: If the two hold vectors of different spaces or lengths.
        MmedgeError: As the two sides' methods; call again to go on.
    """
    name = f"{_PULL}{store.identity}"
    return _copy(store, index, index, name, batch, on_progress, everything=everything)


def pushed_to(cursors: Mapping[str, str]) -> dict[str, str | None]:
    """Return the stores with which changes were exchanged, and how far they were pushed to each.

    Args:
        cursors: Of an index, by name.

    Returns:
        Cursors by the identity of a store; None where changes were only pulled.
    """
    stores: dict[str, str | None] = {
        name.removeprefix(_PULL): None for name in cursors if name.startswith(_PULL)
    }
    pushed = {name: cursor for name, cursor in cursors.items() if name.startswith(_PUSH)}
    return stores | {name.removeprefix(_PUSH): cursor for name, cursor in pushed.items()}


def _copy(
    source: VectorStore,
    target: VectorStore,
    cursors: SyncedStore,
    name: str,
    batch: int,
    on_progress: Callable[[Synced], None] | None,
    *,
    everything: bool,
) -> Synced:
    if batch < 1:
        raise InputError(f"batch: got {batch}, expected at least 1.")
    _check_spaces(source, target)
    after = None if everything else cursors.cursor(name)
    done = Synced()
    while changes := source.changes(after, batch):
        latest = {change.id: change for change in sorted(changes, key=_order)}
        if target is cursors:  # a store compares by itself before it sends
            latest = _later(latest, cursors)
        written, deleted = _apply(latest.values(), source, target)
        after = changes[-1].cursor
        cursors.set_cursor(name, after)  # only now: the target has acknowledged
        done = Synced(done.changes + len(changes), done.written + written, done.deleted + deleted)
        if on_progress is not None:
            on_progress(done)
    return done


def _check_spaces(source: VectorStore, target: VectorStore) -> None:
    known = source.space is not None and target.space is not None
    if source.dim != target.dim or (known and source.space != target.space):
        raise SpaceMismatchError(
            f"Vectors of length {source.dim} of space {source.space} cannot be copied to length "
            f"{target.dim} of space {target.space}. Use a store of the same space, or re-embed "
            "with 'mmedge index migrate'."
        )


def _later(changes: Mapping[str, Change], index: SyncedStore) -> dict[str, Change]:
    """Return the changes that are later than what an index has of their items."""
    held = index.revisions(list(changes))
    return {
        name: change
        for (name, change), own in zip(changes.items(), held, strict=True)
        if own is None or _order(change) > own
    }


def _apply(
    changes: Collection[Change], source: VectorStore, target: VectorStore
) -> tuple[int, int]:
    """Apply changes of different items; return how many items were written and deleted."""
    names = [change.id for change in changes if not change.deleted]
    # What was deleted since then comes as a change of its own.
    items = [item for item in source.get(names) if item is not None] if names else []
    written = target.upsert(items) if items else 0
    deletions = sorted((change for change in changes if change.deleted), key=_order)
    deleted = 0
    for (revision, origin), group in groupby(deletions, key=_order):
        ids = [change.id for change in group]
        deleted += target.delete(ids, revision=revision, origin=origin)
    return written, deleted


def _order(change: Change) -> tuple[int, str]:
    return change.revision, change.origin
