"""A simulated GPU with both flavours of TensorRT, for tests that open sessions on it."""

from __future__ import annotations

import ctypes
import gc
import importlib.machinery
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import FakeTensorRT, fake_plan
from tiny_graphs import save_embedder

from mmedge.runtimes.engines.spec import BuiltEngine, EngineLayer, EngineRequest
from mmedge.runtimes.onnx_file import read_onnx_file
from mmedge.runtimes.session import EngineOptions, SessionOptions
from mmedge.runtimes.trt import flavours, opening
from mmedge.runtimes.trt.backend import TrtBackend
from mmedge.runtimes.trt.session import TrtSession
from mmedge.specs import Array, Axis

VERSIONS: dict[str, str] = {"tensorrt": "10.3.0", "tensorrt-rtx": "1.7.1"}
MODULES: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
AXES = {"batch": Axis(1, 2, 8)}


@dataclass
class FakeGpu:
    """The parts of the GPU that tests read and set.

    Attributes:
        cuda: The CUDA runtime.
        libraries: TensorRT, by flavour.
        built: The engines built.
        on_host: See fake_plan.
    """

    cuda: FakeCuda
    libraries: dict[str, FakeTensorRT]
    built: list[EngineRequest] = field(default_factory=list)
    on_host: tuple[str, ...] = ()

    @property
    def library(self) -> FakeTensorRT:
        return self.libraries["tensorrt"]

    def build(self, model: Path, request: EngineRequest, **_: object) -> BuiltEngine:
        """Replace mmedge.runtimes.trt.build.build_engine."""
        self.built.append(request)
        graph = read_onnx_file(model)
        plan = fake_plan(model, request, on_host=self.on_host)
        layers = tuple(
            EngineLayer(name, "gemm", (dtype,), (dtype,))
            for name, dtype in (("project", "fp16"), ("length", "fp32"), ("divide", "fp32"))
        )
        return BuiltEngine(plan, graph.inputs, graph.outputs, layers, 0.1)

    def open(
        self,
        model: Path,
        *,
        flavour: str = "tensorrt",
        device: str = "cuda",
        axes: Any = None,
        spin: bool = True,
        **engine: Any,
    ) -> TrtSession:
        """Open a graph; `engine` are EngineOptions."""
        options = SessionOptions(
            device=device, axes=axes or AXES, spin=spin, engine=EngineOptions(**engine)
        )
        return TrtBackend(flavour).open_session(model, options)

    def embedder(self, folder: Path, **how: Any) -> TrtSession:
        """Open the embedder of tiny_graphs."""
        return self.open(save_embedder(folder / "model.onnx"), **how)


class OnDevice:
    """An array on the fake GPU, as from another library.

    Args:
        cuda: Where.
        array: Its content.
        interface: Further entries of its __cuda_array_interface__.
    """

    def __init__(self, cuda: FakeCuda, array: Array, **interface: Any) -> None:
        code, self.address = cuda.cudaMalloc(array.nbytes + 64)
        assert int(code) == 0
        self.cuda, self.array = cuda, array
        weakref.finalize(self, cuda.cudaFree, self.address).atexit = False
        self.write(array)
        self.interface: dict[str, Any] = {
            "version": 3,
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (self.address, False),
            "stream": None,
        } | interface

    def write(self, array: Array) -> None:
        """Write the content synchronously."""
        ctypes.memmove(self.address, np.ascontiguousarray(array).ctypes.data, array.nbytes)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.interface


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeGpu]:
    """A GPU of compute capability 8.9 and 64 MiB; whatever a test takes of it must be freed."""
    cuda = FakeCuda()
    monkeypatch.setenv("MMEDGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    cuda.__spec__ = importlib.machinery.ModuleSpec("cuda.bindings.runtime", None)
    libraries = {}
    for flavour, name in MODULES.items():
        library = FakeTensorRT(cuda, name, VERSIONS[flavour])
        library.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, library)
        libraries[flavour] = library
    monkeypatch.setattr(flavours, "installed_version", VERSIONS.get)
    gpu = FakeGpu(cuda, libraries)
    monkeypatch.setattr(opening, "build_engine", gpu.build)
    yield gpu
    if cuda.left():
        gc.collect()
    assert cuda.left() == {}, "not freed"
