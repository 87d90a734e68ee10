"""Sessions on engines: graphs, memory, failures, callers. The GPU is not there, see fake_gpu.py."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import HOST, cudaError_t
from fake_gpu import FakeGpu
from onnx import TensorProto, helper
from tiny_graphs import embed, feed_of, save, save_nonzero, tensor_info

from mmedge.errors import BackendError
from mmedge.runtimes.session import Session
from mmedge.specs import Array


def assert_outputs(session: Session, batch: int, seed: int = 0) -> None:
    feed = feed_of(batch, seed)
    assert_embedded(session.run(feed), feed)


def assert_embedded(got: Mapping[str, Array], feed: Mapping[str, Array]) -> None:
    for name, expected in embed(feed).items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-5)


def test_from_the_third_call_on_a_call_is_one_launch(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    calls = fake_gpu.cuda.calls
    with fake_gpu.embedder(tmp_path) as session:
        assert_outputs(session, 3)  # piece by piece
        assert (calls["cudaMemcpyAsync"], calls["cudaGraphLaunch"]) == (4, 0)
        assert_outputs(session, 3, seed=1)  # captured, and launched
        before = calls.copy()
        for seed in range(2, 6):
            assert_outputs(session, 3, seed)
        done = {name: count for name, count in (calls - before).items() if "Device" not in name}
        assert done == {"cudaGraphLaunch": 4, "cudaStreamSynchronize": 4}
        assert_outputs(session, 8)  # every buffer moves: what was captured reads the old ones
        assert len(fake_gpu.cuda.launchable) == 0
        assert_outputs(session, 3)


def test_each_shape_has_its_graph_and_the_least_used_goes(
    fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    with fake_gpu.embedder(tmp_path, graphs=2) as session:
        for batch in (8, 1, 8, 1, 8, 1):  # the largest first, so that no buffer moves
            assert_outputs(session, batch, seed=batch)
        assert fake_gpu.library.done == {"contexts": 2, "runs": 2, "captured": 2}
        for batch in (8, 2, 8, 1):  # 1 was used least recently, and is made anew
            assert_outputs(session, batch)
        assert fake_gpu.library.done == {"contexts": 2, "runs": 4, "captured": 2}


@pytest.mark.parametrize(("graphs", "captured"), [(8, 2), (0, 0)])
def test_tensorrt_rtx_makes_its_own_graphs(
    graphs: int, captured: int, fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    for flavour, library in fake_gpu.libraries.items():
        with fake_gpu.embedder(tmp_path, flavour=flavour, graphs=graphs) as session:
            for batch in (2, 1, 2, 1, 2, 1):
                assert_outputs(session, batch)
        ours = flavour == "tensorrt"
        assert library.done["captured"] == (captured if ours else 0)
        assert library.graphs == ([] if ours else [graphs > 0])


@pytest.mark.parametrize(
    "refused_by", ["capture", "cudaGraphInstantiate", "cudaStreamBeginCapture"]
)
def test_a_failed_capture_runs_without_a_graph_and_is_logged(
    refused_by: str, fake_gpu: FakeGpu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake_gpu.cuda.refuse_capture = refused_by == "capture"
    unsupported = [cudaError_t.cudaErrorStreamCaptureUnsupported] * 9
    fake_gpu.cuda.failures[refused_by] = unsupported
    with fake_gpu.embedder(tmp_path) as session:
        for seed in range(5):
            assert_outputs(session, 3, seed)
        (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert "no CUDA graph for inputs of ((3, 8), (3,))" in warning
        assert fake_gpu.cuda.calls["cudaGraphLaunch"] == 0
        fake_gpu.cuda.graphs.clear()  # of the instantiation that failed


def test_closing_gives_everything_back(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    session = fake_gpu.embedder(tmp_path)
    binding = session.bind(feed_of(2))
    assert_outputs(session, 3)
    outputs = binding.outputs["y"]
    output = outputs.copy()
    session.close()
    assert fake_gpu.cuda.used() == 0
    np.testing.assert_array_equal(outputs, output)  # an array never loses its memory
    assert fake_gpu.cuda.used(HOST) > 0
    del outputs, binding
    assert fake_gpu.cuda.left() == {}
    forgotten = fake_gpu.embedder(tmp_path)
    assert_outputs(forgotten, 3)
    del forgotten
    gc.collect()
    assert fake_gpu.cuda.left() == {}


@pytest.mark.parametrize("scratch", ["most", "needed"])
def test_out_of_memory_reports_needed_and_free_sizes(
    scratch: str, fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    cuda = fake_gpu.cuda
    with fake_gpu.embedder(tmp_path, scratch=scratch) as session:
        cuda.memory_bytes = cuda.used() + 2000  # a context and the inputs, no more
        with pytest.raises(BackendError) as caught:
            session.run(feed_of(8))
        text = str(caught.value)
        assert "Out of memory on cuda:0 (Fake GPU 0)" in text
        assert "MiB needed for activations of" in text
        assert "MiB are free. Use a smaller batch" in text
        cuda.memory_bytes *= 100
        assert_outputs(session, 8)  # what was made half was given back
    cuda.memory_bytes = 100
    with pytest.raises(BackendError, match=r"Out of memory.*the engine of .*model\.onnx"):
        fake_gpu.embedder(tmp_path)


def test_a_failed_run_gives_its_reason_and_the_next_runs(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    with fake_gpu.embedder(tmp_path, contexts=1) as session:
        for _ in range(2):
            fake_gpu.library.fail_runs = 1
            with pytest.raises(
                BackendError, match=r"m.*\.onnx: TensorRT 10\.3\.0: the run failed: "
            ):
                session.run(feed_of(2))
        assert_outputs(session, 2)
        binding = session.bind(feed_of(2))
        fake_gpu.cuda.failures["cudaGraphLaunch"] = [cudaError_t.cudaErrorInvalidValue]
        with pytest.raises(BackendError, match="cudaGraphLaunch: cudaErrorInvalidValue: error 1"):
            binding.run()
        with pytest.raises(BackendError, match=r"earlier run of this binding failed\. Bind again"):
            binding.run()
        fake_gpu.cuda.failures["cudaStreamSynchronize"] = [cudaError_t.cudaErrorIllegalAddress]
        with pytest.raises(BackendError, match=r"IllegalAddress.*in this process"):
            session.run(feed_of(2))


def test_another_gpu_and_sleeping_callers(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    cuda = fake_gpu.cuda
    cuda.devices = 2
    with fake_gpu.embedder(tmp_path, device="cuda:1", spin=False) as session:
        assert_outputs(session, 2)
        assert cuda.current == 0  # the thread's own device is left alone
        assert session.placement.device == "cuda:1"
        assert (cuda.calls["cudaEventSynchronize"], cuda.calls["cudaStreamSynchronize"]) == (1, 0)


def test_outputs_whose_size_depends_on_values(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    model = save_nonzero(tmp_path / "nonzero.onnx")
    with fake_gpu.open(model) as session:
        for ones in (2, 6, 0, 3, 3, 3):
            feed = {"x": np.array([1] * ones + [0] * (6 - ones), np.float32)}
            np.testing.assert_array_equal(session.run(feed)["where"], np.arange(ones)[None])
            on_device = session.run_device(feed)["where"]
            np.testing.assert_array_equal(on_device.numpy(), np.arange(ones)[None])
        binding = session.bind(feed)
        feed["x"][...] = 1
        with pytest.raises(BackendError, match=r"'where' has shape \(1, 6\), bound was \(1, 3\)"):
            binding.run()
        del on_device
    assert fake_gpu.cuda.calls["cudaStreamBeginCapture"] == 0


def test_shapes_may_follow_from_values_on_the_host(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    model = save(
        tmp_path / "tile.onnx",
        [
            helper.make_node("Concat", ["n", "one"], ["times"], axis=0),
            helper.make_node("Tile", ["x", "times"], ["y"]),
        ],
        [
            tensor_info("x", [1, 2]),
            tensor_info("n", [1], TensorProto.INT64),
        ],
        [tensor_info("y", ["from n", 2])],
        {"one": np.array([1], np.int64)},
    )
    fake_gpu.on_host = ("n",)
    x = np.array([[1, 2]], np.float32)
    with fake_gpu.open(model) as session:
        for times in (2, 2, 2, 5, 1, 5):
            got = session.run({"x": x, "n": np.array([times])})["y"]
            np.testing.assert_array_equal(got, np.tile(x, (times, 1)))
        with pytest.raises(BackendError, match=r"the values of \['n'\].*Use run_device"):
            session.bind_device({"x": x, "n": np.array([3])})
    assert fake_gpu.cuda.calls["cudaStreamBeginCapture"] == 0


def test_weights_that_cannot_be_streamed(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"weight_streaming_bytes is 5, but .* without weight"):
        fake_gpu.embedder(tmp_path, weight_streaming_bytes=5)
