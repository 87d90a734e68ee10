"""Fixtures of the serving tests: a bundle, photos, and a client of the application."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import MemoryStore, client_of, photo_store, write_photos
from starlette.testclient import TestClient

import mmedge
from mmedge.models import DualEncoder


@pytest.fixture(scope="session")
def model(tiny_bundle_original: Path) -> Iterator[DualEncoder]:
    with mmedge.load(tiny_bundle_original, backend="onnxruntime") as loaded:
        assert isinstance(loaded, DualEncoder)
        yield loaded


@pytest.fixture
def photos(tmp_path: Path) -> dict[str, Path]:
    return write_photos(tmp_path / "photos")


@pytest.fixture
def store(model: DualEncoder, photos: dict[str, Path]) -> MemoryStore:
    return photo_store(model, photos)


@pytest.fixture
def client(store: MemoryStore, model: DualEncoder, tmp_path: Path) -> TestClient:
    return client_of(store, model, [tmp_path / "photos"])
