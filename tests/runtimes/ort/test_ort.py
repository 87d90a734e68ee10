"""What is ONNX Runtime's own: settings, placement, errors, binding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as state
from tiny_graphs import feed_of, save, save_embedder, save_repeat, save_unary, tensor_info

from mmedge.errors import (
    BackendError,
    BackendUnavailableError,
    InputError,
    PlacementError,
    StorageError,
)
from mmedge.runtimes import SessionOptions, open_session
from mmedge.runtimes.base import BoundRun
from mmedge.runtimes.onnx_file import PAIRED_KEY
from mmedge.runtimes.ort import backend as ort
from mmedge.runtimes.ort import engine as ort_engine
from mmedge.runtimes.ort.backend import BACKEND
from mmedge.runtimes.ort.session import OrtSession
from mmedge.runtimes.processor import int8_saturates
from mmedge.runtimes.session import Placement
from mmedge.specs import Array

UPSTREAM = [
    found
    for found in vars(state).values()
    if isinstance(found, type) and issubclass(found, Exception)
]
MODEL = Path("models/tiny.onnx")


def _native_options(session: object) -> Any:
    assert isinstance(session, OrtSession)
    return session._engine.get_session_options()


# Settings


def test_defaults_take_every_processor_and_one_operator_at_a_time(tmp_path: Path) -> None:
    with open_session(save_embedder(tmp_path / "m.onnx")) as session:
        settings = _native_options(session)

    assert settings.intra_op_num_threads == len(os.sched_getaffinity(0))
    assert settings.inter_op_num_threads == 1
    assert settings.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    assert settings.enable_cpu_mem_arena
    assert settings.enable_mem_pattern
    assert settings.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert settings.get_session_config_entry("session.intra_op.allow_spinning") == "1"
    assert settings.get_session_config_entry("session.disable_prepacking") == "0"


def test_options_reach_the_engine(tmp_path: Path) -> None:
    options = SessionOptions(
        threads=3, spin=False, arena=False, prepack=False, graph_optimization="basic"
    )
    with open_session(save_embedder(tmp_path / "m.onnx"), options=options) as session:
        settings = _native_options(session)

    assert settings.intra_op_num_threads == 3
    assert not settings.enable_cpu_mem_arena
    assert not settings.enable_mem_pattern
    assert settings.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert settings.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert settings.get_session_config_entry("session.disable_prepacking") == "1"


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_below_one_are_refused(threads: int) -> None:
    with pytest.raises(InputError, match=f"threads: got {threads}"):
        SessionOptions(threads=threads)


def test_a_float16_graph_stays_at_the_extended_level_by_default(tmp_path: Path) -> None:
    model = save(
        tmp_path / "half.onnx",
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        [tensor_info("x", ["batch", 2], TensorProto.FLOAT16)],
        [tensor_info("y", ["batch", 2], TensorProto.FLOAT16)],
        {"W": np.eye(2, dtype=np.float16) * 2},
    )
    levels = onnxruntime.GraphOptimizationLevel
    x = np.ones((3, 2), np.float16)

    with open_session(model) as session:
        assert _native_options(session).graph_optimization_level == levels.ORT_ENABLE_EXTENDED
        np.testing.assert_array_equal(session.run({"x": x})["y"], x * 2)
        np.testing.assert_array_equal(session.bind({"x": x}).run()["y"], x * 2)
    with open_session(model, options=SessionOptions(graph_optimization="all")) as session:
        assert _native_options(session).graph_optimization_level == levels.ORT_ENABLE_ALL


def test_the_trace_is_complete_once_the_session_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "traces" / "deep"
    model = save_embedder(tmp_path / "m.onnx")

    with open_session(model, options=SessionOptions(profile_to=folder)) as session:
        session.run(feed_of(2))
        assert isinstance(session, OrtSession)
        still_running = session._engine  # as a call that has begun holds it

    assert still_running is not None
    (trace,) = folder.glob("onnxruntime*.json")
    nodes = {event["name"] for event in json.loads(trace.read_text()) if event["cat"] == "Node"}
    assert any("divide" in node for node in nodes)


def test_a_trace_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    model = save_embedder(tmp_path / "m.onnx")

    with pytest.raises(StorageError, match="file"):
        open_session(model, options=SessionOptions(profile_to=tmp_path / "file" / "traces"))


# Placement


@pytest.mark.skipif(
    not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"),
    reason="this onnxruntime does not report placement",
)
def test_placement_counts_the_nodes_of_each_provider(tmp_path: Path) -> None:
    with open_session(save_embedder(tmp_path / "m.onnx")) as session:
        placement = session.placement

    assert placement.backend == "onnxruntime"
    assert placement.device == "cpu"
    assert placement.engine == f"onnxruntime {onnxruntime.__version__}"
    assert list(placement.providers) == ["CPUExecutionProvider"]
    assert placement.providers["CPUExecutionProvider"] >= 4  # seven, some of them fused


def _cuda_native(*cpu_nodes: tuple[str, str], providers: tuple[str, ...] | None = None) -> Any:
    """Return the report of a CUDA session of two nodes and some CPU nodes."""
    parts = [
        SimpleNamespace(
            ep_name=provider,
            get_nodes=lambda nodes=nodes: [SimpleNamespace(name=n, op_type=op) for n, op in nodes],
        )
        for provider, nodes in (
            ("CUDAExecutionProvider", [("qkv", "MatMul"), ("norm", "LayerNormalization")]),
            ("CPUExecutionProvider", cpu_nodes),
        )
    ]
    return SimpleNamespace(
        get_providers=lambda: list(providers or ("CUDAExecutionProvider", "CPUExecutionProvider")),
        get_provider_graph_assignment_info=lambda: parts,
    )


def test_shape_arithmetic_beside_the_gpu_is_listed_as_exception() -> None:
    native = _cuda_native(("shape_of_x", "Shape"), ("rows", "Gather"))

    placement = ort_engine.read_placement(onnxruntime, native, "cuda:1", MODEL)

    assert placement.device == "cuda:1"
    assert placement.providers == {"CUDAExecutionProvider": 2, "CPUExecutionProvider": 2}
    assert placement.exceptions == {"shape_of_x": "cpu", "rows": "cpu"}


@pytest.mark.parametrize("op", ["MatMul", "Conv", "Attention", "Softmax", "MatMulInteger"])
def test_compute_beside_the_gpu_is_a_placement_error(op: str) -> None:
    native = _cuda_native(("shape_of_x", "Shape"), ("strayed", op))

    with pytest.raises(PlacementError, match=f"1 of 4 nodes.*'cuda'.*'strayed' .{op}. on CPU"):
        ort_engine.read_placement(onnxruntime, native, "cuda", MODEL)


def test_a_node_on_another_accelerator_is_a_placement_error() -> None:
    with pytest.raises(PlacementError, match=r"4 nodes.*'qkv'.*CUDA"):
        ort_engine.read_placement(
            onnxruntime, _cuda_native(("a", "Shape"), ("b", "Add")), "cpu", MODEL
        )


def test_a_provider_that_the_engine_dropped_is_unavailable() -> None:
    native = _cuda_native(providers=("CPUExecutionProvider",))

    with pytest.raises(BackendUnavailableError, match=r"tiny\.onnx.*could not start its CUDA"):
        ort_engine.read_placement(onnxruntime, native, "cuda", MODEL)


def test_an_engine_without_placement_gives_no_counts() -> None:
    native = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    placement = ort_engine.read_placement(
        SimpleNamespace(__version__="1.20.0"),  # type: ignore[arg-type]
        native,
        "cpu",
        MODEL,
    )

    assert placement == Placement("onnxruntime", "cpu", "onnxruntime 1.20.0", {}, {})


def _gpu_build(monkeypatch: pytest.MonkeyPatch, gpus: int) -> Any:
    for module in (ort, ort_engine):
        monkeypatch.setattr(module, "cuda_device_count", lambda: gpus)
    engine = SimpleNamespace(
        __version__="1.32.0",
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        preload_dlls=lambda: print("Failed to load libcudnn"),  # noqa: T201
    )
    monkeypatch.setattr(ort, "load_engine", lambda: engine)
    return engine


def test_devices_of_a_gpu_build(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = _gpu_build(monkeypatch, gpus=2)

    assert BACKEND.available_devices() == ("cuda", "cuda:1", "cpu")
    assert ort_engine.providers_for(engine, "cuda:1") == [
        ("CUDAExecutionProvider", {"device_id": "1"}),
        ("CPUExecutionProvider", {}),
    ]
    assert capsys.readouterr().out == ""
    with pytest.raises(BackendUnavailableError, match=r"'cuda:2'.*sees 2 GPU"):
        ort_engine.providers_for(engine, "cuda:2")


def test_a_gpu_build_without_a_gpu_has_the_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _gpu_build(monkeypatch, gpus=0)

    assert BACKEND.available_devices() == ("cpu",)
    assert ort_engine.providers_for(engine, "cpu") == [("CPUExecutionProvider", {})]
    with pytest.raises(BackendUnavailableError, match=r"'cuda'.*sees 0 GPU"):
        ort_engine.providers_for(engine, "cuda")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this is a GPU build"
)
@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (1, r"'cuda': the installed .* built without CUDA.*mmedge\[gpu\]"),
        (0, r"'cuda': there is no NVIDIA GPU here.*built without CUDA.*device 'cpu'"),
    ],
)
def test_cuda_on_a_cpu_build_names_the_missing_package_or_gpu(
    gpus: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_engine, "cuda_device_count", lambda: gpus)
    model = save_embedder(tmp_path / "m.onnx")

    with pytest.raises(BackendUnavailableError, match=message):
        open_session(model, options=SessionOptions(device="cuda"))


def test_without_onnxruntime_nothing_is_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ort_engine.load_engine.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    assert BACKEND.available_devices() == ()
    with pytest.raises(BackendUnavailableError, match=r"pip install \"mmedge\[cpu\]\""):
        open_session(save_embedder(tmp_path / "m.onnx"))


# Errors


def test_every_upstream_exception_is_caught() -> None:
    assert len(UPSTREAM) >= 10
    assert set(UPSTREAM) <= set(ort_engine.engine_exceptions())


class _FailingNative:
    """An engine whose every run raises."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="x", type="tensor(float)", shape=["batch"])]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="y", type="tensor(float)", shape=["batch"])]

    def run(self, *_: object) -> None:
        raise self._error

    def io_binding(self) -> Any:
        return SimpleNamespace(bind_cpu_input=lambda *_: None, bind_output=lambda *_: None)

    def run_with_iobinding(self, _: object) -> None:
        raise self._error


@pytest.mark.parametrize("upstream", [*UPSTREAM, RuntimeError, ValueError, MemoryError])
def test_every_upstream_exception_is_mapped(upstream: type[Exception]) -> None:
    placement = Placement("onnxruntime", "cpu", "onnxruntime 1.32.0")
    session = OrtSession(_FailingNative(upstream("the reason")), MODEL, placement)
    feed = {"x": np.ones(2, np.float32)}

    for use in (lambda: session.run(feed), session.bind(feed).run):
        with pytest.raises(BackendError, match=r"models/tiny\.onnx: .*the reason") as caught:
            use()
        assert isinstance(caught.value.__cause__, upstream)


def _unknown_domain(path: Path) -> Path:
    model = onnx.load(save_unary(path, "Teleport"))
    model.graph.node[0].domain = "star.fleet"
    model.opset_import.append(helper.make_opsetid("star.fleet", 1))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (partial(save_unary, op="Teleport"), "an operator that this build lacks.*Teleport"),
        (_unknown_domain, r"an operator that this build lacks.*star\.fleet:Teleport"),
        (partial(save_unary, op="Identity", opset=99), "written for a newer ONNX.*Opset 99"),
        (
            partial(save_unary, op="Identity", kind=TensorProto.STRING),
            "'x' has ONNX element type 8.*Convert",
        ),
    ],
)
def test_a_graph_that_the_engine_refuses_gives_the_reason(
    write: Callable[[Path], Path],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = write(tmp_path / "m.onnx")

    with pytest.raises(BackendError, match=message) as caught:
        open_session(model)
    assert str(model) in str(caught.value)
    assert "onnxruntime_src" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_out_of_memory_is_reported_and_the_session_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = np.ones(1, np.float32)
    with open_session(save_repeat(tmp_path / "m.onnx")) as session:
        with pytest.raises(BackendError, match=r"m\.onnx: the run failed: out of memory"):
            session.run({"x": one, "count": np.array([10**14])})
        assert session.run({"x": one, "count": np.array([3])})["y"].shape == (3,)
    assert capfd.readouterr() == ("", "")


def test_a_new_process_prints_nothing(tmp_path: Path) -> None:
    model = save_embedder(tmp_path / "m.onnx")
    code = f"from mmedge.runtimes import open_session; open_session({str(model)!r}).close()"

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout + done.stderr == ""


def test_importing_the_backend_loads_no_engine() -> None:
    code = (
        "import sys, mmedge.runtimes, mmedge.runtimes.ort.backend, mmedge.runtimes.fake;"
        "print({'onnxruntime', 'onnx', 'torch', 'google.protobuf'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "set()"


# Specs and binding


@pytest.mark.parametrize(
    "bad", [np.zeros(4, np.float32)[::2], np.zeros(9, np.uint8)[1:].view("f4")]
)
def test_the_engine_gets_contiguous_aligned_memory_only(bad: Array) -> None:
    got: list[Array] = []

    class Recording(_FailingNative):
        def run(self, *arguments: Any) -> None:
            got.append(arguments[1]["x"])
            super().run()

    session = OrtSession(
        Recording(ValueError("enough")), MODEL, Placement("onnxruntime", "cpu", "")
    )
    good = np.zeros(2, np.float32)
    for x in (bad, good):
        with pytest.raises(BackendError, match="enough"):
            session.run({"x": x})

    assert got[0].flags.c_contiguous
    assert got[0].flags.aligned
    assert got[1] is good  # and what is fit is handed over as it is


def test_unnamed_axes_get_a_name_of_their_own(tmp_path: Path) -> None:
    model = save_unary(tmp_path / "m.onnx", "Relu", shape=[None, None])
    with open_session(model) as session:
        assert session.inputs[0].shape == ("x.0", "x.1")
        assert session.run({"x": np.ones((2, 5), np.float32)})["y"].shape == (2, 5)


@pytest.mark.parametrize(
    "dtype",
    ["float32", "float16", "float64", "bool", "int8", "int32", "int64", "uint8", "uint16"],
)
def test_every_dtype_runs_and_binds(dtype: str, tmp_path: Path) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = save_unary(tmp_path / "m.onnx", "Identity", kind)
    x = np.array([0, 1, 1, 0], dtype)
    with open_session(model) as session:
        assert session.inputs[0].dtype == x.dtype
        np.testing.assert_array_equal(session.run({"x": x})["y"], x)
        np.testing.assert_array_equal(session.bind({"x": x}).run()["y"], x)


def test_an_output_axis_that_no_input_names_is_found_by_running(tmp_path: Path) -> None:
    feed = {"x": np.full(1, 7, np.float32), "count": np.array([3])}
    with open_session(save_repeat(tmp_path / "m.onnx")) as session:
        binding = session.bind(feed)

        assert binding.outputs["y"].shape == (3,)
        np.testing.assert_array_equal(binding.run()["y"], [7, 7, 7])
        feed["count"][0] = 4  # the buffers were made for 3
        with pytest.raises(BackendError, match=r"m\.onnx: the run failed"):
            binding.run()


def test_closing_frees_the_engine_of_bindings_too(tmp_path: Path) -> None:
    session = open_session(save_embedder(tmp_path / "m.onnx"))
    binding = session.bind(feed_of(2))
    assert isinstance(binding, BoundRun)
    kept = {name: array.copy() for name, array in binding.run().items()}

    session.close()

    assert binding._call is None
    for name, array in binding.outputs.items():  # the caller's arrays outlive the engine
        np.testing.assert_array_equal(array, kept[name])


@pytest.mark.parametrize(("device", "expected"), [("cpu", 1), ("cuda", 3)])
def test_on_a_gpu_every_run_sends_the_inputs_again(device: str, expected: int) -> None:
    sent: list[Array] = []
    bound = SimpleNamespace(
        bind_cpu_input=lambda _, array: sent.append(array.copy()), bind_output=lambda *_: None
    )
    arg = SimpleNamespace(name="x", type="tensor(float)", shape=[2])
    native = SimpleNamespace(
        io_binding=lambda: bound,
        run_with_iobinding=lambda _: None,
        get_inputs=lambda: [arg],
        get_outputs=list,
    )
    feed = {"x": np.zeros(2, np.float32)}
    placement = Placement("onnxruntime", device, "onnxruntime")
    binding = OrtSession(native, MODEL, placement).bind(feed)

    for value in (1.0, 2.0):
        feed["x"][:] = value
        binding.run()

    assert len(sent) == expected
    if device == "cuda":
        assert [array[0] for array in sent] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("machine", "flags", "saturates"),
    [
        ("x86_64", "fpu avx2 avx512f avx512_vnni", False),
        ("AMD64", "fpu avx2 avx_vnni", False),
        ("x86_64", "fpu avx2 avx512f", True),
        ("aarch64", "", False),
    ],
)
def test_int8_is_exact_where_the_fast_kernel_saturates(
    machine: str, flags: str, saturates: bool, tmp_path: Path
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags\t\t: {flags}\nbugs : none\n")
    assert int8_saturates(machine, cpuinfo) is saturates


def test_an_unknown_processor_is_assumed_to_saturate(tmp_path: Path) -> None:
    assert int8_saturates("x86_64", tmp_path / "missing") is True


@pytest.mark.parametrize(
    ("saturates", "paired", "asked"),
    [(True, False, "1"), (True, True, "0"), (False, False, "0"), (False, True, "0")],
)
def test_paired_weights_need_no_slower_sums(
    saturates: bool, paired: bool, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_embedder(tmp_path / "m.onnx")
    if paired:
        proto = onnx.load(model)
        helper.set_model_props(proto, {PAIRED_KEY: "true"})
        onnx.save(proto, model)
    made: list[Any] = []

    def settings(*arguments: Any, **named: Any) -> Any:
        made.append(ort_engine.session_settings(*arguments, **named))
        return made[-1]

    monkeypatch.setattr(ort, "int8_saturates", lambda: saturates)
    monkeypatch.setattr(ort, "session_settings", settings)
    open_session(model).close()
    (only,) = made
    assert only.get_session_config_entry("session.x64quantprecision") == asked


@pytest.mark.skipif(not int8_saturates(), reason="needs an x86 processor without VNNI: exact sums")
def test_a_weight_of_two_products_runs_with_a_warning_where_sums_cannot_be_exact(
    tmp_path: Path,
) -> None:
    model = save(
        tmp_path / "m.onnx",
        [
            helper.make_node("MatMulInteger", ["x", "w"], ["a"]),
            helper.make_node("MatMulInteger", ["x2", "w"], ["b"]),
            helper.make_node("Add", ["a", "b"], ["y"]),
        ],
        [tensor_info(name, ["n", 4], TensorProto.UINT8) for name in ("x", "x2")],
        [tensor_info("y", ["n", 4], TensorProto.INT32)],
        {"w": np.full((4, 4), 100, np.int8)},
    )
    with pytest.warns(RuntimeWarning, match=r"two products share a weight.*int8-dynamic-paired"):
        session = open_session(model)
    x = np.ones((2, 4), np.uint8)  # small enough for any sum
    np.testing.assert_array_equal(session.run({"x": x, "x2": x})["y"], np.full((2, 4), 800))
    session.close()


def test_signed_int8_runs_with_exact_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime 1.32 fails on a lookup in a table with large values, on a CPU without VNNI."""
    monkeypatch.setattr(ort, "int8_saturates", lambda: True)
    quantized = np.array([[-128, 127], [1, 2], [100, -100]], np.int8)
    scales = np.array([1, 2, 3], np.float32)
    model = save(
        tmp_path / "m.onnx",
        [
            helper.make_node("DequantizeLinear", ["quantized", "scales"], ["table"], axis=0),
            helper.make_node("Gather", ["table", "x"], ["y"], axis=0),
        ],
        [tensor_info("x", ["n"], TensorProto.INT64)],
        [tensor_info("y", ["n", 2])],
        {"quantized": quantized, "scales": scales},
    )
    with open_session(model) as session:
        found = session.run({"x": np.array([2, 0])})["y"]
    np.testing.assert_array_equal(found, [[300, -300], [-128, 127]])


@pytest.mark.parametrize(("dtype", "entry"), [(ml_dtypes.float8_e4m3fn, "1"), (np.int8, None)])
def test_fp8_is_no_business_of_the_passes_for_int8(
    dtype: Any, entry: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime up to 1.31 makes int8 operators of Q/DQ in fp8, and refuses them."""
    made: list[Any] = []

    def noted(*how: Any, **more: Any) -> Any:
        made.append(ort_engine.session_settings(*how, **more))
        return made[-1]

    monkeypatch.setattr(ort, "session_settings", noted)
    monkeypatch.setattr(ort, "int8_saturates", lambda: False)
    model = save(
        tmp_path / "m.onnx",
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dequantized"]),
            helper.make_node("MatMul", ["dequantized", "weight"], ["y"]),
        ],
        [tensor_info("x", ["n", 2])],
        [tensor_info("y", ["n", 2])],
        {
            "scale": np.array(1, np.float32),
            "zero": np.zeros((), dtype),
            "weight": np.eye(2, dtype=np.float32),
        },
    )
    x = np.array([[1, -2]], np.float32)
    with open_session(model) as session:
        np.testing.assert_array_equal(session.run({"x": x})["y"], x)
    (settings,) = made
    try:
        found = settings.get_session_config_entry("session.disable_quant_qdq")
    except RuntimeError:  # there is no such entry
        found = None
    assert found == entry
