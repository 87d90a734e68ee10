"""Small indexes for tests."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from mmedge.retrieval.index import Index
from mmedge.specs import Float32Array

DIM = 32


def vectors(count: int, seed: int = 0, dim: int = DIM) -> Float32Array:
    """(count, dim) float32 of random directions, not normalised."""
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def names(count: int, prefix: str = "item") -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def filled(folder: Path, count: int, seed: int = 0) -> Index:
    """A new index of ready vectors: item0, item1, ..."""
    index = Index.create(folder, dim=DIM)
    index.add(vectors=vectors(count, seed), ids=names(count), durability="batch")
    return index


def ids(matches: object) -> list[str]:
    """The ids of a list of matches, in order."""
    return [match.id for match in matches]  # type: ignore[attr-defined]


def two_spaces(folder: Path) -> list[Path]:
    """Two bundles of the tiny model: its fp32 and its int8 variants, in spaces of their own."""
    from bundles import write_tiny_bundle  # not in the processes that tests start

    first = write_tiny_bundle(folder / "first.mmedge").path
    second = write_tiny_bundle(folder / "second.mmedge").path
    manifest = second / "manifest.json"
    text = manifest.read_text("utf-8").replace("tiny-0001", "tiny-0002")
    manifest.write_text(re.sub(r'"default": *"fp32"', '"default": "int8-dynamic"', text), "utf-8")
    return [first, second]
