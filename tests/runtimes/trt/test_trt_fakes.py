"""The fakes offer nothing that the libraries lack, and what needs no GPU is tried on these."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import fake_builder
import fake_tensorrt
import pytest
from fake_cuda import FakeCuda
from fake_gpu import AXES
from tiny_graphs import INPUTS, OUTPUTS, save_embedder

from mmedge.errors import BackendUnavailableError, EngineMismatchError
from mmedge.runtimes import EngineOptions, SessionOptions, open_session
from mmedge.runtimes.cuda import runtime as cuda
from mmedge.runtimes.onnx_file import OnnxFile
from mmedge.runtimes.trt import network
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


# Fakes of TensorRT 10 and 11 -> the library's classes; by value where a fake shares its class.
BINDINGS = [
    (fake_tensorrt.Runtime, "Runtime"),
    (fake_tensorrt.Engine, "ICudaEngine"),
    (fake_tensorrt.Context, "IExecutionContext"),
    (fake_tensorrt.Refitter, "Refitter"),
    (fake_tensorrt.OnnxParserRefitter, "OnnxParserRefitter"),
    (fake_tensorrt.RefitError, "ParserError"),
    (fake_tensorrt.DataType, "DataType"),
    (fake_tensorrt.TensorIOMode, "TensorIOMode"),
    (fake_tensorrt.TensorLocation, "TensorLocation"),
    (fake_tensorrt.ExecutionContextAllocationStrategy, "ExecutionContextAllocationStrategy"),
    (fake_builder.Builder, "Builder"),
    (fake_builder.BuilderFlag, "BuilderFlag"),
    (fake_builder.Config, "IBuilderConfig"),
    (fake_builder.Profile, "IOptimizationProfile"),
    (fake_builder.Network, "INetworkDefinition"),
    (fake_builder.Layer, "ILayer"),
    (fake_builder.Tensor, "ITensor"),
    (fake_builder.TimingCache, "ITimingCache"),
    (fake_builder.Parser, "OnnxParser"),
    (fake_builder.ParserError, "ParserError"),
    (fake_builder.NewCreationFlag, "NetworkDefinitionCreationFlag"),
    (fake_builder.DataType, "DataType"),
    (fake_builder._Inspector, "EngineInspector"),
]
NAMES = json.loads(Path(__file__).with_name("tensorrt_names.json").read_text())
# What is asked for only where it is there, and what stands in for it where it is not.
STAND_INS = {
    "10.0.1": {
        "device_memory_size_v2": "device_memory_size",
        "set_device_memory": "device_memory",
        "weight_streaming_budget_v2": "",  # refused
    }
}


@pytest.fixture(scope="module")
def library() -> LoadedFlavour:
    if installed_version("tensorrt-rtx") is None:
        pytest.skip("needs tensorrt-rtx")
    return load_flavour("tensorrt-rtx")


@pytest.mark.parametrize("version", NAMES["versions"])
def test_what_the_fakes_offer_every_tensorrt_has(version: str) -> None:
    """By what checks/tensorrt_names.py wrote down of TensorRT's own bindings."""

    def has(name: str, word: str) -> bool:
        return version not in NAMES["lacking"][name].get(word, [version])

    missing = {
        (name, word)
        for fake, name in BINDINGS
        for word in (*vars(fake), *getattr(fake, "__annotations__", ()))
        if not word.startswith("_") and word not in OWN and not has(name, word)
    }
    stand_ins = STAND_INS.get(version, {})
    missing -= {("ParserError", "name"), ("ParserError", "operator"), ("ILayer", "kind")}  # its own
    assert {word for _, word in missing} == set(stand_ins)
    for name, word in missing:
        assert not stand_ins[word] or has(name, stand_ins[word])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("LayerType", (*network._MOVING, "CONSTANT", "DEQUANTIZE", "MATRIX_MULTIPLY")),
        ("LayerInformationFormat", ("JSON",)),
        ("MemoryPoolType", ("WORKSPACE",)),
        ("ProfilingVerbosity", ("DETAILED",)),
        ("IProgressMonitor", ("phase_start", "step_complete", "phase_finish")),
    ],
)
def test_words_that_every_tensorrt_has(name: str, words: tuple[str, ...]) -> None:
    assert [NAMES["lacking"][name].get(word) for word in words] == [[] for _ in words]


def test_contexts_are_made_from_a_configuration_where_there_is_one() -> None:
    lacking = NAMES["lacking"]
    older = lacking["ICudaEngine"]["create_runtime_config"]
    assert older == ["10.0.1", "10.3.0", "10.10.0.31"]
    config = lacking["IRuntimeConfig"]
    assert config["set_execution_context_allocation_strategy"] == older
    # TensorRT-RTX's own.
    assert not {"cuda_graph_strategy", "create_runtime_cache"} & set(config)


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


# Every call as mmedge makes it, handles null: without a driver the bindings answer, and do nothing.
_CALLS = """
import json
from cuda.bindings import runtime as r
to_device, mode = r.cudaMemcpyKind.cudaMemcpyHostToDevice, r.cudaStreamCaptureMode
stream, event = r.cudaStream_t(0), r.cudaEvent_t(0)
graph, launched = r.cudaGraph_t(0), r.cudaGraphExec_t(0)
calls = [
    ("cudaDriverGetVersion",), ("cudaRuntimeGetVersion",), ("cudaGetDeviceCount",),
    ("cudaGetErrorName", r.cudaError_t(2)), ("cudaGetErrorString", r.cudaError_t(2)),
    ("cudaGetDeviceProperties", 0), ("cudaGetDevice",), ("cudaSetDevice", 0), ("cudaMemGetInfo",),
    ("cudaMalloc", 256), ("cudaHostAlloc", 256, r.cudaHostAllocPortable), ("cudaFree", 0),
    ("cudaFreeHost", 0), ("cudaPointerGetAttributes", 4096),
    ("cudaStreamCreateWithFlags", r.cudaStreamNonBlocking), ("cudaStreamSynchronize", 0),
    ("cudaStreamWaitEvent", 0, 0, 0), ("cudaStreamDestroy", stream),
    ("cudaEventCreateWithFlags", r.cudaEventDisableTiming | r.cudaEventBlockingSync),
    ("cudaEventRecord", event, 0), ("cudaEventSynchronize", event), ("cudaEventDestroy", event),
    ("cudaEventElapsedTime", event, event),
    ("cudaMemcpyAsync", 4096, 8192, 16, to_device, 0),
    ("cudaStreamBeginCapture", 0, mode.cudaStreamCaptureModeThreadLocal),
    ("cudaStreamEndCapture", 0), ("cudaGraphInstantiate", graph, 0), ("cudaGraphDestroy", graph),
    ("cudaGraphLaunch", launched, 0), ("cudaGraphExecDestroy", launched),
]
answers = {}
for name, *arguments in calls:
    code, *values = getattr(r, name)(*arguments)
    answers[name] = [int(code), len(values)]
print(json.dumps(answers))
"""


def test_the_bindings_take_what_mmedge_passes() -> None:
    if Path("/proc/driver/nvidia").exists() or not cuda.bindings_installed():
        pytest.skip("there is a driver, or no cuda-bindings")
    done = subprocess.run(
        [sys.executable, "-c", _CALLS], check=True, capture_output=True, text=True, timeout=60
    )
    answers = json.loads(done.stdout)
    functions = {name for name in vars(FakeCuda) if name.startswith("cuda")}
    assert set(answers) == {
        name for name in functions if inspect.isfunction(getattr(FakeCuda, name))
    }
    assert {code for code, _ in answers.values()} == {0, 35}  # cudaErrorInsufficientDriver
    assert {name: count for name, (_, count) in answers.items() if count > 1} == {
        "cudaMemGetInfo": 2
    }


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
