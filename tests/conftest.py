"""Fixtures for all tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from bundles import write_tiny_bundle
from hypothesis import settings

from mmedge.bundle import Bundle, open_bundle

pytest_plugins = ("converted",)


# The same examples every time, and no verdict by the clock of a busy machine.
settings.register_profile("mmedge", derandomize=True, deadline=None)
settings.load_profile("mmedge")


@pytest.fixture(scope="session")
def tiny_bundle_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tiny_bundle copies; not to be changed."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny.mmedge").path


@pytest.fixture
def tiny_bundle(tiny_bundle_original: Path, tmp_path: Path) -> Bundle:
    """A complete dual-encoder bundle of a few kilobytes at tmp_path/tiny.mmedge."""
    return open_bundle(shutil.copytree(tiny_bundle_original, tmp_path / "tiny.mmedge"))
