"""What every request passes first: Host and Origin checks, bounds, and security headers."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from mmedge.errors import InputError
from mmedge.serving.problems import PROBLEM_TYPE, problem

__all__ = ["Guard", "Limits", "allowed_hosts", "is_loopback"]

_Message: TypeAlias = MutableMapping[str, Any]
_Receive: TypeAlias = Callable[[], Awaitable[_Message]]
_Send: TypeAlias = Callable[[_Message], Awaitable[None]]
_App: TypeAlias = Callable[[_Message, _Receive, _Send], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HOST = re.compile(r"(?:\[(?P<ipv6>[0-9a-f:.]+)\]|(?P<name>[a-z0-9._-]+?)\.?)(?::[0-9]{1,5})?")
_NAME = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}

# Nothing from elsewhere, no inline script or style, in no frame. Images that are dropped in are
# shown from memory (blob:).
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on requests.

    Attributes:
        body_bytes: Largest body.
        bodies: Other largest bodies by path, such as that of an image.
        query_bytes: Longest query string.
        header_bytes: Largest headers together.
        running: Requests that are worked on at once.
        waiting: Requests that are there at once, those that wait for others included.
        timeout_s: Longest time of one request, its upload included.
    """

    body_bytes: int = 1 << 20
    bodies: Mapping[str, int] = field(default_factory=dict)
    query_bytes: int = 8192
    header_bytes: int = 32 << 10
    running: int = 4
    waiting: int = 64
    timeout_s: float = 30.0


def is_loopback(host: str) -> bool:
    """Return whether an address or name to listen on is this machine's own loopback."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def allowed_hosts(host: str, names: Iterable[str]) -> frozenset[str]:
    """Return the names under which requests are served.

    Args:
        host: Address to listen on.
        names: Further names, without ports.

    Raises:
        InputError: If a name is not a host name, or the address is not the loopback's and no name
            is given.
    """
    given = {name.lower().strip("[]") for name in names}
    for name in given:
        if not _NAME.fullmatch(name):
            raise InputError(
                f"--allow-host: got {name!r}, expected a host name or address without scheme and "
                "port, such as robot.local."
            )
    if not is_loopback(host):
        if not given:
            raise InputError(
                f"--host {host} can be reached from other machines. Name what they call this one, "
                "such as --allow-host robot.local; requests for other names are refused."
            )
        return frozenset({*given, *LOOPBACK})
    return frozenset({*given, *LOOPBACK, host})


class Guard:
    """ASGI middleware that checks and bounds every request, and adds headers to every response.

    A request is served if its Host is allowed (a page that rebinds its own name to this machine is
    not) and it does not come from another site's page. Its body is read here, within its bound, so
    that an application sees whole bodies only. Requests beyond the bound of concurrency wait, then
    are refused.

    Args:
        app: The application.
        hosts: Names and addresses of this server, lower-case, without ports.
        limits: Bounds.
    """

    def __init__(self, app: _App, hosts: frozenset[str], limits: Limits) -> None:
        self._app, self._hosts, self._limits = app, hosts, limits
        self._slots = asyncio.Semaphore(limits.running)
        self._present = 0

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, _Response(send))
        else:  # websockets are not used
            await send({"type": "websocket.close", "code": 1008})

    async def _serve(self, scope: _Message, receive: _Receive, response: _Response) -> None:
        refused = self._refusal(scope)
        if refused is not None:
            await response.refuse(*refused)
            return
        if self._present >= self._limits.waiting:
            detail = f"{self._present} requests are waiting already. Try again in a second."
            await response.refuse(HTTPStatus.SERVICE_UNAVAILABLE, detail)
            return
        self._present += 1
        try:
            whole = self._in_turn(scope, receive, response)
            await asyncio.wait_for(whole, self._limits.timeout_s)
        except asyncio.TimeoutError:
            if not response.started:
                detail = f"Not done within {self._limits.timeout_s:g} s. Try again later."
                await response.refuse(HTTPStatus.GATEWAY_TIMEOUT, detail)
        finally:
            self._present -= 1

    async def _in_turn(self, scope: _Message, receive: _Receive, response: _Response) -> None:
        async with self._slots:
            limit = self._limits.bodies.get(scope["path"], self._limits.body_bytes)
            received = bytearray()
            too_large, more = _declared_size(scope) > limit, True
            while more and not too_large:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                received += message.get("body", b"")
                too_large, more = len(received) > limit, message.get("more_body", False)
            if too_large:
                detail = f"The body has more than the {limit} bytes that this path takes."
                await response.refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)
                return
            whole = iter([bytes(received)])

            async def replay() -> _Message:
                for body in whole:
                    return {"type": "http.request", "body": body, "more_body": False}
                return await receive()

            await self._app(scope, replay, response.send)

    def _refusal(self, scope: _Message) -> tuple[HTTPStatus, str] | None:
        """Return why a request is refused from its headers; None for one that is served."""
        headers, limits = _Headers(scope["headers"]), self._limits
        host = headers.single("host")
        name = None if host is None else _host_name(host)
        if name is None:
            return HTTPStatus.BAD_REQUEST, "Host: expected one valid Host header."
        if name not in self._hosts:
            detail = (
                f"Host '{name}' is not served here. If it is this machine, start mmedge serve with "
                f"--allow-host {name}."
            )
            return HTTPStatus.FORBIDDEN, detail
        if not _same_origin(headers, str(host), scope):
            return HTTPStatus.FORBIDDEN, "Requests of other sites' pages are refused."
        if sum(len(key) + len(value) for key, value in scope["headers"]) > limits.header_bytes:
            return (
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"The headers have more than {limits.header_bytes} bytes.",
            )
        if len(scope.get("query_string", b"")) > limits.query_bytes:
            return (
                HTTPStatus.REQUEST_URI_TOO_LONG,
                f"The query string has more than {limits.query_bytes} bytes.",
            )
        return None


class _Headers:
    """Headers of a request."""

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self._values = [(key.lower(), value.decode("latin-1")) for key, value in raw]

    def all(self, name: str) -> list[str]:
        return [value.lower() for key, value in self._values if key == name.encode()]

    def single(self, name: str) -> str | None:
        """Return the only value of a header, None if there is none or more than one."""
        values = self.all(name)
        return values[0] if len(values) == 1 else None


class _Response:
    """The response to one request, with the headers that every response has."""

    def __init__(self, send: _Send) -> None:
        self._send, self.started = send, False

    async def send(self, message: _Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            present = {key.lower() for key, _ in message.get("headers", ())}
            added = {**_HEADERS, "cache-control": "no-store"}
            pairs = ((key.encode(), value.encode()) for key, value in added.items())
            kept = [(key, value) for key, value in pairs if key not in present]
            message = {**message, "headers": [*message.get("headers", ()), *kept]}
        await self._send(message)

    async def refuse(self, status: HTTPStatus, detail: str) -> None:
        body = problem(status, detail).model_dump_json().encode()
        headers = [
            (b"content-type", PROBLEM_TYPE.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),  # the rest of a body is not read
        ]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _host_name(header: str) -> str | None:
    """Return the name or address of a Host header, None if it is malformed."""
    found = _HOST.fullmatch(header)
    return (found["ipv6"] or found["name"]) if found else None


def _same_origin(headers: _Headers, host: str, scope: _Message) -> bool:
    """Return whether a request comes from our own page, or from no page at all."""
    origins, sites = headers.all("origin"), headers.all("sec-fetch-site")
    if any(not _is_origin_of(origin, host) for origin in origins):
        return False
    if all(site in ("same-origin", "none") for site in sites):
        return True
    # A link of another site may open the page, in a window of its own.
    opened = headers.all("sec-fetch-mode") == ["navigate"]
    whole = headers.all("sec-fetch-dest") == ["document"]
    return opened and whole and scope["method"] == "GET" and scope["path"] == "/"


def _is_origin_of(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    default = _DEFAULT_PORTS.get(parts.scheme)
    if default is None:
        return False
    return parts.netloc.removesuffix(default) == host.removesuffix(default)


def _declared_size(scope: _Message) -> int:
    declared = _Headers(scope["headers"]).single("content-length") or "0"
    return int(declared) if re.fullmatch("[0-9]{1,20}", declared) else 0
