"""Atomic files, locks and JSON reading."""

from mmedge.files.atomic import atomic_directory, atomic_file, write_atomic
from mmedge.files.hashing import sha256_file
from mmedge.files.reasons import storage_errors

__all__ = ["atomic_directory", "atomic_file", "sha256_file", "storage_errors", "write_atomic"]
