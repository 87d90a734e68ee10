"""Snapshots written from the tail, merged and compacted, and files that nothing names removed."""

from __future__ import annotations

from mmedge.retrieval.record import Record

__all__ = ["after_write"]


def after_write(record: Record) -> None:
    """Write a snapshot where many rows have come since the last."""
