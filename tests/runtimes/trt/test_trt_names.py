"""Names of TensorRT and CUDA that mmedge uses, in the real bindings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_cuda import FakeCuda
from fake_gpu import AXES
from tiny_graphs import INPUTS, OUTPUTS, save_embedder

import mmedge.runtimes.cuda.runtime as cuda
from mmedge.errors import BackendUnavailableError, EngineMismatchError
from mmedge.runtimes import EngineOptions, SessionOptions, open_session, trt
from mmedge.runtimes.onnx_file import OnnxFile
from mmedge.runtimes.trt import network
from mmedge.runtimes.trt.device_engine import DeviceEngine
from mmedge.runtimes.trt.flavours import LoadedFlavour, installed_version, load_flavour

# What mmedge uses of each class, in every version.
USED = {
    "Runtime": "deserialize_cuda_engine",
    "ICudaEngine": "num_io_tensors num_optimization_profiles get_tensor_name get_tensor_mode "
    "get_tensor_dtype get_tensor_shape get_tensor_location "
    "get_tensor_profile_shape create_execution_context streamable_weights_size "
    "create_engine_inspector",
    "IExecutionContext": "set_optimization_profile_async set_input_shape set_tensor_address "
    "set_output_allocator infer_shapes get_tensor_shape execute_async_v3 "
    "update_device_memory_size_for_shapes",
    "Refitter": "get_missing_weights refit_cuda_engine",
    "OnnxParserRefitter": "refit_from_file num_errors get_error",
    "ParserError": "desc node node_name node_operator",
    "Builder": "create_network create_builder_config create_optimization_profile "
    "build_serialized_network",
    "BuilderFlag": "TF32 REFIT WEIGHT_STREAMING STRIP_PLAN REFIT_IDENTICAL",
    "IBuilderConfig": "set_flag clear_flag set_memory_pool_limit add_optimization_profile "
    "create_timing_cache set_timing_cache get_timing_cache progress_monitor profiling_verbosity",
    "IOptimizationProfile": "set_shape",
    "INetworkDefinition": "num_inputs num_outputs num_layers get_input get_output get_layer",
    "ILayer": "name type num_inputs num_outputs get_input get_output",
    "ITensor": "name dtype shape is_shape_tensor",
    "ITimingCache": "serialize",
    "OnnxParser": "parse_from_file num_errors get_error",
    "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
    "EngineInspector": "get_engine_information",
    "LayerInformationFormat": "JSON",
    "LayerType": " ".join((*network._MOVING, "CONSTANT", "DEQUANTIZE", "MATRIX_MULTIPLY")),
    "MemoryPoolType": "WORKSPACE",
    "ProfilingVerbosity": "DETAILED",
    "IProgressMonitor": "phase_start step_complete phase_finish",
    "TensorIOMode": "INPUT OUTPUT",
    "TensorLocation": "HOST",
    "ExecutionContextAllocationStrategy": "USER_MANAGED",
}
# Used only if present -> the substitute; "" for an error.
STAND_INS = {
    ("ICudaEngine", "device_memory_size_v2"): "device_memory_size",
    ("IExecutionContext", "set_device_memory"): "device_memory",
    ("ICudaEngine", "weight_streaming_budget_v2"): "",
}
NAMES = json.loads(Path(__file__).with_name("tensorrt_names.json").read_text())
PAIRS = [(name, word) for name, words in USED.items() for word in words.split()]
SOURCE = "\n".join(path.read_text("utf-8") for path in Path(trt.__path__[0]).glob("*.py"))


@pytest.fixture(scope="module")
def library() -> LoadedFlavour:
    if installed_version("tensorrt-rtx") is None:
        pytest.skip("needs tensorrt-rtx")
    return load_flavour("tensorrt-rtx")


@pytest.mark.parametrize("version", NAMES["versions"])
def test_every_tensorrt_has_the_names_that_are_used(version: str) -> None:
    """From the list of TensorRT's bindings that checks/tensorrt_names.py wrote."""

    def has(name: str, word: str) -> bool:
        return version not in NAMES["lacking"][name].get(word, [version])

    assert [pair for pair in PAIRS if not has(*pair)] == []
    for (name, word), other in STAND_INS.items():
        assert has(name, word) or (version == "10.0.1" and (not other or has(name, other)))
    older = NAMES["lacking"]["ICudaEngine"]["create_runtime_config"]
    assert older == ["10.0.1", "10.3.0", "10.10.0.31"]
    assert NAMES["lacking"]["IRuntimeConfig"]["set_execution_context_allocation_strategy"] == older


def test_tensorrt_rtx_has_the_names_that_are_used(library: LoadedFlavour) -> None:
    more = [
        ("IRuntimeConfig", "cuda_graph_strategy"),
        ("IRuntimeConfig", "set_execution_context_allocation_strategy"),
        ("IRuntimeConfig", "create_runtime_cache"),
        ("IRuntimeConfig", "set_runtime_cache"),
        ("IRuntimeCache", "serialize"),
        ("IRuntimeCache", "deserialize"),
        ("CudaGraphStrategy", "WHOLE_GRAPH_CAPTURE"),
        ("ComputeCapability", "CURRENT"),
    ]
    lacking = {
        (name, word)
        for name, word in (*PAIRS, *STAND_INS, *more)
        if not hasattr(getattr(library.module, name, None), word)
    }
    assert {name for name, _ in lacking} <= {"NetworkDefinitionCreationFlag", "ITimingCache"}


def test_every_listed_name_is_used() -> None:
    assert [word for _, word in (*PAIRS, *STAND_INS) if not re.search(rf"\b{word}\b", SOURCE)] == []


# Every call as mmedge makes it, with null handles: without a driver the bindings only return.
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
    ("cudaMemcpyAsync", 4096, 8192, 16, to_device, 0),
    ("cudaStreamBeginCapture", 0, mode.cudaStreamCaptureModeThreadLocal),
    ("cudaStreamEndCapture", 0), ("cudaGraphInstantiate", graph, 0), ("cudaGraphDestroy", graph),
    ("cudaGraphLaunch", launched, 0), ("cudaGraphExecDestroy", launched),
]
results = {}
for name, *arguments in calls:
    code, *values = getattr(r, name)(*arguments)
    results[name] = [int(code), len(values)]
print(json.dumps(results))
"""


def test_cudas_bindings_take_what_mmedge_passes() -> None:
    if Path("/proc/driver/nvidia").exists() or not cuda.bindings_installed():
        pytest.skip("there is a driver, or no cuda-bindings")
    done = subprocess.run(
        [sys.executable, "-c", _CALLS], check=True, capture_output=True, text=True, timeout=60
    )
    outputs = json.loads(done.stdout)
    real, fake = cuda.load_bindings(), vars(FakeCuda)
    functions = {name for name in fake if name.startswith("cuda") and callable(fake[name])}
    functions -= {name for name in functions if isinstance(fake[name], type)}
    assert set(outputs) == functions
    assert {code for code, _ in outputs.values()} == {0, 35}  # cudaErrorInsufficientDriver
    assert {name: n for name, (_, n) in outputs.items() if n > 1} == {"cudaMemGetInfo": 2}
    for name, value in fake.items():
        if isinstance(value, type):
            for word, number in value.__members__.items():  # type: ignore[attr-defined]
                assert int(getattr(getattr(real, name), word)) == int(number)


def test_the_library_itself_gives_the_reason_for_a_refused_plan(library: LoadedFlavour) -> None:
    device: Any = SimpleNamespace(
        index=0, properties=SimpleNamespace(name="a GPU", compute_capability="8.9")
    )
    graph = OnnxFile(10, 20, INPUTS, OUTPUTS, has_fp16=False, external_data=())
    options = EngineOptions()
    with pytest.raises(EngineMismatchError, match=r"m\.onnx: its engine.*[Ss]erializ"):
        DeviceEngine(
            library, b"no plan" * 999, device, model=Path("m.onnx"), graph=graph, options=options
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


@pytest.mark.usefixtures("library")
def test_without_a_gpu_a_session_is_an_error(tmp_path: Path) -> None:
    if Path("/proc/driver/nvidia").exists() or not cuda.bindings_installed():
        pytest.skip("there is a driver, or no cuda-bindings")
    model = save_embedder(tmp_path / "m.onnx")
    options = SessionOptions(device="cuda", axes=AXES)
    with pytest.raises(BackendUnavailableError, match="There is no NVIDIA driver"):
        open_session(model, backend_name="tensorrt-rtx", options=options)
