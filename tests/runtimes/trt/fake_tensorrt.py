"""TensorRT's runtime over fake_cuda, as far as mmedge calls it; engines compute by ONNX Runtime.

A plan is the ONNX graph with its profiles. Failures go to the logger alone, as the library's do.
"""

from __future__ import annotations

import ctypes
import enum
import json
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
from fake_cuda import ALIGNMENT, FakeCuda

from mmedge.runtimes.engines.spec import EngineRequest
from mmedge.specs import Array, as_dim, dim_size

Shape = tuple[int, ...]

_ERROR = 1
_PERSISTENT_BYTES = 1024  # of each execution context
_SCRATCH_PER_ELEMENT = 64
DataType = enum.Enum("DataType", {"FLOAT": "float32", "HALF": "float16", "INT64": "int64"})


class Logger:
    def __init__(self) -> None: ...


def fake_plan(model: Path, request: EngineRequest, *, on_host: Sequence[str] = ()) -> bytes:
    """Return a plan of a graph; shapes follow from the values of inputs that are `on_host`."""
    profiles = [
        {name: (r.min, r.opt, r.max) for name, r in profile.ranges.items()}
        for profile in request.profiles
    ]
    head = json.dumps([profiles, list(on_host)]).encode()
    return head + b"\n" + onnx.load(model).SerializeToString()


class FakeTensorRT(ModuleType):
    """The module.

    Args:
        cuda: Where its engines run.
        name: "tensorrt", or "tensorrt_rtx", which has runtime configurations.
        version: Of the library.

    Attributes:
        done: Counts: "contexts" made, "runs" put into a stream, "captured".
        graphs: Whether TensorRT-RTX was to make graphs, for each context.
        compiled: Outputs whose kernels were not in TensorRT-RTX's cache.
        refuse_start: Whether no runtime can be made, as with a driver that is too old.
        fail_runs: How many of the next runs fail.
    """

    DataType = DataType
    TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")
    TensorLocation = enum.Enum("TensorLocation", "DEVICE HOST")
    ExecutionContextAllocationStrategy = enum.Enum("Strategy", "STATIC USER_MANAGED")
    CudaGraphStrategy = enum.Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")
    ILogger = IOutputAllocator = Logger
    Builder = OnnxParser = None  # checked for presence only

    def __init__(self, cuda: FakeCuda, name: str = "tensorrt", version: str = "10.3.0") -> None:
        super().__init__(name)
        self.cuda, self.version = cuda, version
        self.done: Counter[str] = Counter()
        self.graphs: list[bool] = []
        self.compiled: list[str] = []
        self.refuse_start, self.fail_runs = False, 0
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()

    def Runtime(self, logger: Any) -> Runtime:  # noqa: N802
        if self.refuse_start:
            logger.log(_ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return Runtime(self, logger)


class Runtime:
    def __init__(self, library: FakeTensorRT, logger: Any) -> None:
        self._library, self._logger = library, logger

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        head, graph = plan.split(b"\n", 1)
        code, address = self._library.cuda.cudaMalloc(len(graph))
        if int(code):
            self._logger.log(_ERROR, f"OutOfMemory (Requested size was {len(graph)} bytes.)")
            return None
        kind = RtxEngine if self._library.__name__ == "tensorrt_rtx" else Engine
        return kind(self._library, self._logger, graph, address, *json.loads(head))


class Engine:
    """An ICudaEngine as TensorRT 10.3 has it."""

    def __init__(
        self,
        library: FakeTensorRT,
        logger: Any,
        graph: bytes,
        weights: int,
        profiles: list[Any],
        on_host: list[str],
    ) -> None:
        self.library, self.logger, self.on_host = library, logger, on_host
        weakref.finalize(self, library.cuda.cudaFree, weights).atexit = False
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = 1, 4
        self.session = onnxruntime.InferenceSession(graph, settings)
        self.inputs = {arg.name: arg for arg in self.session.get_inputs()}
        self.outputs = {arg.name: arg for arg in self.session.get_outputs()}
        self.profiles = profiles
        self.num_optimization_profiles = len(profiles)
        self.num_io_tensors = len(self.inputs) + len(self.outputs)
        largest = [{name: each[2] for name, each in profile.items()} for profile in profiles]
        self.device_memory_size_v2 = max(map(self.scratch_bytes, largest), default=1)

    def scratch_bytes(self, shapes: Mapping[str, Sequence[int]]) -> int:
        return sum(_SCRATCH_PER_ELEMENT * int(np.prod(shape)) for shape in shapes.values())

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = FakeTensorRT.TensorIOMode
        if name in self.inputs:
            return modes.INPUT
        return modes.OUTPUT if name in self.outputs else None

    def get_tensor_dtype(self, name: str) -> Any:
        kind = (self.inputs | self.outputs)[name].type[len("tensor(") : -1]
        return DataType({"float": "float32"}.get(kind, kind))

    def get_tensor_shape(self, name: str) -> Shape:
        shape = (self.inputs | self.outputs)[name].shape
        return tuple(n if isinstance(n, int) else -1 for n in shape)

    def get_tensor_location(self, name: str) -> Any:
        places = FakeTensorRT.TensorLocation
        return places.HOST if name in self.on_host else places.DEVICE

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Shape]:
        return [tuple(shape) for shape in self.profiles[profile][name]]

    def create_execution_context(self, _strategy: Any) -> Context | None:
        code, address = self.library.cuda.cudaMalloc(_PERSISTENT_BYTES)
        if int(code):
            self.logger.log(_ERROR, f"OutOfMemory (Requested size was {_PERSISTENT_BYTES} bytes.)")
            return None
        self.library.done["contexts"] += 1
        context = Context(self)
        self.library.contexts.add(context)
        weakref.finalize(context, self.library.cuda.cudaFree, address).atexit = False
        return context


class RuntimeCache:
    """What TensorRT-RTX compiled; taken by the version that wrote it."""

    def __init__(self, version: str) -> None:
        self.version, self.kernels = version, set[str]()

    def serialize(self) -> bytes:
        return json.dumps([self.version, sorted(self.kernels)]).encode()

    def deserialize(self, data: bytes) -> bool:
        try:
            version, kernels = json.loads(data)
        except ValueError:
            return False
        self.kernels |= set(kernels if version == self.version else ())
        return bool(version == self.version)


class RuntimeConfig:
    def __init__(self, version: str) -> None:
        self.cuda_graph_strategy = FakeTensorRT.CudaGraphStrategy.DISABLED
        self.cache = RuntimeCache(version)

    def set_execution_context_allocation_strategy(self, _strategy: Any) -> None: ...

    def create_runtime_cache(self) -> RuntimeCache:
        return self.cache

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        return cache is self.cache


class RtxEngine(Engine):
    """An ICudaEngine as TensorRT-RTX has it: contexts are made from a configuration."""

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.library.version)

    def create_execution_context(self, strategy: RuntimeConfig) -> Context | None:
        disabled = FakeTensorRT.CudaGraphStrategy.DISABLED
        self.library.graphs.append(strategy.cuda_graph_strategy is not disabled)
        kernels = strategy.cache.kernels
        self.library.compiled += [name for name in self.outputs if name not in kernels]
        kernels |= set(self.outputs)
        return super().create_execution_context(strategy)


class Context:
    """An IExecutionContext."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile, self.scratch = engine, 0, 0
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, Any] = {}

    def _refused(self, why: str) -> bool:
        self.engine.logger.log(_ERROR, why)
        return False

    def set_optimization_profile_async(self, index: int, _stream: int) -> bool:
        self.profile, self.shapes = index, {}
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        least, _, most = self.engine.profiles[self.profile][name]
        if not all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True)):
            return self._refused(f"Set dimension {shape} of {name} outside of the profile")
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.engine.on_host and address % ALIGNMENT:
            return self._refused(f"{name} is misaligned")
        self.addresses[name] = address
        return True

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        self.allocators[name] = weakref.ref(allocator)
        return True

    def set_device_memory(self, _address: int, size: int) -> None:
        self.scratch = size

    def update_device_memory_size_for_shapes(self) -> int:
        return self.engine.scratch_bytes(self.shapes)

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> Shape:
        sizes = {
            axis: size
            for given, arg in self.engine.inputs.items()
            for axis, size in zip(arg.shape, self.shapes[given], strict=True)
        }
        for host in self.engine.on_host:  # its first value is the size of the axis "from HOST"
            sizes[f"from {host}"] = ctypes.c_int64.from_address(self.addresses[host]).value
        shape = self.engine.outputs[name].shape
        known = (n if isinstance(n, int) else dim_size(as_dim(n or ""), sizes) for n in shape)
        return tuple(-1 if size is None else size for size in known)

    def execute_async_v3(self, stream: int) -> bool:
        engine, library, cuda = self.engine, self.engine.library, self.engine.library.cuda
        if library.fail_runs:
            library.fail_runs -= 1
            return self._refused("the kernel cannot be launched")
        if self.scratch < engine.scratch_bytes(self.shapes):
            return self._refused(f"activations need more than {self.scratch} bytes")
        shapes, places = dict(self.shapes), dict(self.addresses)
        library.done["captured" if cuda.capturing(stream) else "runs"] += 1

        def array(name: str, shape: Shape) -> Array:
            dtype = np.dtype(engine.get_tensor_dtype(name).value)
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            held = (ctypes.c_uint8 * size).from_address(places[name])
            return np.frombuffer(held, dtype).reshape(shape)

        def work() -> None:
            feed = {name: array(name, shape).copy() for name, shape in shapes.items()}
            for name, found in zip(engine.outputs, engine.session.run(None, feed), strict=True):
                if -1 in self.get_tensor_shape(name):
                    allocator = self.allocators[name]()
                    size = max(found.nbytes, 1)
                    places[name] = allocator.reallocate_output_async(name, 0, size, ALIGNMENT, 0)
                    if not places[name]:
                        return
                    allocator.notify_shape(name, found.shape)
                if found.size:
                    array(name, found.shape)[...] = found

        cuda.put(stream, work)
        return True
