"""What is OpenVINO's own: settings, precision, options it has not, telemetry, errors, dtypes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
from onnx import helper
from tiny_graphs import (
    BIAS,
    INPUTS,
    OUTPUTS,
    WEIGHT,
    WIDTH,
    embed,
    feed_of,
    save,
    save_embedder,
    save_repeat,
    save_unary,
    tensor_info,
)

from mmedge.errors import BackendError, BackendUnavailableError, InputError, PlacementError
from mmedge.runtimes import SessionOptions, base, open_session
from mmedge.runtimes import openvino as ours
from mmedge.runtimes.onnx_file import read_onnx_file
from mmedge.runtimes.openvino import OpenVinoSession
from mmedge.runtimes.session import Placement
from mmedge.specs import Array

MODEL = Path("models/tiny.onnx")


def opened(model: Path, **options: Any) -> OpenVinoSession:
    session = open_session(model, backend_name="openvino", options=SessionOptions(**options))
    assert isinstance(session, OpenVinoSession)
    return session


# Settings


def test_the_engine_is_set_to_low_latency_in_the_precision_of_the_graph(tmp_path: Path) -> None:
    with opened(save_embedder(tmp_path / "m.onnx")) as session:
        asked = session._engine.get_property
        assert asked("PERFORMANCE_HINT") == "LATENCY"
        assert asked("INFERENCE_PRECISION_HINT") == openvino.Type.f32
        assert asked("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
        assert asked("KV_CACHE_PRECISION") == openvino.Type.f32
        assert asked("ENABLE_CPU_PINNING") is False
        assert asked("INFERENCE_NUM_THREADS") == len(os.sched_getaffinity(0))


def test_threads_reach_the_engine(tmp_path: Path) -> None:
    with opened(save_embedder(tmp_path / "m.onnx"), threads=1) as session:
        assert session._engine.get_property("INFERENCE_NUM_THREADS") == 1


@pytest.mark.parametrize(
    "options",
    [
        {"arena": False},
        {"prepack": False},
        {"graph_optimization": "basic"},
        {"profile_to": Path("traces")},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_option_that_it_has_not_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    model = save_embedder(tmp_path / "m.onnx")
    with pytest.raises(BackendUnavailableError, match=f"no option {next(iter(options))}: got"):
        opened(model, **options)
    assert not Path("traces").exists()


def test_idle_workers_sleep_with_any_spin(tmp_path: Path) -> None:
    with opened(save_embedder(tmp_path / "m.onnx"), spin=False) as session:
        np.testing.assert_allclose(
            session.run(feed_of(2))["y"], embed(feed_of(2))["y"], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("device", ["cuda", "gpu", "NPU", "AUTO"])
def test_there_is_the_cpu_and_no_other_device(device: str, tmp_path: Path) -> None:
    assert ours.BACKEND.available_devices() == ("cpu",)
    assert ours.BACKEND.layouts("cpu") == ("portable",)
    assert ours.BACKEND.layouts(device) == ()
    with pytest.raises(BackendUnavailableError, match=f"no device '{device}': expected 'cpu'"):
        opened(save_embedder(tmp_path / "m.onnx"), device=device)


def test_placement_names_engine_and_version(tmp_path: Path) -> None:
    with opened(save_embedder(tmp_path / "m.onnx")) as session:
        assert session.placement == Placement("openvino", "cpu", f"openvino {version()}")


def version() -> str:
    return str(openvino.__version__).split("-", maxsplit=1)[0]


def test_another_device_in_the_end_is_a_placement_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = SimpleNamespace(get_property=lambda _: ["GPU.0"])
    core = SimpleNamespace(read_model=str, compile_model=lambda *_: compiled)
    monkeypatch.setattr(ours, "_core", lambda: core)
    with pytest.raises(PlacementError, match=r"on \['GPU.0'\], expected \['CPU'\]"):
        opened(save_embedder(tmp_path / "m.onnx"))


# Precision


def save_qdq(path: Path) -> Path:
    """Write y = x @ W in QDQ: uint8 activations, int8 weights a channel.

    Values of 7 bits: OpenVINO's sums saturate on x86 without VNNI, but never with these.
    """
    scale = (np.abs(WEIGHT).max(axis=0) / 64).astype(np.float32)
    return save(
        path,
        [
            helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "sx", "zx"], ["xd"]),
            helper.make_node("DequantizeLinear", ["W", "sw", "zw"], ["wd"], axis=1),
            helper.make_node("MatMul", ["xd", "wd"], ["y"], name="product"),
        ],
        [tensor_info("x", ["batch", WIDTH])],
        [tensor_info("y", ["batch", WEIGHT.shape[1]])],
        {
            "W": np.round(WEIGHT / scale).astype(np.int8),
            "sw": scale,
            "zw": np.zeros(WEIGHT.shape[1], np.int8),
            "sx": np.array(0.03, np.float32),
            "zx": np.array(128, np.uint8),
        },
    )


def product_precisions(session: OpenVinoSession) -> Counter[str]:
    """Return in which precision the engine runs the matrix products, and how many of them."""
    kinds: Counter[str] = Counter()
    for node in session._engine.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) in ("FullyConnected", "MatMul"):
            kinds[info["runtimePrecision"].astype(str)] += 1
    return kinds


def test_float32_products_stay_in_float32(tmp_path: Path) -> None:
    with opened(save_embedder(tmp_path / "m.onnx")) as session:
        assert product_precisions(session) == {"f32": 1}


def test_qdq_products_run_in_int8(tmp_path: Path) -> None:
    x = feed_of(5)["x"]
    with (
        opened(save_qdq(tmp_path / "m.onnx")) as session,
        open_session(tmp_path / "m.onnx") as reference,
    ):
        assert set(product_precisions(session)) <= {"u8", "i8"}
        assert product_precisions(session).total() == 1
        np.testing.assert_allclose(
            session.run({"x": x})["y"], reference.run({"x": x})["y"], atol=1e-4
        )


# Telemetry, output, imports


def in_a_new_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_a_new_process_prints_nothing_and_sends_nothing(tmp_path: Path) -> None:
    model = save_embedder(tmp_path / "m.onnx")
    code = (
        "import json, sys\n"
        "import mmedge.runtimes, mmedge.runtimes.openvino\n"
        "before = 'openvino' in sys.modules\n"
        f"mmedge.runtimes.open_session({str(model)!r}, backend_name='openvino').close()\n"
        "from openvino.tools.ovc import telemetry_utils\n"
        "loaded = [m for m in sys.modules if m.startswith('openvino_telemetry')]\n"
        "stub = telemetry_utils.tm.__name__\n"
        "print(json.dumps([before, 'openvino' in sys.modules, loaded, stub]))"
    )
    before, after, telemetry, stand_in = json.loads(in_a_new_process(code))
    assert (before, after) == (False, True)
    assert telemetry == []
    assert stand_in == "openvino.tools.ovc.telemetry_stub"


def test_the_version_is_read_without_loading_the_engine() -> None:
    code = (
        "import sys; from mmedge.runtimes import openvino as ours;"
        "print(ours.BACKEND.engine_version(), 'openvino' in sys.modules)"
    )
    assert in_a_new_process(code) == f"{version()} False"


def test_without_openvino_nothing_is_available(
    tmp_path: Path, several_backends: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)

    assert ours.BACKEND.engine_version() is None
    assert ours.BACKEND.available_devices() == ()
    with pytest.raises(BackendUnavailableError, match=r"Install mmedge\[openvino\]"):
        opened(save_embedder(tmp_path / "m.onnx"))


@pytest.mark.parametrize("found", ["2024.6.0", "2025.3.0", "2025.0.0-17942-1f68be9f594"])
def test_a_version_that_overwrites_inputs_is_refused(
    found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "__version__", found)
    with pytest.raises(BackendUnavailableError, match=r"is too old: expected 2025\.4 or newer"):
        opened(save_embedder(tmp_path / "m.onnx"))


# Specs and memory


@pytest.mark.parametrize(
    "dtype",
    ["float16", "float32", "float64", "bool"]
    + [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)],
)
def test_every_dtype_goes_in_and_comes_out(dtype: str, tmp_path: Path) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = save_unary(tmp_path / "m.onnx", "Identity", kind, ["rows", 2])
    x = np.array([[0, 1], [1, 0], [1, 1]], dtype)
    with opened(model) as session:
        assert session.inputs[0].dtype == dtype
        for got in (session.run({"x": x})["y"], session.bind({"x": x}).run()["y"]):
            assert got.dtype == dtype
            np.testing.assert_array_equal(got, x)


def test_an_output_axis_that_no_input_names(tmp_path: Path) -> None:
    with opened(save_repeat(tmp_path / "m.onnx")) as session:
        assert session.outputs[0].shape == ("y.0",)
        for count in (3, 7, 2):
            feed = {"x": np.full(1, count, np.float32), "count": np.array([count])}
            np.testing.assert_array_equal(session.run(feed)["y"], np.full(count, count))
            np.testing.assert_array_equal(session.bind(feed).run()["y"], np.full(count, count))


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 10**14])
def test_integers_that_the_engine_would_cut_are_refused(value: int, tmp_path: Path) -> None:
    feed = {"x": np.ones(1, np.float32), "count": np.array([2])}
    with opened(save_repeat(tmp_path / "m.onnx")) as session:
        binding = session.bind(feed)
        feed["count"][:] = value
        for use in (lambda: session.run(feed), binding.run):
            with pytest.raises(InputError, match=rf"'count': got values .*{value}.*32-bit"):
                use()


def test_read_only_inputs_are_read_in_place(tmp_path: Path) -> None:
    feed = feed_of(3)
    for array in feed.values():
        array.flags.writeable = False
    with opened(save_embedder(tmp_path / "m.onnx")) as session:
        binding = session.bind(feed)
        np.testing.assert_allclose(binding.run()["y"], embed(feed)["y"], rtol=1e-5, atol=1e-6)
        for array in feed.values():
            array.flags.writeable = True
        feed["x"][...] = feed_of(3, seed=1)["x"]
        np.testing.assert_allclose(binding.run()["y"], embed(feed)["y"], rtol=1e-5, atol=1e-6)


def test_a_run_that_began_before_closing_returns_its_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(save_embedder(tmp_path / "m.onnx"))
    feed = feed_of(2)
    check = base.check_feed

    def close_meanwhile(*arguments: Any) -> Any:
        session.close()
        return check(*arguments)

    monkeypatch.setattr(base, "check_feed", close_meanwhile)
    np.testing.assert_allclose(session.run(feed)["y"], embed(feed)["y"], rtol=1e-5, atol=1e-6)
    with pytest.raises(BackendError, match="closed"):
        session.run(feed)
    assert session._idle == []


# Errors


def test_an_unknown_operator_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = save_unary(tmp_path / "m.onnx", "Teleport")
    with pytest.raises(BackendError, match=r"operator that OpenVINO lacks.*Teleport") as caught:
        opened(model)
    assert str(model) in str(caught.value)
    assert ".cpp" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_damage_that_leaves_the_specs_is_an_error(tmp_path: Path) -> None:
    model = save_embedder(tmp_path / "m.onnx")
    damaged = onnx.load(model)
    damaged.graph.node[0].input[0] = "nowhere"
    model.write_bytes(damaged.SerializeToString())
    assert read_onnx_file(model).inputs == INPUTS
    with pytest.raises(BackendError, match=r"m\.onnx"):
        opened(model)


class FailingRequest:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def set_input_tensor(self, *_: object) -> None:
        pass

    set_output_tensor = set_input_tensor

    def infer(self, **_: object) -> None:
        raise self._error


class FailingCompiled:
    """A compiled model whose every run raises."""

    def __init__(self, error: Exception, outputs: int = 2) -> None:
        self._error = error
        self.inputs = [port("x", np.float32), port("gate", np.int64)]
        self.outputs = [port("y", np.float32), port("norm", np.float32)][:outputs]

    def create_infer_request(self) -> FailingRequest:
        return FailingRequest(self._error)


def port(name: str, dtype: type[np.generic]) -> Any:
    element = SimpleNamespace(to_dtype=lambda: np.dtype(dtype))
    return SimpleNamespace(get_names=lambda: {name}, get_element_type=lambda: element)


def failing_session(error: Exception, **arguments: int) -> OpenVinoSession:
    compiled = FailingCompiled(error, **arguments)
    glance: Any = SimpleNamespace(inputs=INPUTS, outputs=OUTPUTS)
    placement = Placement("openvino", "cpu", "openvino 0")
    return OpenVinoSession(openvino, compiled, MODEL, glance, placement)


UPSTREAM = [
    found
    for place in (openvino.exceptions, openvino.frontend)
    for found in vars(place).values()
    if isinstance(found, type) and issubclass(found, Exception)
]


@pytest.mark.parametrize("upstream", [*UPSTREAM, RuntimeError, ValueError, TypeError, MemoryError])
def test_every_upstream_exception_is_mapped(upstream: type[Exception]) -> None:
    session = failing_session(upstream("the reason"))
    for use in (lambda: session.run(feed_of(1)), session.bind(feed_of(1)).run):
        with pytest.raises(BackendError, match=r"models/tiny\.onnx: .*the reason") as caught:
            use()
        assert isinstance(caught.value.__cause__, upstream)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("std::bad_alloc"), RuntimeError("Failed to allocate 8")]
)
def test_out_of_memory_is_reported(error: Exception) -> None:
    with pytest.raises(BackendError, match=r"out of memory\. Use a smaller batch"):
        failing_session(error).run(feed_of(1))


def test_outputs_that_the_engine_changed_are_refused() -> None:
    with pytest.raises(BackendError, match=r"changed its inputs or outputs.*'onnxruntime'"):
        failing_session(RuntimeError(), outputs=1)


def test_the_embedder_equals_its_numpy_version(tmp_path: Path) -> None:
    feed: dict[str, Array] = {"x": np.zeros((1, WIDTH), np.float32), "gate": np.array([2])}
    with opened(save_embedder(tmp_path / "m.onnx")) as session:
        norm = session.run(feed)["norm"]
    np.testing.assert_allclose(norm, [[np.linalg.norm(2 * BIAS)]], rtol=1e-6)
