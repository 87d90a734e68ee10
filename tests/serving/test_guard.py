"""What every request passes first: hosts, origins, bounds, headers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from served import MemoryStore, client_of
from starlette.testclient import TestClient

from mmedge.errors import InputError
from mmedge.models import DualEncoder
from mmedge.serving.guard import LOOPBACK, Guard, Limits, allowed_hosts, is_loopback


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:8000", "localhost", "LOCALHOST:9000", "localhost.", "[::1]:8000"],
)
def test_requests_to_this_machine_are_served(client: TestClient, host: str) -> None:
    assert client.get("/api/stats", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:8000", 403),
        ("0.0.0.0", 403),  # noqa: S104
        ("[::2]", 403),
        ("127.0.0.1@evil.example", 400),
        ("localhost, evil.example", 400),
        ("localhost:port", 400),
        ("", 400),
        ("local host", 400),
    ],
)
def test_other_hosts_are_refused(client: TestClient, host: str, status: int) -> None:
    for path in ("/", "/api/stats", "/api/thumbnails/photos%2Fred.png"):
        found = client.get(path, headers={"host": host})
        assert found.status_code == found.json()["status"] == status


def test_two_hosts_are_refused(client: TestClient) -> None:
    headers = [("host", "127.0.0.1"), ("host", "evil.example")]
    assert client.get("/api/stats", headers=headers).status_code == 400


FOREIGN = [
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:9999"},
    {"origin": "http://127.0.0.1"},
    {"origin": "ftp://127.0.0.1:8000"},
    {"origin": "http://127.0.0.1:8000.evil.example"},
    {"origin": "http://[::1"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_pages_of_other_sites_are_refused(client: TestClient, headers: dict[str, str]) -> None:
    assert client.get("/", headers=headers).status_code == 403
    assert client.get("/api/search?q=red", headers=headers).status_code == 403
    assert client.post("/api/search", json={"text": "red"}, headers=headers).status_code == 403
    image = client.post("/api/search/image", content=b"GIF89a", headers=headers)
    assert image.status_code == 403
    assert "access-control-allow-origin" not in image.headers


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://127.0.0.1:8000"},
        {"origin": "HTTP://127.0.0.1:8000", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
    ],
    ids=str,
)
def test_our_own_page_is_served(client: TestClient, headers: dict[str, str]) -> None:
    assert client.post("/api/search", json={"text": "red"}, headers=headers).status_code == 200


def test_default_ports_may_be_left_out(store: MemoryStore) -> None:
    client = client_of(store, None, [])
    for origin, host in [("https://localhost", "localhost"), ("http://localhost:80", "localhost")]:
        headers = {"origin": origin, "host": host}
        assert client.get("/api/stats", headers=headers).status_code == 200


def test_a_link_of_another_site_opens_the_page_alone(client: TestClient) -> None:
    link = {
        "sec-fetch-site": "cross-site",
        "sec-fetch-mode": "navigate",
        "sec-fetch-dest": "document",
    }
    assert client.get("/?q=red", headers=link).status_code == 200
    assert client.get("/api/search?q=red", headers=link).status_code == 403
    assert client.post("/", headers=link).status_code == 403


def test_a_preflight_gets_no_permission(client: TestClient) -> None:
    asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    found = client.options("/api/search/image", headers=asked)
    assert found.status_code == 403
    assert not [name for name in found.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("path", "status"), [("/", 200), ("/search.js", 200), ("/api/stats", 200), ("/absent", 404)]
)
def test_every_response_has_the_headers(client: TestClient, path: str, status: int) -> None:
    found = client.get(path)
    assert found.status_code == status
    policy = found.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert found.headers["x-content-type-options"] == "nosniff"
    assert found.headers["x-frame-options"] == "DENY"
    assert found.headers["referrer-policy"] == "no-referrer"
    assert found.headers["cross-origin-resource-policy"] == "same-origin"
    assert found.headers["cache-control"] in ("no-store", "no-cache")


def test_a_refusal_has_the_headers_too(client: TestClient) -> None:
    found = client.get("/", headers={"host": "evil.example"})
    assert "default-src 'none'" in found.headers["content-security-policy"]


class Asked:
    """A request over bare ASGI, whose body is read only as far as the server asks for it."""

    def __init__(self, chunks: Iterator[bytes], headers: dict[str, str], path: str) -> None:
        raw = {"host": "localhost", **headers}
        self.scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(key.encode(), value.encode()) for key, value in raw.items()],
        }
        self._chunks = chunks
        self.read = 0
        self.status: int | None = None

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(0)
        chunk = next(self._chunks, None)
        self.read += len(chunk or b"")
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    async def send(self, message: Any) -> None:
        self.status = message.get("status", self.status)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    assert message["more_body"] is False
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def chunks(size: int) -> Iterator[bytes]:
    yield from (b"x" * 1000 for _ in range(size // 1000))


def guarded(limits: Limits) -> Guard:
    return Guard(echo, frozenset(LOOPBACK), limits)


def test_an_endless_body_is_cut_while_it_is_read() -> None:
    asked = Asked(chunks(10**12), {}, "/api/search")
    asyncio.run(guarded(Limits(body_bytes=5000))(asked.scope, asked.receive, asked.send))
    assert asked.status == 413
    assert asked.read == 6000


def test_a_body_that_is_declared_too_large_is_not_read() -> None:
    asked = Asked(chunks(10**12), {"content-length": str(10**9)}, "/api/search")
    asyncio.run(guarded(Limits(body_bytes=5000))(asked.scope, asked.receive, asked.send))
    assert (asked.status, asked.read) == (413, 0)


def test_a_body_that_lies_about_its_size_is_cut() -> None:
    asked = Asked(chunks(10**12), {"content-length": "10"}, "/api/search")
    asyncio.run(guarded(Limits(body_bytes=5000))(asked.scope, asked.receive, asked.send))
    assert (asked.status, asked.read) == (413, 6000)


def test_some_paths_take_larger_bodies() -> None:
    limits = Limits(body_bytes=5000, bodies={"/image": 50_000})
    for path, status in (("/image", 200), ("/image/", 413), ("/api", 413)):
        asked = Asked(chunks(40_000), {}, path)
        asyncio.run(guarded(limits)(asked.scope, asked.receive, asked.send))
        assert asked.status == status


def test_an_upload_that_stalls_is_ended() -> None:
    async def stall() -> dict[str, Any]:
        await asyncio.sleep(3600)
        raise AssertionError

    asked = Asked(chunks(0), {}, "/api")
    limits = Limits(timeout_s=0.05, running=1)
    guard = guarded(limits)

    async def both() -> None:
        await guard(asked.scope, stall, asked.send)
        assert asked.status == 504
        await guard(asked.scope, asked.receive, asked.send)  # its place is free again
        assert asked.status == 200

    asyncio.run(both())


def test_a_client_that_leaves_frees_its_place() -> None:
    async def leave() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    asked = Asked(chunks(0), {}, "/api")
    guard = guarded(Limits(running=1, waiting=1))

    async def both() -> None:
        await guard(asked.scope, leave, asked.send)
        assert asked.status is None
        await guard(asked.scope, asked.receive, asked.send)
        assert asked.status == 200

    asyncio.run(both())


def test_a_websocket_is_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "headers": []}
    asyncio.run(guarded(Limits())(scope, lambda: None, send))  # type: ignore[arg-type, return-value]
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_searches_run_so_many_at_once_and_the_rest_is_refused(
    store: MemoryStore, model: DualEncoder
) -> None:
    """Of 12 requests 2 run, 4 are let in, and 8 are refused."""
    running, most, lock = 0, 0, threading.Lock()
    opened = threading.Event()

    def block() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        opened.wait(60)
        with lock:
            running -= 1

    store.before_search = block
    with (
        client_of(store, model, [], limits=Limits(running=2, waiting=4)) as client,
        ThreadPoolExecutor(12) as pool,
    ):
        asked = [pool.submit(client.get, "/api/similar/photos%2Fred.png") for _ in range(12)]
        while sum(each.done() for each in asked) < 8:
            threading.Event().wait(0.01)
        opened.set()
        codes = sorted(each.result().status_code for each in asked)
    assert codes == [200] * 4 + [503] * 8
    assert most == 2


def test_a_search_that_takes_too_long_is_given_up(store: MemoryStore) -> None:
    opened = threading.Event()
    store.before_search = lambda: opened.wait(60)  # type: ignore[assignment, func-returns-value]
    client = client_of(store, None, [], limits=Limits(timeout_s=0.2))
    found = client.get("/api/similar/photos%2Fred.png")
    opened.set()
    assert found.status_code == 504
    assert "0.2 s" in found.json()["detail"]


def test_a_long_query_string_is_refused(client: TestClient) -> None:
    assert client.get(f"/api/search?q={'x' * 9000}").status_code == 414


def test_large_headers_are_refused(client: TestClient) -> None:
    assert client.get("/", headers={"x": "y" * 40_000}).status_code == 431


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.3.2.1", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "192.168.1.5", "robot.local", "")],  # noqa: S104
)
def test_loopback_addresses(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_other_addresses_need_a_name() -> None:
    with pytest.raises(InputError, match=r"--allow-host robot\.local"):
        allowed_hosts("0.0.0.0", [])  # noqa: S104
    assert "robot.local" in allowed_hosts("0.0.0.0", ["Robot.local"])  # noqa: S104
    assert "127.3.2.1" in allowed_hosts("127.3.2.1", [])


@pytest.mark.parametrize("name", ["*", "", "http://robot", "robot:8000/x", "a b", "robot,other"])
def test_names_that_are_no_hosts_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="--allow-host"):
        allowed_hosts("127.0.0.1", [name])


def test_hostile_paths_reach_no_file(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    for path in (
        "/../secret.png",
        "/..%2f..%2fetc%2fpasswd",
        "/pages/search.html",
        "/search.js/../../app.py",
        "//etc/passwd",
        f"/api/thumbnails/{tmp_path}/secret.png",
        "/api/thumbnails/..%2F..%2Fetc%2Fpasswd",
        "/api/thumbnails/%00",
        "/api/items/%ff%fe",
        "/api/thumbnails/photos%2Fred.png%00.png",
    ):
        found = client.get(path)
        assert found.status_code == 404, path
        assert b"root:" not in found.content
