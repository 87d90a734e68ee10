"""Fixtures for all tests."""

from __future__ import annotations

import math
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import write_tiny_bundle
from hypothesis import settings

from mmedge.bundle import Bundle, open_bundle

pytest_plugins = ("converted", "profiles")


# The same examples every time, and no verdict by the clock of a busy machine.
settings.register_profile("mmedge", derandomize=True, deadline=None)
settings.load_profile("mmedge")

# A shell starts what it sends to the background with Ctrl-C ignored, and children inherit that:
# tests that interrupt something hold there too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test, nor a process that it starts, reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMEDGE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MMEDGE_TIME_LIMIT_S", "0")  # graphs run in the test's own process
        yield


@pytest.fixture(autouse=True)
def _nothing_to_choose(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a backend named, ONNX Runtime it is, unless a test asks for `several_backends`."""
    if "several_backends" not in request.fixturenames:
        monkeypatch.setattr("mmedge.runtimes.openvino.BACKEND.engine_version", lambda: None)


@pytest.fixture
def several_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both engines are available, and no choice is remembered; return the cache folder."""
    monkeypatch.setenv("MMEDGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("mmedge.sessions.choice._BUSY", math.inf)  # the machine may be
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny_bundle_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tiny_bundle copies; not to be changed."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny.mmedge").path


@pytest.fixture
def tiny_bundle(tiny_bundle_original: Path, tmp_path: Path) -> Bundle:
    """A complete dual-encoder bundle of a few kilobytes at tmp_path/tiny.mmedge."""
    return open_bundle(shutil.copytree(tiny_bundle_original, tmp_path / "tiny.mmedge"))
