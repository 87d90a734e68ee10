"""The record of truth: one SQLite file, many readers beside one writer."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from mmedge.closing import Closing
from mmedge.errors import InputError, RetrievalError
from mmedge.files import storage_errors
from mmedge.files.locks import key_lock_in_time
from mmedge.retrieval.schema import (
    BUSY_MS,
    LOCK,
    RECORD,
    check_folder,
    connect,
    is_immutable,
    record_errors,
)

__all__ = ["LOG", "Durability", "Record"]

LOG = logging.getLogger("mmedge.retrieval")

Durability: TypeAlias = Literal["full", "batch"]
"""When a change is on disk: `full`, when the call returns; `batch`, at the next flush or
checkpoint, and a power failure before it takes back whole calls, the last ones first."""

_SYNCHRONOUS = {"full": "FULL", "batch": "NORMAL"}
_WAIT_S = 30.0  # for another writer
_Identity: TypeAlias = tuple[int, int, bool]


class Record(Closing):
    """Connections to an index's record; safe in several threads, not across a fork.

    Args:
        folder: Of the index.
        read_only: Whether writing is refused.

    Raises:
        RetrievalError: If the folder is no index, or one of a newer format.
        IndexCorruptedError: If the record is damaged.
        StorageError: If it cannot be read.
    """

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        check_folder(folder)
        self.folder = folder
        self.read_only = read_only
        self._pid = os.getpid()
        self._closed = False
        self._pool_lock = threading.Lock()
        self._write_lock = threading.RLock()
        self._exclusive = False
        self._unsynced = False
        self._readers: list[sqlite3.Connection] = []
        self._writer: sqlite3.Connection | None = None
        self._identity = self._file_identity()
        self._readers.append(connect(folder, writable=False))

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection in a read transaction: all that it reads is of one moment."""
        with record_errors(self.folder):
            identity, connection = self._take()
            try:
                connection.execute("BEGIN")
                yield connection
            finally:
                self._give_back(identity, connection)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Be the index's only writer, among all processes, while the block runs.

        Raises:
            RetrievalError: If another process goes on writing; it is named.
            StorageError: If the index was opened for reading, or its folder cannot be written.
        """
        self._check_open()
        if self.read_only:
            raise RetrievalError(
                f"{self.folder} was opened with read_only=True. Open it without, to write."
            )
        with self._write_lock:
            if self._exclusive:
                yield
                return
            with key_lock_in_time(self.folder / LOCK, _WAIT_S) as holder:
                if holder is not None:
                    raise RetrievalError(
                        f"{self.folder} is being written by {holder}, for more than "
                        f"{_WAIT_S:.0f} s. Wait for it to finish; searches go on meanwhile."
                    )
                self._exclusive = True
                try:
                    yield
                finally:
                    self._exclusive = False

    @contextmanager
    def writing(self, durability: Durability = "full") -> Iterator[sqlite3.Connection]:
        """Yield a connection in a write transaction that is committed if the block succeeds.

        Raises:
            InputError: If the durability is unknown.
            RetrievalError: As exclusive, and StorageError if the disk is full or read-only.
        """
        if durability not in get_args(Durability):
            raise InputError(f"durability: got {durability!r}, expected 'full' or 'batch'.")
        with self.exclusive(), record_errors(self.folder):
            connection = self._open_writer()
            connection.execute(f"PRAGMA synchronous = {_SYNCHRONOUS[durability]}")
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("UPDATE about SET version = version + 1")
                connection.execute("COMMIT")
                self._unsynced = durability != "full"
            finally:
                if connection.in_transaction:
                    with suppress(sqlite3.Error):  # SQLite rolled it back itself
                        connection.execute("ROLLBACK")

    def shrink(self) -> None:
        """Give free pages back to the file system, as far as readers allow."""
        with self.exclusive(), record_errors(self.folder):
            writer = self._open_writer()
            writer.execute("PRAGMA synchronous = FULL")
            writer.executescript("PRAGMA incremental_vacuum")  # execute frees one page alone
            writer.execute("PRAGMA busy_timeout = 100")  # readers go before
            writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            writer.execute(f"PRAGMA busy_timeout = {BUSY_MS}")

    def close(self) -> None:
        """Make all durable and close all connections, one in use when its transaction ends.

        Raises:
            StorageError: If the disk is full or read-only; the connections are closed then too.
        """
        try:
            if self._unsynced and not self._closed and os.getpid() == self._pid:
                with self.writing("full"):
                    pass  # syncing a transaction syncs all before it
        finally:
            with self._pool_lock:
                self._closed = True
                readers, self._readers = self._readers, []
            if os.getpid() == self._pid:  # SQLite's connections are not touched after a fork
                for reader in readers:
                    reader.close()
                with self._write_lock:
                    self._close_writer()

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open_writer(self) -> sqlite3.Connection:
        self._check_replaced()
        if self._writer is None:
            check_folder(self.folder)
            with storage_errors(self.folder / RECORD):
                self._writer = connect(self.folder, writable=True)
        return self._writer

    def _take(self) -> tuple[_Identity, sqlite3.Connection]:
        self._check_open()
        self._check_replaced()
        with self._pool_lock:
            identity = self._identity
            if self._readers:
                return identity, self._readers.pop()
        return identity, connect(self.folder, writable=False)

    def _give_back(self, identity: _Identity, connection: sqlite3.Connection) -> None:
        with suppress(sqlite3.Error):
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        with self._pool_lock:
            if not self._closed and identity == self._identity:
                self._readers.append(connection)
                return
        connection.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RetrievalError(f"{self.folder}: the index is closed. Open it again.")
        if os.getpid() != self._pid:
            raise RetrievalError(
                f"{self.folder} was opened in process {self._pid} and is used in its child "
                f"{os.getpid()}: SQLite cannot be shared over a fork. Open it in the child."
            )

    def _check_replaced(self) -> None:
        """Open the record anew if a repair has put another in its place."""
        identity = self._file_identity()
        if identity == self._identity:
            return
        with self._pool_lock:
            readers, self._readers = self._readers, []
            self._identity = identity
        for reader in readers:
            reader.close()
        with self._write_lock:
            self._close_writer()

    def _file_identity(self) -> _Identity:
        try:
            status = (self.folder / RECORD).stat()
        except FileNotFoundError:
            raise RetrievalError(f"{self.folder} is gone: it has no {RECORD} any more.") from None
        return status.st_dev, status.st_ino, is_immutable(self.folder)
