"""Every implementation of the Session contract, for the suites that hold them to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from toy_states import AXES, EMBEDDER, Toy

from mmedge.errors import EngineBuildError
from mmedge.runtimes import EngineOptions, Session, SessionOptions, backend, open_session
from mmedge.runtimes.fake import FakeSession
from mmedge.runtimes.selection.hot_swap import HotSwapSession

__all__ = ["GPU_IMPLEMENTATIONS", "IMPLEMENTATIONS", "PARAMETERS", "open_toy"]


def _ort(toy: Toy, folder: Path, external: str | None = None, **options: object) -> Session:
    model = toy.save(folder / "model.onnx", external=external)
    settings = SessionOptions(threads=1, axes=AXES, **options)  # type: ignore[arg-type]
    return open_session(model, options=settings)


def _ort_cuda(toy: Toy, folder: Path) -> Session:
    if "cuda" not in backend("onnxruntime").available_devices():
        pytest.skip("needs an NVIDIA GPU, its driver, and onnxruntime-gpu")
    return _ort(toy, folder, device="cuda")


def _openvino(toy: Toy, folder: Path, external: str | None = None) -> Session:
    model = toy.save(folder / "model.onnx", external=external)
    options = SessionOptions(threads=1, axes=AXES)
    return open_session(model, backend_name="openvino", options=options)


def _trt(toy: Toy, folder: Path, flavour: str = "tensorrt", **options: object) -> Session:
    if "cuda" not in backend(flavour).available_devices():
        pytest.skip(f"needs an NVIDIA GPU, its driver, cuda-bindings and {flavour}")
    settings = SessionOptions(device="cuda", axes=AXES, **options)  # type: ignore[arg-type]
    try:
        model = toy.save(folder / "model.onnx")
        return open_session(model, backend_name=flavour, options=settings)
    except EngineBuildError as error:  # TensorRT-RTX, on a GPU that it does not serve
        pytest.skip(str(error))


# Each opens a toy in an empty folder. Those of TensorRT run on a GPU that is not there, see
# trt/fake_gpu.py.
IMPLEMENTATIONS: dict[str, Callable[[Toy, Path], Session]] = {
    "ort": _ort,
    "ort-external-data": lambda *toy: _ort(*toy, external="model.onnx.data"),
    "ort-small-memory": lambda *toy: _ort(*toy, arena=False, prepack=False, spin=False),
    "openvino": _openvino,
    "openvino-external-data": lambda *toy: _openvino(*toy, external="model.onnx.data"),
    "trt": _trt,
    "trt-without-graphs": lambda *toy: _trt(*toy, engine=EngineOptions(graphs=0)),
    "trt-small-memory": lambda *toy: _trt(
        *toy, spin=False, engine=EngineOptions(contexts=1, graphs=2, scratch="needed")
    ),
    "trt-rtx": lambda *toy: _trt(*toy, "tensorrt-rtx"),
    "hot-swap": lambda *toy: HotSwapSession(_ort(*toy)),
    "fake": lambda toy, _: FakeSession(toy.inputs, toy.outputs, toy.compute, axes=AXES),
}
GPU_IMPLEMENTATIONS: dict[str, Callable[[Toy, Path], Session]] = {
    "ort-cuda": _ort_cuda,
    "trt-gpu": _trt,
    "trt-gpu-without-graphs": lambda *toy: _trt(*toy, engine=EngineOptions(graphs=0)),
    "trt-rtx-gpu": lambda *toy: _trt(*toy, "tensorrt-rtx"),
}
PARAMETERS = [
    *IMPLEMENTATIONS,
    *(pytest.param(name, marks=pytest.mark.gpu) for name in GPU_IMPLEMENTATIONS),
]


def open_toy(
    request: pytest.FixtureRequest, name: str, folder: Path, toy: Toy = EMBEDDER
) -> Session:
    """Open a toy in the implementation of a name, on a GPU that is not there if need be."""
    if name in IMPLEMENTATIONS and name.startswith("trt"):
        request.getfixturevalue("fake_gpu")
    return (IMPLEMENTATIONS | GPU_IMPLEMENTATIONS)[name](toy, folder)
