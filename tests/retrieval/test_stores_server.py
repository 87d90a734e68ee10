"""Two devices and a real Milvus server, over links that are cut; and what its graph finds."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import pytest
from servers import new_name, server_address
from stores import MemoryStore, contents

from mmedge.errors import BackendUnavailableError
from mmedge.retrieval.items import Item
from mmedge.retrieval.stores.milvus import MilvusStore
from mmedge.retrieval.sync import pull, push
from mmedge.specs import Float32Array

pytestmark = pytest.mark.server
DIM = 16
TIMEOUT_S = 1.5


class Link:
    """A proxy to a server that cuts connections after random numbers of bytes.

    After every third cut it is down for longer than the stores of these tests wait.
    """

    def __init__(self, server: str, seed: int, most_bytes: int) -> None:
        host, port = server.rsplit("/", 1)[-1].split(":")
        self._server = (host, int(port))
        self._drawn = random.Random(seed)  # noqa: S311
        self._most_bytes = most_bytes
        self._down_until = 0.0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                if time.monotonic() < self._down_until:
                    client.close()
                    continue
                server = socket.create_connection(self._server)
                left = [self._drawn.randrange(200, self._most_bytes)]
                for one, other in ((client, server), (server, client)):
                    threading.Thread(
                        target=self._forward, args=(one, other, left), daemon=True
                    ).start()

    def _forward(self, one: socket.socket, other: socket.socket, left: list[int]) -> None:
        with suppress(OSError):
            while left[0] > 0 and (data := one.recv(4096)):
                other.sendall(data[: max(0, left[0])])
                left[0] -= len(data)
                if left[0] <= 0:
                    self.cuts += 1
                    if self.cuts % 3 == 0:
                        self._down_until = time.monotonic() + 2 * TIMEOUT_S
        for each in (one, other):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture
def link() -> Iterator[Callable[..., Link]]:
    """Opens links to the server."""
    links: list[Link] = []

    def open_(seed: int, most_bytes: int) -> Link:
        links.append(Link(server_address(), seed, most_bytes))
        return links[-1]

    yield open_
    for one in links:
        one.close()


def item(name: str, revision: int, origin: str) -> Item:
    vectors = np.random.default_rng(revision).normal(size=(1 + revision % 3, DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    metadata = {"n": revision, "tag": ["x"]}
    return Item(
        name, vectors.astype(np.float32), metadata=metadata, revision=revision, origin=origin
    )


def work(index: MemoryStore, address: str, collection: str, seed: int) -> int:
    """Change, push and pull over a link that is cut; return how often that failed."""
    drawn = random.Random(seed)  # noqa: S311
    origin = f"device {seed}"
    failed = 0
    for _ in range(12):
        for _ in range(drawn.randrange(6)):
            name, revision = f"item {drawn.randrange(15)}", drawn.randrange(1, 60)
            if drawn.random() < 0.3:
                index.delete([name], revision=revision, origin=origin)
            else:
                index.upsert([item(name, revision, origin)])
        try:
            with MilvusStore(address, collection, writer=origin, timeout_s=TIMEOUT_S) as store:
                for _ in range(3):
                    (push if drawn.random() < 0.6 else pull)(index, store, batch=4)
        except BackendUnavailableError:
            failed += 1
    return failed


def test_two_devices_over_links_that_are_cut_converge(link: Callable[..., Link]) -> None:
    collection = new_name()
    devices = [MemoryStore(DIM), MemoryStore(DIM)]
    failed = [0, 0]

    def run(number: int) -> None:
        failed[number] = work(devices[number], links[number].address, collection, number)

    links = [link(1, 25_000), link(2, 25_000)]
    with MilvusStore(server_address(), collection, dim=DIM) as store:
        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for copy in (push, pull):
            for index in devices:
                copy(index, store, batch=7)
        assert contents(devices[0]) == contents(devices[1]) == contents(store)
    assert all(one.cuts for one in links)
    assert sum(failed) > 0


def test_a_link_that_keeps_breaking_gets_everything_across(link: Callable[..., Link]) -> None:
    server, collection = server_address(), new_name()
    index = MemoryStore(DIM)
    index.upsert([item(f"item {number}", number + 1, "a") for number in range(60)])
    MilvusStore(server, collection, dim=DIM).close()
    broken = link(3, 25_000)
    failed = 0
    while failed < 300:
        try:
            with MilvusStore(broken.address, collection, writer="a", timeout_s=TIMEOUT_S) as store:
                push(index, store, batch=5)
            break
        except BackendUnavailableError:
            failed += 1
            time.sleep(0.1)  # while it is down, a try fails at once
    assert 0 < failed < 300
    with MilvusStore(server, collection) as store:
        assert contents(store) == contents(index)


def gapped(count: int, dim: int, seed: int) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Image vectors in clusters, image queries like them, and text queries beyond a gap."""
    random_ = np.random.default_rng(seed)

    def unit(vectors: Float32Array) -> Float32Array:
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    centres = unit(random_.normal(size=(200, dim)))
    gap = unit(random_.normal(size=(1, dim)))
    near = 0.7 / np.sqrt(dim)

    def around(number: int) -> Float32Array:
        drawn = centres[random_.integers(len(centres), size=number)]
        return unit(drawn + near * random_.normal(size=(number, dim)))

    images = unit(around(count) + 0.4 * gap)
    return images, unit(around(100) + 0.4 * gap), unit(around(100) - 0.6 * gap)


@pytest.mark.parametrize("recall", [0.9, 0.95, 0.99])
def test_the_graph_finds_the_queried_items(
    filled: tuple[MilvusStore, Float32Array], recall: float
) -> None:
    store, images = filled
    _, of_images, of_texts = gapped(len(images), images.shape[1], 0)
    for queries in (of_images, of_texts):
        exact = np.argsort(-(queries @ images.T), axis=1)[:, :10]
        found = store.search(queries, 10, recall=recall)
        shared = [
            len({hit.id for hit in hits} & set(map(str, row)))
            for hits, row in zip(found, exact, strict=True)
        ]
        assert sum(shared) / exact.size >= recall


@pytest.fixture(scope="module")
def filled() -> Iterator[tuple[MilvusStore, Float32Array]]:
    """A store whose graph is built, and its vectors."""
    address, collection = server_address(), new_name()
    images, _, _ = gapped(20_000, 64, 0)
    with MilvusStore(address, collection, dim=64, timeout_s=60) as store:
        for start in range(0, len(images), 2_000):
            part = images[start : start + 2_000]
            store.upsert([Item(str(start + n), part[n : n + 1], revision=1) for n in range(2_000)])
        client = store._rows._client
        client.flush(collection)
        until = time.monotonic() + 300
        while client.describe_index(collection, "vector")["indexed_rows"] < len(images):
            assert time.monotonic() < until
            time.sleep(0.2)
        # What was loaded before is searched without the graph for a while.
        client.release_collection(collection)
        client.load_collection(collection)
        yield store, images
