"""Graphs in a worker: outputs as in this process, and a crash is an error."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from crashes import crash_on
from endless import endless_encoder

from mmedge.converters.graphs.worker import Worker, lent
from mmedge.errors import BackendError, TimeLimitError
from mmedge.runtimes.backends import open_session
from mmedge.specs import Array


def save_graph(path: Path) -> Path:
    """x (B, 3) float32 and keep (B,) bool -> x where it is kept, and how much that is, ()."""
    graph = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 20]>
        pick (float[batch, 3] x, bool[batch] keep) => (float[batch, 3] kept, float total)
        <int64[1] last = {-1}, float zero = {0.0}>
        {
            mask = Unsqueeze(keep, last)
            kept = Where(mask, x, zero)
            total = ReduceSum<keepdims = 0>(kept)
        }
    """)
    onnx.save(graph, path)
    return path


def feed_of(batch: int) -> dict[str, Array]:
    x = np.random.default_rng(batch).standard_normal((batch, 3)).astype(np.float32)
    return {"x": x, "keep": np.arange(batch) % 2 == 0}


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker() as started:
        yield started


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_graph(tmp_path / "model.onnx")


def ended(pid: int | None) -> bool:
    assert pid is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_several_inputs_and_outputs_go_through(model: Path, worker: Worker) -> None:
    with worker.open(model, "role/fp32") as graph, open_session(model) as session:
        for batch in (1, 3):
            feed = feed_of(batch)
            got, expected = graph.run(feed), session.run(feed)
            assert list(got) == list(expected) == ["kept", "total"]
            assert [got[name].dtype for name in got] == [np.float32] * 2
            np.testing.assert_equal(got, expected)


def test_one_process_serves_graph_after_graph_and_several_at_once(
    model: Path, worker: Worker
) -> None:
    feed = feed_of(2)
    with worker.open(model, "first") as first, worker.open(model, "second") as second:
        pid = worker.pid
        np.testing.assert_equal(first.run(feed), second.run(feed))
        first.close()
        with pytest.raises(BackendError, match=r"^first: onnxruntime failed: .*closed"):
            first.run(feed)
        second.run(feed)
    with worker.open(model, "third") as third:
        third.run(feed)
    assert worker.pid == pid
    assert not ended(pid)


def test_no_process_is_started_before_it_is_needed_and_none_is_left(model: Path) -> None:
    with Worker() as worker:
        assert worker.pid is None
        with worker.open(model, "role/fp32"):
            pid = worker.pid
        assert not ended(pid)
    assert ended(pid)


def test_a_lent_worker_stays_and_an_own_one_ends(model: Path, worker: Worker) -> None:
    with lent(worker) as same, same.open(model, "role/fp32"):
        assert same is worker
    assert not ended(worker.pid)
    with lent(None) as own, own.open(model, "role/fp32"):
        pid = own.pid
    assert ended(pid)


def test_a_refused_graph_is_an_error_with_its_reason_and_the_worker_goes_on(
    model: Path, worker: Worker, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    with worker.open(model, "role/fp32") as graph:
        refused = pytest.raises(BackendError, match=r"^role/fp16: onnxruntime failed: .*broken")
        with refused, worker.open(broken, "role/fp16"):
            pass
        graph.run(feed_of(1))


def test_a_refused_feed_is_an_error_with_its_reason_and_the_graph_goes_on(
    model: Path, worker: Worker
) -> None:
    with worker.open(model, "role/fp16") as graph:
        with pytest.raises(BackendError, match=r"^role/fp16: onnxruntime failed: .*keep"):
            graph.run({"x": feed_of(1)["x"]})
        graph.run(feed_of(1))


def test_a_crash_is_an_error_and_the_next_graph_has_another_process(
    model: Path, worker: Worker
) -> None:
    feed = feed_of(1)
    with worker.open(model, "role/fp16") as graph:
        graph.run(feed)
        pid = worker.pid
        assert pid is not None
        os.kill(pid, signal.SIGSEGV)
        with pytest.raises(BackendError, match=r"role/fp16: onnxruntime crashed \(SIGSEGV\)"):
            graph.run(feed)
        with pytest.raises(BackendError, match="role/fp16: onnxruntime cannot run"):
            graph.run(feed)
    with worker.open(model, "role/fp32") as graph:
        graph.run(feed)
    assert worker.pid != pid


def test_a_crash_on_opening_reports_the_last_message(
    model: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    crash_on("bad*", tmp_path, monkeypatch)
    with worker.open(model, "role/fp32"):
        bad = save_graph(tmp_path / "bad.onnx")
        message = r"crashed \(SIGSEGV\): this is the end of bad.onnx"
        with pytest.raises(BackendError, match=message), worker.open(bad, "role/fp16"):
            pass


def test_a_graph_that_never_ends_is_an_error_and_the_next_has_another_process(
    model: Path, tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "endless.onnx").write_bytes(endless_encoder(constant=False))
    with worker.open(tmp_path / "endless.onnx", "encoder") as graph:
        pid = worker.pid
        monkeypatch.setenv("MMEDGE_TIME_LIMIT_S", "1")
        with pytest.raises(TimeLimitError, match="encoder: onnxruntime did not end within 1 s"):
            graph.run({"pixel_values": np.zeros((1, 3, 8, 8), np.float32)})
    assert ended(pid)
    monkeypatch.setenv("MMEDGE_TIME_LIMIT_S", "0")
    with worker.open(model, "pick") as graph:
        assert graph.run(feed_of(2))["kept"].shape == (2, 3)


def test_an_interrupted_request_leaves_no_half_of_it(
    model: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with worker.open(model, "role/fp32") as graph:
        pid = worker.pid
        with monkeypatch.context() as patch:
            patch.setattr("mmedge.converters.graphs.worker._read", interrupt)
            with pytest.raises(KeyboardInterrupt):
                graph.run(feed_of(1))
    assert ended(pid)
    with worker.open(model, "role/fp32") as graph:
        graph.run(feed_of(1))
