"""Milvus for the tests: Lite in a folder, and a real server, started on loopback where it can be.

MMEDGE_TEST_MILVUS is the address of a server that runs, MMEDGE_TEST_MILVUS_VENV a virtual
environment with the package `milvus` (2.3.5), from which one is started and killed at the end.
"""

from __future__ import annotations

import atexit
import functools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmedge.errors import BackendUnavailableError
from mmedge.retrieval.stores.connection import connect
from mmedge.retrieval.stores.milvus import MilvusStore

STARTS_IN_S = 120.0


def new_name() -> str:
    """A name that no collection has."""
    return f"test_{secrets.token_hex(8)}"


def milvus_lite(folder: Path, *, dim: int, space: str | None) -> Callable[[], MilvusStore]:
    """Return what opens a store in a folder; the test is skipped without Milvus Lite."""
    pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    address = str(folder / "store.db")
    return lambda: MilvusStore(address, "items", dim=dim, space=space)


def milvus_server(*, dim: int, space: str | None) -> Callable[[], MilvusStore]:
    """Return what opens a new collection; the test is skipped where no server can be had."""
    address, name = server_address(), new_name()
    return lambda: MilvusStore(address, name, dim=dim, space=space)


def server_address() -> str:
    """The address of a server, started if need be; the test is skipped where none can be had."""
    pytest.importorskip("pymilvus")
    if address := os.environ.get("MMEDGE_TEST_MILVUS"):
        return address
    venv = os.environ.get("MMEDGE_TEST_MILVUS_VENV")
    if not venv:
        pytest.skip("no Milvus server: set MMEDGE_TEST_MILVUS or MMEDGE_TEST_MILVUS_VENV")
    address = _started(venv)
    if address is None:
        pytest.fail(f"The Milvus server of {venv} did not start. Is another one running here?")
    return address


@functools.cache
def _started(venv: str) -> str | None:
    """The address of a new server; None if it does not start, which is tried once."""
    folder = Path(tempfile.mkdtemp(prefix="milvus-"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [f"{venv}/bin/milvus-server", "--data", folder / "data", "--proxy-port", str(port)],
            stdout=log,
            stderr=log,
            start_new_session=True,  # it starts a child of its own, killed with it
        )
    atexit.register(_kill, server, folder)
    address = f"http://127.0.0.1:{port}"
    until = time.monotonic() + STARTS_IN_S
    while time.monotonic() < until and server.poll() is None:
        try:
            connect(address, None, 5.0).close()
        except BackendUnavailableError:  # noqa: PERF203
            time.sleep(0.5)
        else:
            return address
    atexit.unregister(_kill)
    _kill(server, folder)
    return None


def _kill(server: subprocess.Popen[bytes], folder: Path) -> None:
    os.killpg(server.pid, signal.SIGKILL)  # on SIGTERM it takes its time
    server.wait()
    shutil.rmtree(folder, ignore_errors=True)
