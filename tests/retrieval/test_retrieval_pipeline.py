"""Embedding with batches side by side: every job has its own result, in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from mmedge.bundle import Bundle
from mmedge.errors import BackendError, ImageError
from mmedge.models.embedding import EmbeddingModel
from mmedge.models.load import load_as
from mmedge.retrieval.pipeline import Embedded, Job, embedded
from mmedge.retrieval.throughput import BulkModel, load_bulk_model
from mmedge.runtimes.session import SessionOptions
from mmedge.specs import Array, Float32Array, Modality


class Numbers:
    """A model of numbers: the text of a file, or an array of one. Its vector is the number."""

    def __init__(self, encoders: int = 1) -> None:
        self.encoders = encoders
        self.running = self.most = self.prepared = 0
        self.met = threading.Event()  # so many encode at once; the first of them wait for it
        self.lock = threading.Lock()

    def prepare(self, _: Modality, item: Any, *, shrink: bool) -> dict[str, Array]:
        assert shrink
        with self.lock:
            self.prepared += 1
        number = int(item)
        if number < 0:
            raise ImageError(f"{number}: damaged")
        shape = (1, 2) if number % 5 else (1, 3)  # some do not fit into one array
        return {"x": np.full(shape, number, np.float32)}

    def encode_prepared(self, modality: Modality, feed: Mapping[str, Array]) -> Float32Array:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
            if self.running == self.encoders:
                self.met.set()
        assert self.met.wait(200)
        with self.lock:
            self.running -= 1
        if (feed["x"] == 666).any():
            raise BackendError("the engine fails")
        return feed["x"][:, :1] + (0.5 if modality is Modality.AUDIO else 0)


def run(model: Numbers, jobs: Any, **options: Any) -> Iterator[Embedded[int]]:
    bulk = BulkModel(cast(EmbeddingModel, model), model.encoders)
    return embedded(bulk, jobs, batch_size=4, **options)


def jobs(numbers: list[int]) -> Iterator[Job[int]]:
    for number in numbers:
        yield Job(number, Modality.IMAGE, np.array(number))


def test_each_job_has_its_own_vector() -> None:
    done = list(run(Numbers(), jobs([7, -1, 9, 10, 11, 15, -2, 3, 4, 6, 5]), workers=3))
    assert sorted(one.key for one in done) == [-2, -1, 3, 4, 5, 6, 7, 9, 10, 11, 15]
    for one in done:
        if one.key < 0:
            assert one.vector is None
            assert one.error == f"{one.key}: damaged"
        else:
            assert one.vector is not None
            assert one.vector.tolist() == [one.key]


def test_so_many_batches_are_encoded_at_once_as_are_allowed_and_no_more() -> None:
    numbers = [number for number in range(1, 61) if number % 5]
    for encoders in (1, 3):
        model = Numbers(encoders)
        assert len(list(run(model, jobs(numbers), workers=4))) == 48  # 12 batches
        assert model.most == encoders


def test_images_and_sounds_are_encoded_apart() -> None:
    mixed = [
        Job(number, Modality.AUDIO if number % 2 else Modality.IMAGE, np.array(number))
        for number in range(1, 12)
    ]
    for one in run(Numbers(), mixed):
        assert one.vector is not None
        assert one.vector.tolist() == [one.key + (0.5 if one.key % 2 else 0)]
        assert one.modality is (Modality.AUDIO if one.key % 2 else Modality.IMAGE)


def test_files_of_the_known_hash_are_not_prepared(tmp_path: Path) -> None:
    given = []
    for number in range(6):
        file = tmp_path / f"{number}"
        file.write_text(str(number))
        digest = sha256(b"3" if number == 4 else str(number).encode()).hexdigest()
        given.append(Job(number, Modality.IMAGE, file, digest if number > 2 else None))
    given += [Job(6, Modality.IMAGE, tmp_path / "gone"), Job(7, Modality.IMAGE, tmp_path)]
    model = Numbers()
    done = {one.key: one for one in run(model, given)}
    assert model.prepared == 4
    assert [key for key, one in sorted(done.items()) if one.vector is not None] == [0, 1, 2, 4]
    for key in range(6):
        assert done[key].content_hash == sha256(str(key).encode()).hexdigest()
    assert done[3].error is None
    assert "No such file" in str(done[6].error)
    assert "directory" in str(done[7].error)


def test_jobs_are_read_only_as_far_as_threads_need_them() -> None:
    read = 0

    def endless() -> Iterator[Job[int]]:
        nonlocal read
        while True:
            read += 1
            yield Job(read, Modality.IMAGE, np.array(read * 5 + 1))

    results = run(Numbers(), endless(), workers=3)
    for _ in range(100):
        next(results)
    results.close()  # type: ignore[attr-defined]
    assert read <= 100 + 6 * 4  # batches: one a thread, one that waits, one that is being yielded


def test_an_engine_that_fails_ends_the_run() -> None:
    with pytest.raises(BackendError, match="the engine fails"):
        list(run(Numbers(), jobs([1, 2, 3, 4, 666, 6, 7, 8, 9])))


@pytest.mark.parametrize(
    ("backend", "encoders", "threads"), [("onnxruntime", 3, [1]), ("openvino", 1, [1, 3])]
)
def test_a_cpu_encodes_a_batch_a_thread_where_the_backend_can(
    tiny_bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    encoders: int,
    threads: list[int],
) -> None:
    loaded: list[SessionOptions] = []

    def load(*arguments: Any, options: SessionOptions, **named: Any) -> EmbeddingModel:
        loaded.append(options)
        return load_as(*arguments, options=options, **named)

    monkeypatch.setattr("mmedge.retrieval.throughput.load_as", load)
    bulk = load_bulk_model(tiny_bundle.path, None, backend, cpus=3)
    with bulk.model as model:
        assert bulk.encoders == encoders
        assert [options.threads for options in loaded] == threads
        assert not any(options.spin for options in loaded)
        assert set(model.sessions) == {"image_encoder"}
        pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
        given = [Job(number, Modality.IMAGE, each) for number, each in enumerate(pixels)]
        expected = model.encode_image(pixels)
        for one in embedded(bulk, given, batch_size=2):
            np.testing.assert_allclose(one.vector, expected[one.key], atol=1e-5)


def test_a_gpu_takes_two_batches_at_once(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[SessionOptions] = []
    chosen = SessionOptions(device="cuda")
    monkeypatch.setattr("mmedge.retrieval.throughput.session_options", lambda *_: chosen)
    monkeypatch.setattr(
        "mmedge.retrieval.throughput.load_as", lambda *_, options, **__: loaded.append(options)
    )
    assert load_bulk_model(tiny_bundle.path, None, None, cpus=8).encoders == 2
    assert [(options.device, options.threads) for options in loaded] == [("cuda", None)]
