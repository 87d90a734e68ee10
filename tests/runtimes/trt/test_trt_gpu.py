"""On a GPU, beside the contract suite: what the fake cannot show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from tiny_graphs import embed, feed_of, save, save_embedder, save_nonzero, tensor_info

from mmedge.errors import EngineBuildError, ShapeError
from mmedge.runtimes import EngineOptions, SessionOptions, backend
from mmedge.runtimes.cuda.arrays import DeviceArray
from mmedge.runtimes.cuda.runtime import Device
from mmedge.runtimes.engines.spec import BuildSettings
from mmedge.runtimes.engines.store import EngineCache
from mmedge.runtimes.trt.backend import TrtBackend
from mmedge.runtimes.trt.build import build_engine
from mmedge.runtimes.trt.flavours import TITLES
from mmedge.runtimes.trt.opening import needed_engine
from mmedge.runtimes.trt.session import TrtSession
from mmedge.specs import Axis

pytestmark = pytest.mark.gpu

AXES = {"batch": Axis(1, 2, 8)}


@contextmanager
def on_gpu(flavour: str) -> Iterator[None]:
    if "cuda" not in backend(flavour).available_devices():
        pytest.skip(f"needs an NVIDIA GPU, its driver, cuda-bindings and {flavour}")
    try:
        yield
    except EngineBuildError as error:
        # TensorRT-RTX supports desktop GPUs only; -ra shows its message for another.
        pytest.skip(f"{Device(0).properties}: {error}")


def open_on_gpu(flavour: str, model: Path, axes: Any = None, **engine: Any) -> TrtSession:
    options = SessionOptions(device="cuda", axes=axes or AXES, engine=EngineOptions(**engine))
    with on_gpu(flavour):
        return TrtBackend(flavour).open_session(model, options)


@pytest.fixture(params=tuple(TITLES))
def flavour(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def session(flavour: str, tmp_path: Path) -> Iterator[TrtSession]:
    with open_on_gpu(flavour, save_embedder(tmp_path / "model.onnx")) as opened:
        yield opened


def assert_embedded(got: Any, feed: Any) -> None:
    for name, expected in embed(feed).items():
        np.testing.assert_allclose(got[name], expected, rtol=2e-3, atol=2e-3)  # TF32 products


def test_graphs_of_many_shapes(session: TrtSession) -> None:
    for round_ in range(4):
        for batch in range(1, 9):
            feed = feed_of(batch, round_)
            assert_embedded(session.run(feed), feed)


def test_a_graph_is_captured(flavour: str, tmp_path: Path, caplog: Any) -> None:
    with open_on_gpu(flavour, save_embedder(tmp_path / "m.onnx"), graphs=4) as session:
        for seed in range(4):
            session.run(feed_of(2, seed))
        (slot,) = session._idle
        prepared = next(iter(slot._prepared.values()))
        assert slot._engine.captures_itself or prepared.graph is not None
    assert "no CUDA graph" not in caplog.text


def test_memory_is_given_back(flavour: str, tmp_path: Path) -> None:
    model = save_embedder(tmp_path / "m.onnx")
    free = []
    for _ in range(4):
        with open_on_gpu(flavour, model) as session:
            for batch in (1, 1, 1, 8, 8, 8):
                session.run(feed_of(batch))
        free.append(Device(0).memory_bytes()[0])
    assert free[-1] >= free[1] - (1 << 20)


def test_outputs_of_one_run_are_inputs_of_another(flavour: str, tmp_path: Path) -> None:
    model = save(
        tmp_path / "twice.onnx",
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [tensor_info("x", ["batch", 64])],
        [tensor_info("y", ["batch", 64])],
    )
    with open_on_gpu(flavour, model) as session:
        x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
        once = session.run_device({"x": x})["y"]
        assert isinstance(once, DeviceArray)
        twice = session.run_device({"x": once})["y"]
        np.testing.assert_allclose(twice.numpy(), 4 * x, rtol=1e-5)
        binding = session.bind_device({"x": once})
        for _ in range(3):
            np.testing.assert_allclose(binding.run()["y"].numpy(), 4 * x, rtol=1e-5)


def test_torch_tensors_go_in_and_come_out_without_a_copy(session: TrtSession) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs torch with CUDA")
    feed = feed_of(3)
    given = {name: torch.as_tensor(array, device="cuda") for name, array in feed.items()}
    outputs = session.run_device(given)
    out = torch.as_tensor(outputs["y"], device="cuda")
    assert out.data_ptr() == outputs["y"].address
    np.testing.assert_allclose(out.cpu().numpy(), embed(feed)["y"], rtol=2e-3, atol=2e-3)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        later = {name: tensor.clone() for name, tensor in given.items()}
    assert_embedded(
        {n: a.numpy() for n, a in session.run_device(later, stream=side.cuda_stream).items()}, feed
    )


def test_an_output_is_as_large_as_its_values_make_it(flavour: str, tmp_path: Path) -> None:
    model = save_nonzero(tmp_path / "nonzero.onnx")
    with open_on_gpu(flavour, model) as session:
        for ones in (2, 6, 0, 3):
            x = np.array([1] * ones + [0] * (6 - ones), np.float32)
            np.testing.assert_array_equal(session.run({"x": x})["where"], np.arange(ones)[None])


def test_a_stripped_engine_takes_its_weights_from_the_onnx_file(
    flavour: str, tmp_path: Path
) -> None:
    model = save_embedder(tmp_path / "m.onnx")
    with on_gpu(flavour):
        needed = needed_engine(flavour, model, SessionOptions(device="cuda", axes=AXES))
        request = replace(needed.request, settings=BuildSettings(stripped=True))
        built = build_engine(model, request)
    if flavour == "tensorrt":
        assert built.layers
    EngineCache().store(replace(needed.key, request=request), built)
    for seed in range(2):
        with open_on_gpu(flavour, model) as session:
            feed = feed_of(3, seed)
            assert_embedded(session.run(feed), feed)
    assert len(EngineCache().entries()) == 1


def test_shapes_outside_are_refused(session: TrtSession) -> None:
    with pytest.raises(ShapeError, match="'batch' is 9"):
        session.run(feed_of(9))
