"""Opening a graph in TensorRT: what is missing, which engine is taken, when one is built."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_gpu import AXES, FakeGpu
from onnx import TensorProto, helper
from tiny_graphs import INPUTS, embed, feed_of, save, save_embedder, tensor_info

import mmedge
from mmedge.bundle import Bundle
from mmedge.errors import BackendUnavailableError, EngineMismatchError, InputError
from mmedge.models import verify_bundle
from mmedge.runtimes import SessionOptions, backend, open_session
from mmedge.runtimes.engines.profiles import shape_profiles
from mmedge.runtimes.engines.spec import BuildSettings
from mmedge.runtimes.engines.store import EngineCache
from mmedge.runtimes.trt import flavours, opening
from mmedge.runtimes.trt.opening import needed_engine
from mmedge.runtimes.trt.refitting import put_weights
from mmedge.specs import Axis

CUDA = SessionOptions(device="cuda", axes=AXES)
TRT = backend("tensorrt")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_embedder(tmp_path / "model.onnx")


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_without_tensorrt_the_wheel_is_named(
    flavour: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flavours, "_installed_module", lambda _: None)
    with pytest.raises(BackendUnavailableError, match=r"not installed.*pip install"):
        open_session(model, backend_name=flavour, options=CUDA)
    assert backend(flavour).engine_version() is None
    assert backend(flavour).available_devices() == ()
    assert not backend(flavour).is_prepared(model, CUDA)


def test_without_cudas_bindings_the_wheel_is_named(
    model: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(BackendUnavailableError, match=r"Install mmedge\[cuda\].*JetPack 6"):
        fake_gpu.open(model)
    assert TRT.available_devices() == ()


@pytest.mark.parametrize(
    ("driver", "devices", "device", "reason"),
    [
        (0, 1, "cuda", "no NVIDIA driver.*JetPack.*--gpus all"),
        (11080, 1, "cuda", r"too old: it supports CUDA 11\.8.*Update the driver\.$"),
        (
            12040,
            1,
            "cuda",
            r'too old: it supports CUDA 12\.4.*13\.0.*580.*cuda-bindings>=12\.9,<13"',
        ),
        (13000, 0, "cuda", "cudaErrorNoDevice.*nvidia-smi"),
        (13000, 3, "cuda:3", r"'cuda:3'.* sees 3 GPU\(s\)"),
        (13000, 1, "cpu", "'cpu': engines run on GPUs"),
        (13000, 1, "cuda:x", "'cuda:x': engines run on GPUs"),
    ],
)
def test_a_driver_or_gpu_that_is_missing_is_named(
    driver: int, devices: int, device: str, reason: str, model: Path, fake_gpu: FakeGpu
) -> None:
    fake_gpu.cuda.driver, fake_gpu.cuda.devices = driver, devices
    with pytest.raises(BackendUnavailableError, match=reason):
        fake_gpu.open(model, device=device)
    known = ("cuda", "cuda:1", "cuda:2")[:devices] if driver == 13000 else ()
    assert TRT.available_devices() == known
    assert not TRT.is_prepared(model, replace(CUDA, device=device))


def test_options_that_are_not_to_be_had_are_refused(model: Path, fake_gpu: FakeGpu) -> None:
    with pytest.raises(BackendUnavailableError, match="no option prepack: got False"):
        TRT.open_session(model, replace(CUDA, prepack=False))
    with pytest.raises(InputError, match="'batch'"):
        TRT.open_session(model, replace(CUDA, axes=None))


def test_an_engine_is_built_once(
    model: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def build(path: Path, request: Any, *, progress: Any, **_: object) -> Any:
        for step in range(3):
            progress("tactics", step, 3)
        return fake_gpu.build(path, request)

    monkeypatch.setattr(opening, "build_engine", build)
    caplog.set_level(logging.INFO, "mmedge.engines")
    reports: list[tuple[str, int, int]] = []
    assert not TRT.is_prepared(model, CUDA)
    TRT.prepare(model, CUDA, lambda *step: reports.append(step))
    assert reports == [("tactics", step, 3) for step in range(3)]
    lines = [line for line in caplog.messages if "building for TensorRT: tactics" in line]
    assert lines == [f"{model}: building for TensorRT: tactics, 0 of 3"]  # then every 10 s
    assert TRT.is_prepared(model, CUDA)
    with fake_gpu.open(model) as session:
        assert session.placement.engine == "tensorrt 10.3.0"
        assert session.placement.providers == {"fp16": 1, "fp32": 2}
    (request,) = fake_gpu.built
    assert request.profiles[0].ranges["x"].max == (8, 8)
    assert not TRT.is_prepared(model, replace(CUDA, axes={"batch": Axis(1, 1, 9)}))


def store(gpu: FakeGpu, model: Path, *axes: Any, **settings: Any) -> None:
    """Put an engine with a profile for each set of bounds into the cache, as `mmedge build`."""
    needed = needed_engine("tensorrt", model, CUDA)
    request = replace(
        needed.request, profiles=shape_profiles(INPUTS, axes), settings=BuildSettings(**settings)
    )
    EngineCache().store(replace(needed.key, request=request), gpu.build(model, request))


@pytest.mark.parametrize(
    ("bounds", "settings", "serves"),
    [
        ((1, 4, 64), {"workspace_bytes": 1 << 20}, True),
        ((1, 2, 8), {"stripped": True}, True),
        ((1, 2, 7), {}, False),
        ((2, 2, 8), {}, False),
        ((1, 2, 8), {"refittable": True}, False),
        ((1, 2, 8), {"weight_streaming": True}, False),
    ],
)
def test_an_engine_that_does_as_much_serves_as_well(
    bounds: tuple[int, int, int],
    settings: dict[str, Any],
    serves: bool,
    model: Path,
    fake_gpu: FakeGpu,
) -> None:
    store(fake_gpu, model, {"batch": Axis(*bounds)}, **settings)
    assert TRT.is_prepared(model, CUDA) == serves


def test_the_first_profile_that_takes_the_shapes_is_taken(model: Path, fake_gpu: FakeGpu) -> None:
    bounds = ((1, 1, 1), (2, 4, 8), (1, 8, 32))
    store(fake_gpu, model, *({"batch": Axis(*each)} for each in bounds))
    with fake_gpu.open(model, graphs=4) as session:
        for batch, profile in ((1, 0), (2, 1), (8, 1), (9, 2), (1, 0)):
            feed = feed_of(batch)
            assert session.run(feed)["y"] == pytest.approx(embed(feed)["y"], abs=1e-5)
            used = [c.profile for c in fake_gpu.library.contexts if c.shapes["x"][0] == batch]
            assert used == [profile]
        with pytest.raises(InputError, match=r"profile 0: 'batch' 1 to 1; .*profile 2: 'batch' 1"):
            session.run(feed_of(40))


@pytest.mark.parametrize(
    ("refitter", "parses", "message"),
    [
        ({}, True, ""),
        (None, True, "the engine is not refittable"),
        ({}, False, "node 'n' (Gemm): too small"),
        ({"missing": ["a", "b", "c", "d"]}, True, "lacks the weights a, b, c and 1 more"),
        ({"refits": False}, True, "refitting failed"),
    ],
)
def test_weights_are_put_in_from_the_onnx_file(
    refitter: dict[str, Any] | None, parses: bool, message: str
) -> None:
    def new_refitter(*_: object) -> Any:
        if refitter is None:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return SimpleNamespace(
            get_missing_weights=lambda: refitter.get("missing", []),
            refit_cuda_engine=lambda: refitter.get("refits", True),
        )

    error = SimpleNamespace(
        node_name=lambda: "n", node_operator=lambda: "Gemm", desc=lambda: "too small"
    )
    parser = SimpleNamespace(
        refit_from_file=lambda _: parses, num_errors=1, get_error=lambda _: error
    )
    module = SimpleNamespace(Refitter=new_refitter, OnnxParserRefitter=lambda *_: parser)
    found = put_weights(module, None, None, Path("m.onnx"))
    assert message in found
    assert bool(found) == bool(message)


def test_a_library_that_does_not_start(model: Path, fake_gpu: FakeGpu) -> None:
    fake_gpu.library.refuse_start = True
    with pytest.raises(BackendUnavailableError, match=r"not start on Fake GPU 0.*error: 35.*CUDA"):
        fake_gpu.open(model)


@pytest.mark.parametrize(
    ("name", "kind", "width"),
    [("q", TensorProto.FLOAT, 4), ("x", TensorProto.FLOAT16, 4), ("x", TensorProto.FLOAT, 5)],
)
def test_an_engine_of_another_graph_is_refused(
    name: str, kind: int, width: int, tmp_path: Path, fake_gpu: FakeGpu, monkeypatch: Any
) -> None:
    def graph(file: str, name: str, kind: int, width: int) -> Path:
        ends = [tensor_info(n, ["batch", width], kind) for n in (name, "y")]
        return save(tmp_path / file, [helper.make_node("Relu", [name], ["y"])], ends[:1], ends[1:])

    other = graph("other.onnx", name, kind, width)
    monkeypatch.setattr(
        opening, "build_engine", lambda _, *args, **__: fake_gpu.build(other, *args)
    )
    with pytest.raises(EngineMismatchError, match="its engine is of another graph"):
        fake_gpu.open(graph("mine.onnx", "x", TensorProto.FLOAT, 4))


@pytest.mark.parametrize("how", ["unchanged", "damaged", "another version", "a link"])
def test_kernels_compiled_by_tensorrt_rtx_are_cached(
    how: str, model: Path, fake_gpu: FakeGpu
) -> None:
    library = fake_gpu.libraries["tensorrt-rtx"]
    with fake_gpu.open(model, flavour="tensorrt-rtx") as session:
        session.run(feed_of(2))
        (cached,) = (EngineCache().folder / "runtime").glob("*.cache")  # not only at the end
    assert oct(cached.stat().st_mode & 0o777) == "0o600"
    if how == "damaged":
        cached.write_bytes(cached.read_bytes()[:-3])
    elif how == "another version":
        cached.write_bytes(cached.read_bytes().replace(b"1.7.1", b"1.7.0"))
    elif how == "a link":
        cached.rename(cached.with_name("elsewhere"))
        cached.symlink_to("elsewhere")
    library.compiled.clear()
    with fake_gpu.open(model, flavour="tensorrt-rtx") as session:
        session.run(feed_of(2))
    assert library.compiled == ([] if how == "unchanged" else ["y", "norm"])


def test_a_bundle_loads_and_verifies_on_a_gpu(tiny_bundle: Bundle, fake_gpu: FakeGpu) -> None:
    texts = ["a red circle", "blue"]
    with mmedge.load(tiny_bundle.path, device="gpu", backend="tensorrt", precision="fp32") as gpu:
        outputs = gpu.encode_text(texts)
    with mmedge.load(tiny_bundle.path, device="cpu", precision="fp32") as cpu:
        assert outputs == pytest.approx(cpu.encode_text(texts), abs=1e-5)
    assert fake_gpu.built[1].profiles[0].ranges["input_ids"].max[0] == 32
    results = verify_bundle(tiny_bundle, device="gpu", precision="fp32", backend="tensorrt")
    assert [result.passed for result in results] == [True, True]


def test_installed_versions_are_read_without_loading_an_engine() -> None:
    code = (
        "import sys\n"
        "from mmedge.runtimes import backend\n"
        "for name in ('tensorrt', 'tensorrt-rtx'):\n"
        "    backend(name).engine_version(), backend(name).layouts('cuda')\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('cuda', 'tensorrt_rtx_bindings')])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
