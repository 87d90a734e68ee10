"""The fakes offer nothing that the libraries lack, and what needs no GPU is tried on these."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import fake_tensorrt
import pytest
from fake_cuda import FakeCuda
from fake_gpu import AXES
from tiny_graphs import INPUTS, OUTPUTS, save_embedder

from mmedge.errors import BackendUnavailableError, EngineMismatchError
from mmedge.runtimes import EngineOptions, SessionOptions, open_session
from mmedge.runtimes.onnx_file import OnnxFile
from mmedge.runtimes.trt import cuda
from mmedge.runtimes.trt.device_engine import DeviceEngine
from mmedge.runtimes.trt.flavours import LoadedFlavour, installed_version, load_flavour
from mmedge.specs import TensorSpec

# The fake's class -> the library's.
CLASSES = {
    fake_tensorrt.Runtime: "Runtime",
    fake_tensorrt.RtxEngine: "ICudaEngine",
    fake_tensorrt.RuntimeCache: "IRuntimeCache",
    fake_tensorrt.RuntimeConfig: "IRuntimeConfig",
    fake_tensorrt.Context: "IExecutionContext",
    fake_tensorrt.Refitter: "Refitter",
    fake_tensorrt.OnnxParserRefitter: "OnnxParserRefitter",
    fake_tensorrt.RefitError: "ParserError",
}
# What tests look at.
OWN = {
    "scratch_bytes", "dtype", "strategy", "cache", "kernels", "profiles", "shapes", "addresses",
    "allocators", "scratch", "changes", "flushed", "profile", "engine", "library", "logger",
    "device", "session", "inputs", "outputs", "on_host", "graph", "refit", "start", "needed",
    "given", "refitter", "errors", "text",
}  # fmt: skip


@pytest.fixture(scope="module")
def library() -> LoadedFlavour:
    if installed_version("tensorrt-rtx") is None:
        pytest.skip("needs tensorrt-rtx")
    return load_flavour("tensorrt-rtx")


@pytest.mark.parametrize("fake", CLASSES, ids=lambda fake: fake.__name__)
def test_what_the_fake_tensorrt_offers_the_library_has(fake: type, library: LoadedFlavour) -> None:
    real = getattr(library.module, CLASSES[fake])
    offered = {name for name, _ in inspect.getmembers(fake) if not name.startswith("_")}
    assert {name for name in offered - OWN if not hasattr(real, name)} == set()


@pytest.mark.parametrize(
    "name",
    ["DataType", "TensorIOMode", "TensorLocation", "ExecutionContextAllocationStrategy",
     "CudaGraphStrategy"],
)  # fmt: skip
def test_the_fakes_words_are_the_librarys(name: str, library: LoadedFlavour) -> None:
    known = getattr(library.module, name).__members__
    assert set(getattr(fake_tensorrt, name).__members__) <= set(known)


def test_what_the_fake_cuda_offers_the_bindings_have() -> None:
    if not cuda.bindings_installed():
        pytest.skip("needs cuda-bindings")
    real = cuda.load_bindings()
    assert not isinstance(real, FakeCuda)
    offered = {name for name in dir(FakeCuda) if name.startswith("cuda")}
    assert {name for name in offered if not hasattr(real, name)} == set()
    for name in ("cudaMemcpyKind", "cudaStreamCaptureMode", "cudaMemoryType", "cudaError_t"):
        for word, value in getattr(FakeCuda, name).__members__.items():
            assert int(getattr(getattr(real, name), word)) == int(value)
    for name in ("cudaStreamNonBlocking", "cudaEventBlockingSync", "cudaEventDisableTiming"):
        assert getattr(real, name) == getattr(FakeCuda, name)


def test_the_library_itself_says_why_a_plan_is_refused(library: LoadedFlavour) -> None:
    device: Any = SimpleNamespace(
        index=0, properties=SimpleNamespace(name="a GPU", compute_capability="8.9")
    )
    with pytest.raises(
        EngineMismatchError, match=r"m\.onnx: its engine.*TensorRT-RTX.*[Ss]erializ"
    ):
        DeviceEngine(
            library,
            b"no plan" * 999,
            device,
            model=Path("m.onnx"),
            graph=OnnxFile(10, 20, INPUTS, OUTPUTS, has_fp16=False, external_data=()),
            options=EngineOptions(),
        )


def test_the_librarys_output_allocator_can_be_made(library: LoadedFlavour) -> None:
    asked = SimpleNamespace(shape=None, reallocate=lambda size: 256 * size)
    engine: Any = SimpleNamespace(_trt=library.module)
    allocator = DeviceEngine.new_output_allocator(engine, asked)
    assert isinstance(allocator, library.module.IOutputAllocator)
    assert allocator.reallocate_output_async("y", 0, 3, 256, 0) == 768
    assert allocator.reallocate_output("y", 0, 2, 256) == 512
    allocator.notify_shape("y", library.module.Dims([2, 3]))
    assert asked.shape == (2, 3)


def test_without_a_gpu_a_session_says_so(library: LoadedFlavour, tmp_path: Path) -> None:
    if Path("/proc/driver/nvidia").exists() or not cuda.bindings_installed():
        pytest.skip("there is a driver, or no cuda-bindings")
    model = save_embedder(tmp_path / "m.onnx")
    options = SessionOptions(device="cuda", axes=AXES)
    with pytest.raises(BackendUnavailableError, match="There is no NVIDIA driver"):
        open_session(model, backend_name="tensorrt-rtx", options=options)


def test_the_fake_module_is_one() -> None:
    assert isinstance(fake_tensorrt.FakeTensorRT(FakeCuda()), ModuleType)
    assert isinstance(INPUTS[0], TensorSpec)
