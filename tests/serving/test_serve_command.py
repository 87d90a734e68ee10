"""`mmedge serve` as a process, on a real index."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from served import write_photos
from starlette.testclient import TestClient

from mmedge.bundle import Bundle
from mmedge.cli.app import run
from mmedge.errors import InputError, RetrievalError
from mmedge.retrieval.folders import index_folder
from mmedge.retrieval.index import Index
from mmedge.serving import server
from mmedge.serving.app import ServeOptions, create_app, open_served
from mmedge.serving.guard import LOOPBACK
from mmedge.serving.server import listen, url

MAIN = [sys.executable, "-c", "from mmedge.cli import main; main()", "serve"]
PATIENCE_S = 120


@pytest.fixture
def index_path(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """An index of three photos; its folder is written by nobody else."""
    photos = write_photos(tmp_path / "photos")
    with Index.create(tmp_path / "photos.index", tiny_bundle.path) as index:
        colours = [{"colour": colour} for colour in photos]
        index.add(images=list(photos.values()), ids=list(photos), metadata=colours)
    return tmp_path / "photos.index"


class Process:
    """A running `mmedge serve`."""

    def __init__(self, *arguments: str | Path) -> None:
        self.process = subprocess.Popen(
            [*MAIN, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stdout is not None
        self.lines: list[str] = []
        found = None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"http://\S+", line):
                break
        assert found, "".join(self.process.communicate())
        self.address = urlsplit(found[0])

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Any:
        """Return the response with its body read."""
        assert self.address.hostname is not None
        asked = http.client.HTTPConnection(
            self.address.hostname, self.address.port, timeout=PATIENCE_S
        )
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        asked.request(method, path, body, names)
        response = asked.getresponse()
        response.content = response.read()  # type: ignore[attr-defined]
        asked.close()
        return response

    def stop(self, number: int) -> tuple[int, str, str]:
        """Send a signal; return the exit code, and what was printed after the first line."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out, err


@contextmanager
def serving(*arguments: str | Path) -> Iterator[Process]:
    started = Process(*arguments)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
            started.process.communicate()


def test_a_process_serves_searches_and_ends_cleanly(index_path: Path, tmp_path: Path) -> None:
    with serving(index_path, "--port", "0", "--root", tmp_path / "photos") as process:
        assert process.lines[0].startswith("Serving photos.index at http://127.0.0.1:")
        found = process.ask("GET", "/api/search?q=a+secret+wish&k=2")
        assert len(json.loads(found.content)["results"]) == 2
        assert found.getheader("server") is None
        thumbnail = process.ask("GET", "/api/thumbnails/red")
        assert thumbnail.content.startswith(b"\xff\xd8")
        image = (tmp_path / "photos" / "blue.png").read_bytes()
        found = process.ask("POST", "/api/search/image?k=1", image, content_type="image/png")
        assert json.loads(found.content)["results"][0]["id"] == "blue"
        assert process.ask("GET", "/").getheader("content-type") == "text/html; charset=utf-8"
        # Refusals, over a real connection.
        assert process.ask("GET", "/api/stats", host="evil.example").status == 403
        foreign = process.ask("POST", "/api/search/image", image, origin="http://evil.example")
        assert foreign.status == 403
        assert process.ask("POST", "/api/search/image", content_length=str(1 << 30)).status == 413
        assert process.ask("GET", "/", x="y" * 40_000).status == 431
        code, out, err = process.stop(signal.SIGTERM)
        assert (code, out, err) == (0, "", "")


def test_a_body_without_end_is_cut(index_path: Path) -> None:
    with serving(index_path, "--port", "0") as process:
        place = (str(process.address.hostname), int(process.address.port or 0))
        with socket.create_connection(place, timeout=PATIENCE_S) as asked:
            head = (
                "POST /api/search HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            asked.sendall(head.encode())
            sent, chunk = 0, b"10000\r\n" + bytes(1 << 16) + b"\r\n"
            try:
                while sent < 1 << 30:
                    asked.sendall(chunk)
                    sent += len(chunk)
            except OSError:
                pass  # the server has hung up
        assert sent < 1 << 28
        assert process.ask("GET", "/api/stats").status == 200
        code, _, err = process.stop(signal.SIGINT)
        assert (code, err) == (0, "")


def test_clients_that_stall_do_not_keep_the_server_alive(index_path: Path) -> None:
    with serving(index_path, "--port", "0") as process:
        place = (str(process.address.hostname), int(process.address.port or 0))
        with socket.create_connection(place, timeout=PATIENCE_S) as asked:
            asked.sendall(
                b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
            )
            assert process.ask("GET", "/api/stats").status == 200
            assert process.stop(signal.SIGTERM)[0] == 0


def test_a_port_in_use_is_one_line(index_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*MAIN, str(index_path), "--port", port],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert f"127.0.0.1:{port}: the port is in use" in done.stderr


def test_other_machines_need_a_name_and_folders(index_path: Path) -> None:
    with pytest.raises(InputError, match="--allow-host"):
        run(["serve", str(index_path), "--host", "0.0.0.0", "--port", "0"])  # noqa: S104
    arguments = ("--host", "0.0.0.0", "--allow-host", "robot.local", "--port", "0")  # noqa: S104
    with serving(index_path, *arguments) as process:
        assert process.ask("GET", "/api/stats", host="robot.local").status == 200
        assert process.ask("GET", "/api/stats", host="other.local").status == 403
        assert json.loads(process.ask("GET", "/api/stats").content)["images"] is False
        code, _, err = process.stop(signal.SIGTERM)
    assert code == 0
    assert "there is no password" in " ".join(err.split())


def test_without_root_images_of_indexed_folders_are_shown(index_path: Path, tmp_path: Path) -> None:
    def status(*arguments: str) -> int:
        with serving(index_path, "--port", "0", *arguments) as process:
            shown: int = process.ask("GET", "/api/thumbnails/red").status
            process.stop(signal.SIGTERM)
        assert ("add --root" in process.lines[0]) == (shown == 404)
        return shown

    assert status() == 404
    with Index.open(index_path) as index:
        index.remember_folder(tmp_path / "photos")
    assert status() == 200
    assert status("--host", "0.0.0.0", "--allow-host", "robot.local") == 404  # noqa: S104


def test_images_of_an_indexed_folder_are_shown(tiny_bundle: Bundle, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos" / "kitchen")
    with Index.create(tmp_path / "a.index", tiny_bundle.path) as index:
        index_folder(index, index.bulk_model, tmp_path / "photos")
    served = open_served(tmp_path / "a.index", ServeOptions())
    client = TestClient(create_app(served, frozenset(LOOPBACK)), base_url="http://localhost")
    (hit,) = client.get("/api/search?q=red&k=1").json()["results"]
    assert hit["id"] == f"photos/{hit['source']}"
    assert client.get(hit["thumbnail"]).content.startswith(b"\xff\xd8")
    served.close()


@pytest.mark.parametrize("what", ["absent", "folder", "file.index", "tiny.mmedge"])
def test_a_path_that_is_no_index_is_named(what: str, tmp_path: Path, tiny_bundle: Bundle) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.index").write_text("x")
    with pytest.raises(InputError, match=rf"{re.escape(what)}.*Expected an index"):
        run(["serve", str(tmp_path / what)])


def test_folders_of_images_must_be_there(index_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--root"):
        run(["serve", str(index_path), "--root", str(tmp_path / "absent")])


def test_an_index_of_vectors_has_no_model(tmp_path: Path) -> None:
    Index.create(tmp_path / "v.index", dim=3).close()
    served = open_served(tmp_path / "v.index", ServeOptions())
    served.close()
    assert served.title == "v.index"


def test_words_and_distinctness_rank_a_real_index(tmp_path: Path) -> None:
    vectors = np.array([[1, 0], [1, 0.001], [0.5, 1], [0, 1]], np.float32)
    with Index.create(tmp_path / "v.index", dim=2) as index:
        texts = [None, None, "a garage", "the hall"]
        index.add(vectors=vectors, texts=texts, ids=["a", "b", "c", "d"])
    served = open_served(tmp_path / "v.index", ServeOptions())
    client = TestClient(create_app(served, frozenset(LOOPBACK)), base_url="http://localhost")

    def found(**options: object) -> list[str]:
        response = client.post("/api/search", json={"vector": [1, 0], **options})
        assert response.status_code == 200, response.text
        return [hit["id"] for hit in response.json()["results"]]

    assert found() == ["a", "b", "c", "d"]
    assert found(distinct=0.99) == ["a", "c", "d"]
    assert found(words="garage")[0] == "c"
    assert found(where='id != "a"', unlike=["c"], k=1) == ["b"]
    assert client.post("/api/search", json={"vector": [1, 0], "words": "?"}).status_code == 400
    assert [item["id"] for item in client.get("/api/items").json()["items"]] == ["a", "b", "c", "d"]
    served.close()


def test_a_bundle_that_is_gone_leaves_searches_by_items(
    index_path: Path, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    tiny_bundle.path.rename(tmp_path / "moved.mmedge")
    with pytest.warns(RuntimeWarning, match="Pass --bundle"):
        open_served(index_path, ServeOptions()).close()
    open_served(index_path, ServeOptions(bundle=tmp_path / "moved.mmedge")).close()


def test_a_damaged_index_is_refused(index_path: Path) -> None:
    record = index_path / "record.sqlite"
    record.write_bytes(b"not a database" * 100)
    with pytest.raises((RetrievalError, InputError)):
        open_served(index_path, ServeOptions())


def test_addresses_to_listen_on() -> None:
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        assert url(listening) == f"http://127.0.0.1:{port}/"
        with pytest.raises(InputError, match="in use"):
            listen("127.0.0.1", port)
    for host in ("no such host", "192.0.2.1"):
        with pytest.raises(InputError, match="not an address of this machine"):
            listen(host, 0)


def test_an_ipv6_address_is_bracketed() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        listening = listen("::1", 0)
    except InputError:
        pytest.skip("no IPv6 loopback")
    with listening:
        assert url(listening).startswith("http://[::1]:")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(server, "_MODULES", ("fastapi", "uvicorn_is_absent"))
    with pytest.raises(InputError, match=re.escape('pip install "mmedge[serve]"')):
        run(["serve", str(tmp_path)])
