"""The connection to a Milvus server, and its errors in mmedge's words."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mmedge.errors import BackendUnavailableError, RetrievalError

if TYPE_CHECKING:
    from pymilvus import MilvusClient

__all__ = ["connect", "milvus_errors"]

_EXTRA = 'Install it with: pip install "mmedge[milvus]"'
# Codes of pymilvus's own: the connection failed, or its time ran out.
_UNREACHABLE = {1, 2}
_FIRST_VERSION = (2, 3)


def connect(address: str, token: str | None, timeout_s: float) -> MilvusClient:
    """Return a pymilvus client that is connected.

    Raises:
        BackendUnavailableError: If pymilvus is not installed, no server answers in time, or it is
            older than Milvus 2.3.
        RetrievalError: If the address is malformed, or the server refuses the token.
    """
    try:
        import pymilvus
    except ImportError as error:
        raise BackendUnavailableError(f"pymilvus is not installed. {_EXTRA}") from error
    # It logs every error with its traceback, beside raising it.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    with milvus_errors(address, "connect", timeout_s):
        client = pymilvus.MilvusClient(address, token=token or "", timeout=timeout_s)
        version = str(client.get_server_version(timeout=timeout_s))
    number = re.match(r"v?(\d+)\.(\d+)", version)  # Milvus Lite's begins with its name
    if number and (int(number[1]), int(number[2])) < _FIRST_VERSION:
        client.close()
        raise BackendUnavailableError(
            f"Milvus at {address}: got version {version}, expected 2.3 or later. Upgrade it."
        )
    return client


@contextmanager
def milvus_errors(address: str, doing: str, timeout_s: float) -> Iterator[None]:
    """Raise what pymilvus and gRPC raise as errors that name the address.

    Raises:
        BackendUnavailableError: If the server cannot be reached, or not in time.
        RetrievalError: If it answers with an error.
    """
    import grpc
    from pymilvus import MilvusException
    from pymilvus.exceptions import ConnectionConfigException

    try:
        yield
    except ConnectionConfigException as error:
        raise RetrievalError(
            f"Milvus address {address!r}: {error.message}. Expected http://HOST:19530, or a path "
            "that ends in .db for Milvus Lite."
        ) from error
    except grpc.RpcError as error:
        code = error.code() if isinstance(error, grpc.Call) else None
        raise _unreachable(address, doing, timeout_s, code.name if code else str(error)) from error
    except MilvusException as error:
        if error.code in _UNREACHABLE:
            raise _unreachable(address, doing, timeout_s, error.message) from error
        raise RetrievalError(
            f"Milvus at {address} refused to {doing}: {error.message} (code {error.code}). "
            "See the server's log for more."
        ) from error


def _unreachable(address: str, doing: str, timeout_s: float, why: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"Milvus at {address}: could not {doing} within {timeout_s:g} s: {why}. Check that the "
        "server runs and can be reached, or allow it more time with timeout_s, then try again; "
        "what was acknowledged is kept."
    )
