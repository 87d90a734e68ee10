"""Opening a graph in TensorRT: what is missing, which engine is taken, when one is built."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_gpu import AXES, FakeGpu
from fake_tensorrt import FakeTensorRT, Refitter, Severity, fake_plan
from onnx import TensorProto, helper, numpy_helper
from tiny_graphs import INPUTS, embed, feed_of, save, save_embedder

import mmedge
from mmedge.bundle import Bundle
from mmedge.errors import (
    BackendError,
    BackendUnavailableError,
    EngineMismatchError,
    InputError,
    ShapeError,
    StorageError,
)
from mmedge.models import verify_bundle
from mmedge.runtimes import SessionOptions, backend, open_session
from mmedge.runtimes.engines.profiles import shape_profiles
from mmedge.runtimes.engines.spec import BuildSettings
from mmedge.runtimes.engines.store import EngineCache
from mmedge.runtimes.trt import flavours, opening
from mmedge.runtimes.trt.opening import needed_engine
from mmedge.specs import Axis

CUDA = SessionOptions(device="cuda", axes=AXES)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_embedder(tmp_path / "model.onnx")


# What is missing.


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
    assert backend("tensorrt").available_devices() == ()


@pytest.mark.parametrize(
    ("driver", "devices", "device", "says"),
    [
        (0, 1, "cuda", "no NVIDIA driver.*JetPack.*--gpus all"),
        (11080, 1, "cuda", r"too old: it serves CUDA 11\.8.*Update the driver\.$"),
        (12040, 1, "cuda", r'too old: it serves CUDA 12\.4.*13\.0.*580.*cuda-bindings>=12\.9,<13"'),
        (13000, 0, "cuda", "cudaErrorNoDevice.*nvidia-smi"),
        (13000, 1, "cuda:1", r"'cuda:1'.* sees 1 GPU\(s\)"),
    ],
)
def test_a_driver_or_gpu_that_is_missing_is_named(
    driver: int, devices: int, device: str, says: str, model: Path, fake_gpu: FakeGpu
) -> None:
    fake_gpu.cuda.driver, fake_gpu.cuda.devices = driver, devices
    with pytest.raises(BackendUnavailableError, match=says):
        fake_gpu.open(model, device=device)
    known = () if driver < 13000 or not devices else ("cuda",)
    assert backend("tensorrt").available_devices() == known
    assert not backend("tensorrt").is_prepared(model, CUDA)


def test_every_gpu_is_a_device(fake_gpu: FakeGpu) -> None:
    fake_gpu.cuda.devices = 3
    assert backend("tensorrt").available_devices() == ("cuda", "cuda:1", "cuda:2")


@pytest.mark.parametrize("device", ["cpu", "cuda:x", "cuda:", "mars"])
def test_engines_run_on_gpus_alone(device: str, model: Path) -> None:
    with pytest.raises(BackendUnavailableError, match=rf"'{device}': engines run on GPUs"):
        open_session(model, backend_name="tensorrt", options=replace(CUDA, device=device))
    assert backend("tensorrt").layouts(device) == ()


@pytest.mark.parametrize(
    "option",
    [{"arena": False}, {"prepack": False}, {"graph_optimization": "none"}, {"profile_to": "."}],
)
def test_an_option_that_is_not_to_be_had_is_refused(
    option: dict[str, Any], model: Path, fake_gpu: FakeGpu
) -> None:
    (name,) = option
    with pytest.raises(BackendUnavailableError, match=f"no option {name}: got"):
        open_session(model, backend_name="tensorrt", options=replace(CUDA, **option))


def test_a_dynamic_axis_needs_bounds(model: Path, fake_gpu: FakeGpu) -> None:
    with pytest.raises(InputError, match="'batch'"):
        open_session(model, backend_name="tensorrt", options=replace(CUDA, axes=None))


# Which engine is taken.


def test_an_engine_is_built_once(model: Path, fake_gpu: FakeGpu) -> None:
    module = backend("tensorrt")
    assert not module.is_prepared(model, CUDA)
    module.prepare(model, CUDA)
    assert module.is_prepared(model, CUDA)
    for _ in range(2):
        with fake_gpu.open(model) as session:
            assert session.run(feed_of(2))["y"].shape == (2, 4)
    assert len(fake_gpu.built) == 1
    (profile,) = fake_gpu.built[0].profiles
    assert profile.ranges["x"].max == (8, 8)
    assert not module.is_prepared(model, replace(CUDA, axes={"batch": Axis(1, 1, 9)}))


def test_building_is_told_to_the_log(
    model: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def build(path: Path, request: Any, *, progress: Any, **how: object) -> Any:
        for step in range(3):
            progress("tactics", step, 3)
        return fake_gpu.build(path, request)

    monkeypatch.setattr(opening, "build_engine", build)
    caplog.set_level(logging.INFO, "mmedge.engines")
    told: list[tuple[str, int, int]] = []
    backend("tensorrt").prepare(model, CUDA, lambda *step: told.append(step))
    assert told == [("tactics", step, 3) for step in range(3)]
    lines = [line for line in caplog.messages if "building for TensorRT: tactics" in line]
    assert lines == [f"{model}: building for TensorRT: tactics, 0 of 3"]  # then every 10 s


def test_placement_counts_layers_by_precision(model: Path, fake_gpu: FakeGpu) -> None:
    with fake_gpu.open(model) as session:
        assert session.placement.engine == "tensorrt 10.3.0"
        assert session.placement.providers == {"fp16": 1, "fp32": 2}
        assert repr(session) == "<TrtSession model.onnx (cuda)>"
    assert repr(session) == "<TrtSession model.onnx (closed)>"


def store(gpu: FakeGpu, model: Path, *axes: Any, **settings: Any) -> None:
    """Put an engine with a profile for each set of bounds into the cache, as `mmedge build`."""
    needed = needed_engine("tensorrt", model, CUDA)
    request = replace(
        needed.request,
        profiles=shape_profiles(INPUTS, axes),
        settings=BuildSettings(**settings),
    )
    EngineCache().store(replace(needed.key, request=request), gpu.build(model, request))


def test_an_engine_that_does_more_serves_as_well(model: Path, fake_gpu: FakeGpu) -> None:
    store(fake_gpu, model, {"batch": Axis(1, 4, 64)}, workspace_bytes=1 << 20)
    assert backend("tensorrt").is_prepared(model, CUDA)
    with fake_gpu.open(model) as session:
        assert session.run(feed_of(64))["y"].shape == (64, 4)
    assert len(fake_gpu.built) == 1


@pytest.mark.parametrize(
    ("axes", "settings"),
    [
        ({"batch": Axis(1, 2, 7)}, {}),
        ({"batch": Axis(2, 2, 8)}, {}),
        ({"batch": Axis(1, 2, 8)}, {"refittable": True}),
        ({"batch": Axis(1, 2, 8)}, {"weight_streaming": True}),
    ],
)
def test_an_engine_that_does_less_does_not(
    axes: Any, settings: Any, model: Path, fake_gpu: FakeGpu
) -> None:
    store(fake_gpu, model, axes, **settings)
    assert not backend("tensorrt").is_prepared(model, CUDA)
    fake_gpu.open(model).close()
    assert len(fake_gpu.built) == 2


def test_the_first_profile_that_takes_the_shapes_is_taken(model: Path, fake_gpu: FakeGpu) -> None:
    bounds = ((1, 1, 1), (2, 4, 8), (1, 8, 32))
    store(fake_gpu, model, *({"batch": Axis(*each)} for each in bounds))
    with fake_gpu.open(model, graphs=4) as session:
        for batch, profile in ((1, 0), (2, 1), (8, 1), (9, 2), (1, 0), (1, 0)):
            feed = feed_of(batch)
            got = session.run(feed)
            assert got["y"] == pytest.approx(embed(feed)["y"], abs=1e-5)
            used = [c.profile for c in fake_gpu.library.contexts if c.shapes["x"][0] == batch]
            assert used == [profile]
        with pytest.raises(ShapeError) as caught:
            session.run(feed_of(40))
    for told in ("profile 0: 'batch' 1 to 1", "profile 1: 'batch' 2 to 8", "profile 2: 'batch' 1"):
        assert told in str(caught.value)


# Engines without weights.


def test_a_stripped_engine_takes_its_weights_from_the_onnx_file(
    model: Path, fake_gpu: FakeGpu
) -> None:
    store(fake_gpu, model, {"batch": Axis(1, 2, 8)}, stripped=True)
    assert backend("tensorrt").is_prepared(model, CUDA)
    for opened in (1, 2):
        with fake_gpu.open(model) as session:
            feed = feed_of(3)
            assert session.run(feed)["y"] == pytest.approx(embed(feed)["y"], abs=1e-5)
        assert fake_gpu.library.done["refitted"] == opened
    assert len(fake_gpu.built) == 1


@pytest.mark.parametrize("full_first", [True, False])
def test_an_engine_that_holds_its_weights_is_taken_before_a_stripped_one(
    full_first: bool, model: Path, fake_gpu: FakeGpu
) -> None:
    for stripped in (False, True) if full_first else (True, False):
        store(fake_gpu, model, {"batch": Axis(1, 4, 64)}, stripped=stripped)
    fake_gpu.open(model).close()
    assert len(fake_gpu.built) == 2
    assert fake_gpu.library.done["refitted"] == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [("name", "lacks the weights W"), ("shape", r"W is \(8, 5\), expected \(8, 4\)")],
)
def test_weights_that_do_not_fit_the_engine_are_refused(
    change: str, says: str, model: Path, fake_gpu: FakeGpu
) -> None:
    """A fault of whoever built it, since the file's hash is in the key."""
    plan = fake_plan(model, needed_engine("tensorrt", model, CUDA).request, stripped=True)
    graph = onnx.load(model)
    weight = next(weight for weight in graph.graph.initializer if weight.name == "W")
    if change == "name":
        weight.name = graph.graph.node[0].input[1] = "other"
    else:
        weight.CopyFrom(numpy_helper.from_array(np.zeros((8, 5), np.float32), "W"))
    onnx.save(graph, model)
    needed = needed_engine("tensorrt", model, CUDA)
    request = replace(needed.request, settings=BuildSettings(stripped=True))
    made = replace(fake_gpu.build(model, request), plan=plan)
    EngineCache().store(replace(needed.key, request=request), made)
    with pytest.raises(EngineMismatchError, match=f"built without weights.*{says}") as caught:
        fake_gpu.open(model)
    assert "mmedge cache prune --model" in str(caught.value)


def test_an_engine_that_takes_no_weights_is_refused(model: Path, fake_gpu: FakeGpu) -> None:
    fake_gpu.plan["refit"] = False
    store(fake_gpu, model, {"batch": Axis(1, 2, 8)}, stripped=True)
    with pytest.raises(EngineMismatchError, match=r"takes no weights.*not built with kREFIT"):
        fake_gpu.open(model)


def test_memory_for_the_weights_is_told(
    model: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(fake_gpu, model, {"batch": Axis(1, 2, 8)}, stripped=True)

    def full(refitter: Refitter) -> bool:
        refitter.logger.log(Severity.ERROR, "OutOfMemory (Requested size was 99 bytes.)")
        return False

    monkeypatch.setattr(Refitter, "refit_cuda_engine", full)
    with pytest.raises(BackendError, match=r"out of memory|free"):
        fake_gpu.open(model)


# Engines that do not fit.


def test_a_library_that_does_not_start_is_told(model: Path, fake_gpu: FakeGpu) -> None:
    fake_gpu.library.refuse_start = True
    with pytest.raises(BackendUnavailableError, match=r"not start on Fake GPU 0.*error: 35.*CUDA"):
        fake_gpu.open(model)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"version": "10.7.0"}, r"TensorRT 10\.3\.0 .*expecting library version 10\.3\.0 got 10"),
        ({"capability": "8.6"}, r"Fake GPU 0 \(compute capability 8\.9\).*expecting compute 8\.9"),
    ],
)
def test_an_engine_of_another_version_or_gpu_is_refused(
    made: dict[str, str], says: str, model: Path, fake_gpu: FakeGpu
) -> None:
    fake_gpu.plan |= made
    with pytest.raises(
        EngineMismatchError, match=rf"model\.onnx: its engine .*{says}.*mmedge build"
    ):
        fake_gpu.open(model)


@pytest.mark.parametrize("change", ["name", "dtype", "axis", "more"])
def test_an_engine_of_another_graph_is_refused(
    change: str, model: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = TensorProto.FLOAT16 if change == "dtype" else TensorProto.FLOAT
    names = ["q" if change == "name" else "x", *(["more"] if change == "more" else [])]
    other = save(
        model.parent / "other.onnx",
        [helper.make_node("Relu", [names[0]], ["y"])]
        + [helper.make_node("Relu", [name], [f"{name}2"]) for name in names[1:]],
        [helper.make_tensor_value_info(name, kind, ["batch", 4]) for name in names],
        [helper.make_tensor_value_info(n, kind, ["batch", 4]) for n in ("y", "more2")][
            : len(names)
        ],
    )
    mine = save(
        model,
        [helper.make_node("Relu", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
    )
    if change == "axis":
        save(
            other,
            [helper.make_node("Relu", ["x"], ["y"])],
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 5])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])],
        )
    monkeypatch.setattr(
        opening, "build_engine", lambda _, *given, **__: fake_gpu.build(other, *given)
    )
    with pytest.raises(EngineMismatchError, match="its engine is of another graph"):
        fake_gpu.open(mine)


def test_a_damaged_engine_is_built_anew(model: Path, fake_gpu: FakeGpu) -> None:
    fake_gpu.open(model).close()
    (plan,) = EngineCache().folder.glob("*.plan")
    plan.write_bytes(plan.read_bytes()[:-1] + b"?")
    with pytest.warns(RuntimeWarning, match="is not loaded: its plan was changed"):
        session = fake_gpu.open(model)
    session.close()
    assert len(fake_gpu.built) == 2


def test_a_cache_that_others_may_write_is_refused(model: Path, fake_gpu: FakeGpu) -> None:
    fake_gpu.open(model).close()
    EngineCache().folder.chmod(0o777)
    with pytest.raises(StorageError):
        fake_gpu.open(model)
    assert not backend("tensorrt").is_prepared(model, CUDA)


# What TensorRT-RTX compiles.


def open_rtx(gpu: FakeGpu, model: Path) -> list[str]:
    """Open and run, and return what had to be compiled."""
    library = gpu.libraries["tensorrt-rtx"]
    library.compiled.clear()
    with gpu.open(model, flavour="tensorrt-rtx") as session:
        session.run(feed_of(2))
    return list(library.compiled)


def runtime_caches() -> list[Path]:
    return sorted((EngineCache().folder / "runtime").glob("*.cache"))


def test_what_was_compiled_is_kept_for_the_next_process(model: Path, fake_gpu: FakeGpu) -> None:
    assert open_rtx(fake_gpu, model) == ["y", "norm"]
    (kept,) = runtime_caches()
    assert oct(kept.stat().st_mode & 0o777) == "0o600"
    assert open_rtx(fake_gpu, model) == []
    assert len(fake_gpu.built) == 1


def test_it_is_kept_once_a_call_is_answered_and_not_only_at_the_end(
    model: Path, fake_gpu: FakeGpu
) -> None:
    with fake_gpu.open(model, flavour="tensorrt-rtx") as session:
        assert runtime_caches() == []
        session.run(feed_of(2))
        assert len(runtime_caches()) == 1


@pytest.mark.parametrize("how", ["damaged", "another version", "a link"])
def test_what_cannot_be_taken_is_compiled_anew(how: str, model: Path, fake_gpu: FakeGpu) -> None:
    open_rtx(fake_gpu, model)
    (kept,) = runtime_caches()
    good = kept.read_bytes()
    if how == "damaged":
        kept.write_bytes(good[:-3])
    elif how == "another version":
        kept.write_bytes(good.replace(b"1.7.1", b"1.7.0"))
    else:
        kept.rename(kept.with_name("elsewhere"))
        kept.symlink_to("elsewhere")
    assert open_rtx(fake_gpu, model) == ["y", "norm"]
    if how != "a link":
        assert kept.read_bytes() == good


def test_where_it_cannot_be_kept_the_log_tells(
    model: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from mmedge.runtimes.trt import device_engine

    def full(*_: object, **__: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(device_engine, "write_atomic", full)
    assert open_rtx(fake_gpu, model) == ["y", "norm"]
    assert "Kernels that were compiled cannot be kept: the disk is full" in caplog.text


# A bundle.


def test_a_bundle_loads_and_verifies_on_a_gpu(tiny_bundle: Bundle, fake_gpu: FakeGpu) -> None:
    with mmedge.load(tiny_bundle.path, device="gpu", backend="tensorrt", precision="fp32") as gpu:
        answers = gpu.encode_text(["a red circle", "blue"])
        assert {role: s.placement.device for role, s in gpu.sessions.items()} == {
            "image_encoder": "cuda",
            "text_encoder": "cuda",
        }
    with mmedge.load(tiny_bundle.path, device="cpu", precision="fp32") as cpu:
        assert answers == pytest.approx(cpu.encode_text(["a red circle", "blue"]), abs=1e-5)
    text = fake_gpu.built[1].profiles[0].ranges["input_ids"]
    assert text.max[0] == 32
    results = verify_bundle(tiny_bundle, device="gpu", precision="fp32", backend="tensorrt")
    assert [(result.role, result.passed) for result in results] == [
        ("image_encoder", True),
        ("text_encoder", True),
    ]


def test_asking_what_is_here_loads_no_engine() -> None:
    code = (
        "import sys\n"
        "from mmedge.runtimes import backend\n"
        "for name in ('tensorrt', 'tensorrt-rtx'):\n"
        "    backend(name).engine_version(), backend(name).layouts('cuda')\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('cuda', 'tensorrt_rtx_bindings')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=os.environ,
    )
    assert done.stdout.strip() == "[]"


def test_a_module_without_the_rest_is_no_tensorrt(
    model: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(FakeTensorRT, "Builder")
    with pytest.raises(BackendUnavailableError, match="no builder"):
        fake_gpu.open(model)
    assert issubclass(BackendUnavailableError, BackendError)
