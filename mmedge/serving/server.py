"""Listening on a port, and running the server until it is stopped."""

from __future__ import annotations

import errno
import importlib
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from mmedge.errors import InputError, StorageError

if TYPE_CHECKING:
    from mmedge.serving.guard import Guard

__all__ = ["check_installed", "listen", "run", "url"]

_MODULES = ("fastapi", "uvicorn")
_CLOSING_S = 3  # for requests that are running when the server is stopped
_CONNECTIONS = 256
_HEADERS_BYTES = 64 << 10  # read before the guard sees them


def check_installed() -> None:
    """Check that the packages of the extra are there.

    Raises:
        InputError: If one is missing; names the extra.
    """
    try:
        for name in _MODULES:
            importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"mmedge serve needs FastAPI and uvicorn, which cannot be imported ({error}). Install "
            'them: pip install "mmedge[serve]"'
        ) from error


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Args:
        host: Address or name of this machine.
        port: 0 takes one that is free.

    Raises:
        InputError: If the address is not this machine's, or the port is in use or not permitted.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except socket.gaierror as error:
        raise InputError(
            f"--host {host}: not an address of this machine ({error.strerror})."
        ) from error
    except OSError as error:
        fix = {
            errno.EADDRINUSE: "the port is in use. Stop what listens there, or pass another --port",
            errno.EACCES: "not permitted. Pass a --port above 1023",
            errno.EADDRNOTAVAIL: "not an address of this machine. Pass another --host",
        }.get(error.errno or 0)
        if fix is None:
            raise StorageError(f"Cannot listen on {host}:{port}: {error.strerror}.") from error
        raise InputError(f"Cannot listen on {host}:{port}: {fix}.") from error


def url(listening: socket.socket) -> str:
    """Return the address of a listening socket for a browser on this machine."""
    host, port = listening.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104, not listened on
    return f"http://[{name}]:{port}/" if ":" in name else f"http://{name}:{port}/"


def run(app: Guard, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; requests that are running get some seconds to end.

    Args:
        app: The application.
        listening: The socket.
        ready: Called when requests are served.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    config = uvicorn.Config(
        app,
        access_log=False,  # it would name queries
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        h11_max_incomplete_event_size=_HEADERS_BYTES,
        timeout_graceful_shutdown=_CLOSING_S,
    )
    try:
        Server(config).run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn ends, then raises the signal that ended it again
        return
    finally:
        listening.close()
