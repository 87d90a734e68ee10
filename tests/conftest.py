"""Fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundles import write_tiny_bundle

from mmedge.bundle import Bundle

pytest_plugins = ("converted",)


@pytest.fixture
def tiny_bundle(tmp_path: Path) -> Bundle:
    """A complete dual-encoder bundle of a few kilobytes at tmp_path/tiny.mmedge."""
    return write_tiny_bundle(tmp_path / "tiny.mmedge")
