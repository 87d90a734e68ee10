"""Sessions on engines: lanes, graphs, profiles, memory. The GPU is not there, see fake_gpu.py."""

from __future__ import annotations

import gc
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import cudaError_t, cudaMemoryType
from fake_gpu import FakeGpu
from fake_tensorrt import CudaGraphStrategy
from onnx import TensorProto, helper
from tiny_graphs import embed, feed_of, save

from mmedge.errors import BackendError, ShapeError
from mmedge.runtimes.cuda.runtime import Device
from mmedge.runtimes.session import Session
from mmedge.specs import Array, Axis

HOST = cudaMemoryType.cudaMemoryTypeHost
WIDTH_BYTES = 8 * 4  # a row of x


def assert_answers(session: Session, batch: int, seed: int = 0) -> None:
    feed = feed_of(batch, seed)
    assert_embedded(session.run(feed), feed)


def assert_embedded(got: Mapping[str, Array], feed: Mapping[str, Array]) -> None:
    for name, expected in embed(feed).items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-5)


# Graphs.


def test_from_the_third_call_on_a_call_is_one_launch(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    calls = fake_gpu.cuda.calls
    with fake_gpu.embedder(tmp_path) as session:
        assert_answers(session, 3)  # piece by piece
        assert (calls["cudaMemcpyAsync"], calls["cudaGraphLaunch"]) == (4, 0)
        assert_answers(session, 3, seed=1)  # captured, and launched
        assert (calls["cudaMemcpyAsync"], calls["cudaGraphLaunch"]) == (8, 1)
        before = calls.copy()
        for seed in range(2, 6):
            assert_answers(session, 3, seed)
        assert calls - before == {"cudaGraphLaunch": 4, "cudaStreamSynchronize": 4}


def test_each_shape_has_its_graph_and_the_least_used_goes(
    fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    library, calls = fake_gpu.library, fake_gpu.cuda.calls
    with fake_gpu.embedder(tmp_path, graphs=2) as session:
        for batch in (8, 1, 8, 1, 8, 1):  # the largest first, so that no buffer moves
            assert_answers(session, batch, seed=batch)
        assert library.done == {"contexts": 2, "runs": 2, "captured": 2}
        assert len(fake_gpu.cuda.launchable) == 2

        assert_answers(session, 8)  # now 1 is the least recently used
        assert_answers(session, 2)
        assert library.done["contexts"] == 2
        assert len(fake_gpu.cuda.launchable) == 1
        launches = calls["cudaGraphLaunch"]
        assert_answers(session, 8)
        assert calls["cudaGraphLaunch"] == launches + 1
        assert_answers(session, 1)  # anew
        assert library.done == {"contexts": 2, "runs": 4, "captured": 2}


def test_without_graphs_one_context_serves_all_shapes(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    with fake_gpu.embedder(tmp_path, graphs=0) as session:
        for batch in (1, 2, 1, 2, 2, 2):
            assert_answers(session, batch)
    assert fake_gpu.library.done == {"contexts": 1, "runs": 6}
    assert fake_gpu.cuda.calls["cudaStreamBeginCapture"] == 0


def test_tensorrt_rtx_makes_its_own_graphs(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    library = fake_gpu.libraries["tensorrt-rtx"]
    for graphs, strategy in ((8, "WHOLE_GRAPH_CAPTURE"), (0, "DISABLED")):
        library.graphs.clear()
        with fake_gpu.embedder(tmp_path, flavour="tensorrt-rtx", graphs=graphs) as session:
            for batch in (1, 2, 1, 2, 1, 2):
                assert_answers(session, batch)
        assert library.graphs == [CudaGraphStrategy[strategy]]
    assert fake_gpu.cuda.calls["cudaStreamBeginCapture"] == 0


@pytest.mark.parametrize("refused_by", ["capture", "TensorRT", "instantiation", "begin"])
def test_what_cannot_be_captured_runs_without_a_graph_and_the_log_tells(
    refused_by: str, fake_gpu: FakeGpu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unsupported = [cudaError_t.cudaErrorStreamCaptureUnsupported] * 9
    if refused_by == "capture":
        fake_gpu.cuda.refuse_capture = True
    elif refused_by == "TensorRT":
        fake_gpu.library.refuse_capture = True
    elif refused_by == "instantiation":
        fake_gpu.cuda.failures["cudaGraphInstantiate"] = unsupported
    else:
        fake_gpu.cuda.failures["cudaStreamBeginCapture"] = unsupported

    with fake_gpu.embedder(tmp_path) as session:
        for seed in range(5):
            assert_answers(session, 3, seed)
        told = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert len(told) == 1
        assert "no CUDA graph for inputs of ((3, 8), (3,))" in told[0]
        assert "captur" in told[0].lower()
        assert fake_gpu.cuda.calls["cudaGraphLaunch"] == 0
        assert fake_gpu.library.done["runs"] == 5


def test_what_the_collector_frees_during_a_capture_breaks_nothing(
    fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    device = Device(0)
    kept = [device.allocate(64, "a test")]
    used = fake_gpu.cuda.used()
    with fake_gpu.embedder(tmp_path) as session:
        assert_answers(session, 3)
        fake_gpu.library.on_run = kept.clear
        assert_answers(session, 3)
        assert fake_gpu.library.done["captured"] == 1
        assert fake_gpu.cuda.calls["cudaGraphLaunch"] == 1
    assert fake_gpu.cuda.used() == used - 64 == 0


# Memory.


def test_buffers_grow_are_reused_and_take_their_graphs_with_them(
    fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    calls = fake_gpu.cuda.calls
    with fake_gpu.embedder(tmp_path) as session:
        for _ in range(3):
            assert_answers(session, 2)
        taken = calls["cudaMalloc"], calls["cudaHostAlloc"]
        for batch in (1, 2, 1):
            assert_answers(session, batch)
        assert (calls["cudaMalloc"] - 1, calls["cudaHostAlloc"]) == taken  # a context, no buffer

        assert_answers(session, 5)  # every buffer moves: what was captured reads the old ones
        assert len(fake_gpu.cuda.launchable) == 0
        assert_answers(session, 2)
        assert_answers(session, 2)
        assert len(fake_gpu.cuda.launchable) == 1
        assert calls["cudaHostAlloc"] == taken[1] + 4


def test_an_input_that_moves_alone_takes_its_graphs_with_it(
    fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    model = save(
        tmp_path / "sum.onnx",
        [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
    )
    with fake_gpu.open(model) as session:
        for batch in (2, 2, 2, 5, 2, 2, 2):
            assert session.run({"x": np.ones(batch, np.float32)})["y"] == batch


def test_scratch_that_moves_alone_takes_its_graphs_with_it(
    fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    with fake_gpu.embedder(tmp_path, scratch="needed") as session:
        for batch in (3, 4, 4, 4):
            assert_answers(session, batch)
        taken = fake_gpu.cuda.calls["cudaHostAlloc"]
        for batch in (6, 4, 4):  # buffers for 4 were made for 6
            assert_answers(session, batch)
        assert fake_gpu.cuda.calls["cudaHostAlloc"] == taken


def test_buffers_that_grow_step_by_step_do_not_move_at_each(
    fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    with fake_gpu.embedder(tmp_path) as session:
        for batch in range(1, 9):
            assert_answers(session, batch)
    assert fake_gpu.cuda.calls["cudaHostAlloc"] == 4 * 4  # for 1, 2, 4 and 8 rows


def test_scratch_is_for_the_largest_shapes_or_for_those_that_come(
    fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    used = {}
    for scratch in ("most", "needed"):
        with fake_gpu.embedder(tmp_path, scratch=scratch) as session:
            for batch in (1, 1, 1):
                assert_answers(session, batch)
            used[scratch] = fake_gpu.cuda.used()
            for batch in (8, 1, 8, 1, 8, 1):
                assert_answers(session, batch)
    per_row = 64 * (8 + 1)
    assert used["most"] - used["needed"] == 7 * per_row


def test_closing_gives_everything_back(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    session = fake_gpu.embedder(tmp_path)
    binding = session.bind(feed_of(2))
    for batch in range(1, 5):
        assert_answers(session, batch)
    outputs = binding.outputs["y"]
    answer = outputs.copy()

    session.close()

    assert list(fake_gpu.library.contexts) == []
    assert fake_gpu.cuda.used() == 0
    np.testing.assert_array_equal(outputs, answer)  # an array never loses its memory
    del outputs, binding
    assert fake_gpu.cuda.left() == {}


def test_a_session_that_nobody_closes_goes_with_its_last_reference(
    fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    session = fake_gpu.embedder(tmp_path)
    assert_answers(session, 3)
    del session
    gc.collect()
    assert fake_gpu.cuda.left() == {}


@pytest.mark.parametrize("scratch", ["most", "needed"])
def test_out_of_memory_says_what_was_needed_and_what_was_free(
    scratch: str, fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    cuda = fake_gpu.cuda
    with fake_gpu.embedder(tmp_path, scratch=scratch) as session:
        cuda.memory_bytes = cuda.used() + 2000  # a context and the inputs, no more
        with pytest.raises(BackendError) as caught:
            session.run(feed_of(8))
        said = str(caught.value)
        assert "Out of memory on cuda:0 (Fake GPU 0)" in said
        assert "MiB needed for activations of" in said
        assert "MiB are free. Use a smaller batch" in said
        assert "cudaErrorMemoryAllocation" in said
        cuda.memory_bytes *= 100
        assert_answers(session, 8)  # what was made half was given back


def test_out_of_memory_while_loading_says_so_too(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    fake_gpu.cuda.memory_bytes = 100
    with pytest.raises(
        BackendError, match=r"Out of memory.*needed for the engine of .*model\.onnx"
    ):
        fake_gpu.embedder(tmp_path)


def test_out_of_memory_for_a_context_says_so_too(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    with fake_gpu.embedder(tmp_path) as session:
        # Room for the inputs of one row and no context beside them.
        fake_gpu.cuda.memory_bytes = fake_gpu.cuda.used() + WIDTH_BYTES + 8
        with pytest.raises(BackendError, match=r"Out of memory.*an execution context"):
            session.run(feed_of(1))


# Failures.


def test_a_run_that_fails_says_what_tensorrt_said_and_the_next_runs(
    fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    with fake_gpu.embedder(tmp_path) as session:
        fake_gpu.library.fail_runs = 1
        with pytest.raises(
            BackendError, match=r"model\.onnx: TensorRT 10\.3\.0: the run failed: the kernel cannot"
        ):
            session.run(feed_of(2))
        assert_answers(session, 2)
        binding = session.bind(feed_of(2))
        fake_gpu.library.fail_runs = 1
        fake_gpu.cuda.failures["cudaGraphLaunch"] = [cudaError_t.cudaErrorInvalidValue]
        with pytest.raises(BackendError, match="cudaGraphLaunch: cudaErrorInvalidValue: what CUDA"):
            binding.run()
        with pytest.raises(
            BackendError, match=r"an earlier run of this binding failed\. Bind again"
        ):
            binding.run()


def test_a_gpu_that_is_lost_is_said_to_be(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    with fake_gpu.embedder(tmp_path) as session:
        fake_gpu.cuda.failures["cudaStreamSynchronize"] = [cudaError_t.cudaErrorIllegalAddress]
        with pytest.raises(BackendError, match=r"IllegalAddress.*in this process any more"):
            session.run(feed_of(2))


# Profiles.


def test_shapes_outside_name_the_axis_and_its_bounds(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    with fake_gpu.embedder(tmp_path) as session:
        for run in (session.run, session.bind):
            with pytest.raises(ShapeError) as caught:
                run(feed_of(9))
            said = str(caught.value)
            assert "Input 'x': got (9, 8), axis 'batch' is 9" in said
            assert "profile 0: 'batch' 1 to 8" in said
            assert "mmedge build" in said
        assert_answers(session, 8)
    assert fake_gpu.library.done["contexts"] == 1


# Many callers.


def test_many_threads_share_a_few_lanes(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    with fake_gpu.embedder(tmp_path, contexts=3, graphs=2) as session:
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(lambda n: assert_answers(session, 1 + n % 5, n), range(120)))
        assert len(fake_gpu.cuda.streams) - 1 <= 3
        assert fake_gpu.library.done["contexts"] <= 3 * 2


class Gate:
    """Holds every run on the host until it is opened."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.reached = threading.Semaphore(0)
        self.opened = threading.Event()
        gpu.library.on_run = self

    def __call__(self) -> None:
        self.reached.release()
        assert self.opened.wait(30)


def test_calls_that_have_begun_end_with_their_answer(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    gate = Gate(fake_gpu)
    session = fake_gpu.embedder(tmp_path, contexts=1)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(assert_answers, session, 2, seed) for seed in range(4)]
        assert gate.reached.acquire(timeout=30)
        while session._waiting < 3:  # the others wait for the one lane
            threading.Event().wait(0.001)
        session.close()
        with pytest.raises(BackendError, match="closed"):
            session.run(feed_of(2))
        gate.opened.set()
        for call in calls:
            call.result(timeout=30)
    fake_gpu.library.on_run = None
    assert fake_gpu.cuda.used() == 0


def test_closing_waits_for_the_run_of_a_binding(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    session = fake_gpu.embedder(tmp_path, graphs=0)
    feed = feed_of(2)
    binding = session.bind(feed)
    gate = Gate(fake_gpu)
    with ThreadPoolExecutor(2) as pool:
        run = pool.submit(binding.run)
        assert gate.reached.acquire(timeout=30)
        closed = pool.submit(session.close)
        gate.opened.set()
        assert_embedded(run.result(timeout=30), feed)
        closed.result(timeout=30)
    with pytest.raises(BackendError, match="closed"):
        binding.run()
    fake_gpu.library.on_run = None


def test_a_lane_that_is_lost_makes_room_for_another(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    with fake_gpu.embedder(tmp_path, contexts=1) as session:
        for _ in range(3):
            fake_gpu.library.fail_runs = 1
            with pytest.raises(BackendError, match="the run failed"):
                session.run(feed_of(1))
        assert_answers(session, 1)


def test_who_does_not_spin_sleeps_on_an_event(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    calls = fake_gpu.cuda.calls
    with fake_gpu.embedder(tmp_path, spin=False) as session:
        for seed in range(4):
            assert_answers(session, 3, seed)
        assert (calls["cudaEventSynchronize"], calls["cudaStreamSynchronize"]) == (4, 0)


def test_a_session_on_another_gpu_leaves_the_threads_own_alone(
    fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    cuda = fake_gpu.cuda
    cuda.devices = 2
    with fake_gpu.embedder(tmp_path, device="cuda:1") as session:
        binding = session.bind(feed_of(2))
        for seed in range(3):
            assert_answers(session, 2, seed)
            binding.run()
            assert cuda.current == 0
        assert {stream.device for handle, stream in cuda.streams.items() if handle != 1} == {1}
        assert session.placement.device == "cuda:1"
        cuda.cudaSetDevice(1)
        assert_answers(session, 2)
        assert cuda.current == 1
        cuda.cudaSetDevice(0)
        del binding


# Bindings.


def test_a_binding_launches_from_its_first_run_on(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    calls = fake_gpu.cuda.calls
    with fake_gpu.embedder(tmp_path) as session:
        feed = feed_of(4)
        binding = session.bind(feed)
        before = calls.copy()
        assert_embedded(binding.run(), feed)
        assert calls - before == {"cudaGraphLaunch": 1, "cudaStreamSynchronize": 1}
        del binding


def test_page_locked_inputs_are_copied_from_where_they_are(
    fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    device = Device(0)
    feed = feed_of(4)
    mine = device.allocate_pinned(feed["x"].nbytes, "a camera").array((4, 8), np.dtype(np.float32))
    mine[...] = feed["x"]
    with fake_gpu.embedder(tmp_path) as session:
        binding = session.bind({"x": mine, "gate": feed["gate"]})
        assert binding.inputs["x"] is mine
        staged = [block for block in fake_gpu.cuda.blocks.values() if block.kind == HOST]
        for block in staged:
            if block.address != mine.ctypes.data:
                assert feed["x"].tobytes() not in block.bytes().tobytes()
        mine[...] = feed_of(4, seed=1)["x"]
        assert_embedded(binding.run(), {"x": mine, "gate": feed["gate"]})
        del binding


# Outputs whose size depends on values, and inputs from which shapes follow.


def _save_nonzero(folder: Path) -> Path:
    """Write `where`: the positions of what is not zero."""
    return save(
        folder / "nonzero.onnx",
        [helper.make_node("NonZero", ["x"], ["where"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch"])],
        [helper.make_tensor_value_info("where", TensorProto.INT64, [1, None])],
    )


def _mixed(ones: int, size: int = 6) -> dict[str, Array]:
    return {"x": np.array([1] * ones + [0] * (size - ones), np.float32)}


def test_an_output_is_as_large_as_its_values_make_it(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    with fake_gpu.open(_save_nonzero(tmp_path)) as session:
        for ones in (2, 6, 0, 3, 3, 3):
            got = session.run(_mixed(ones))["where"]
            np.testing.assert_array_equal(got, np.arange(ones)[None])
        kept = {
            ones: session.run_device({"x": _mixed(ones)["x"][::-1].copy()})["where"]
            for ones in (5, 2, 0)
        }
        for ones, on_device in kept.items():
            assert on_device.shape == (1, ones)
            np.testing.assert_array_equal(on_device.numpy(), np.arange(6 - ones, 6)[None])
        del kept, on_device
    assert fake_gpu.cuda.calls["cudaStreamBeginCapture"] == 0


def test_a_binding_keeps_the_size_it_was_bound_with(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    with fake_gpu.open(_save_nonzero(tmp_path)) as session:
        feed = _mixed(3)
        binding = session.bind(feed)
        feed["x"][...] = feed["x"][::-1].copy()
        np.testing.assert_array_equal(binding.run()["where"], [[3, 4, 5]])
        feed["x"][...] = 1
        with pytest.raises(BackendError, match=r"'where' has shape \(1, 6\), bound was \(1, 3\)"):
            binding.run()
        with pytest.raises(BackendError, match=r"'where'.* cannot be bound. Use run_device"):
            session.bind_device(feed)


def test_out_of_memory_for_an_output_that_grows_is_told(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    with fake_gpu.open(_save_nonzero(tmp_path), axes={"batch": Axis(1, 1, 9000)}) as session:
        session.run(_mixed(1, 9000))
        fake_gpu.cuda.memory_bytes = fake_gpu.cuda.used() + 1000
        with pytest.raises(BackendError, match=r"Out of memory.*needed for output 'where'"):
            session.run(_mixed(9000, 9000))


def _save_tiling(folder: Path) -> Path:
    """Write y: x as often as the value of n says."""
    return save(
        folder / "tile.onnx",
        [
            helper.make_node("Concat", ["n", "one"], ["times"], axis=0),
            helper.make_node("Tile", ["x", "times"], ["y"]),
        ],
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2]),
            helper.make_tensor_value_info("n", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["from n", 2])],
        {"one": np.array([1], np.int64)},
    )


def test_shapes_may_follow_from_values_on_the_host(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    fake_gpu.plan["on_host"] = ["n"]
    x = np.array([[1, 2]], np.float32)
    with fake_gpu.open(_save_tiling(tmp_path)) as session:
        for times in (2, 2, 2, 5, 1, 5, 5):
            got = session.run({"x": x, "n": np.array([times])})["y"]
            np.testing.assert_array_equal(got, np.tile(x, (times, 1)))
        feed = {"x": x.copy(), "n": np.array([3])}
        binding = session.bind(feed)
        feed["x"][...] = 7
        np.testing.assert_array_equal(binding.run()["y"], np.full((3, 2), 7))
        feed["n"][...] = 4
        with pytest.raises(BackendError, match=r"'y' has shape \(4, 2\), bound was \(3, 2\)"):
            binding.run()
        with pytest.raises(BackendError, match=r"the values of \['n'\].*Use run_device"):
            session.bind_device(feed)
        on_device = session.run_device({"x": x, "n": np.array([2])})["y"]
        np.testing.assert_array_equal(on_device.numpy(), np.tile(x, (2, 1)))
        del on_device
    assert fake_gpu.cuda.calls["cudaStreamBeginCapture"] == 0


# Weights.


def test_weights_are_streamed_within_a_budget(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    fake_gpu.plan["streamable"] = True
    held: list[Any] = []
    for budget in (100, None):
        with fake_gpu.embedder(tmp_path, weight_streaming_bytes=budget) as session:
            assert session._engine is not None
            held.append(session._engine._engine.weight_streaming_budget_v2)
            assert_answers(session, 2)
    assert held[0] == 100
    assert held[1] > 100  # all of them, on the device
    assert [request.settings.weight_streaming for request in fake_gpu.built] == [True, False]


def test_a_budget_for_weights_that_cannot_be_streamed_is_refused(
    fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    with pytest.raises(BackendError, match=r"weight_streaming_bytes is 5, but .* without weight"):
        fake_gpu.embedder(tmp_path, weight_streaming_bytes=5)


def test_a_library_that_takes_no_budget_is_told(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    fake_gpu.library.version = "10.0.1"
    fake_gpu.plan |= {"streamable": True, "version": "10.0.1"}
    with pytest.raises(BackendError, match=r"Stream weights with TensorRT 10\.1 or newer"):
        fake_gpu.embedder(tmp_path, weight_streaming_bytes=100)
