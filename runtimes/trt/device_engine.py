"""An engine on a device: loaded, and checked against its graph."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedge.errors import (
    BackendError,
    BackendUnavailableError,
    EngineMismatchError,
    ShapeError,
    StorageError,
)
from mmedge.files import write_atomic
from mmedge.files.private import UnsafeFileError, read_private
from mmedge.runtimes.cuda.runtime import Device, in_words
from mmedge.runtimes.engines.model_hash import model_label
from mmedge.runtimes.onnx_file import OnnxFile
from mmedge.runtimes.session import EngineOptions
from mmedge.runtimes.trt.flavours import TITLES, BuildLog, LoadedFlavour, new_log
from mmedge.runtimes.trt.network import NUMPY_DTYPES
from mmedge.runtimes.trt.refitting import put_weights
from mmedge.specs import TensorSpec

__all__ = ["DeviceEngine", "EngineTensor", "Shapes"]

Shapes = tuple[tuple[int, ...], ...]
"""A shape for each input, in the graph's order."""

_LOG = logging.getLogger("mmedge.engines")

_MAX_CACHE_BYTES = 1 << 30
_MEMORY_WORDS = ("outofmemory", "out of memory", "memoryallocation", "insufficient_gpu_memory")


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """An input or output of an engine.

    Attributes:
        spec: Its spec, the axes named as in the graph.
        on_host: Whether the engine reads or writes it in host memory.
    """

    spec: TensorSpec
    on_host: bool


class DeviceEngine:
    """An engine on a device.

    Args:
        library: The TensorRT that built it.
        plan: The serialized engine.
        device: The calling thread's current device.
        model: The ONNX file that it was built from.
        graph: Contents of that file; it names the axes.
        options: Its options.
        stripped: Whether it was built without weights, which then come from the ONNX file.
        runtime_cache: File of the kernels that TensorRT-RTX compiles; None for none.

    Attributes:
        device: Its device.
        model: The ONNX file.
        inputs: Its inputs, in the graph's order.
        outputs: Its outputs, in the graph's order.
        name: The library and its version.
        captures_itself: Whether the library makes its own CUDA graphs, as TensorRT-RTX does, which
            knows when its kernels for a shape are compiled.

    Raises:
        EngineMismatchError: If this TensorRT or this GPU cannot run the plan, or it is of another
            graph.
        BackendError: If memory runs out, or the engine cannot stream weights as the options say.
    """

    def __init__(
        self,
        library: LoadedFlavour,
        plan: bytes,
        device: Device,
        *,
        model: Path,
        graph: OnnxFile,
        options: EngineOptions,
        stripped: bool = False,
        runtime_cache: Path | None = None,
    ) -> None:
        self.device = device
        self.model = model
        self.name = f"{TITLES[library.flavour]} {library.version}"
        self._trt: Any = library.module
        self._lock = threading.Lock()
        logger, self._log = new_log(library.module)
        self._logger = logger  # must outlive the objects made with it
        self._runtime = self._start(logger)
        self._engine = self._load(plan)
        if stripped:
            self._put_weights()
        self.inputs = tuple(self._tensor(spec, "INPUT") for spec in graph.inputs)
        self.outputs = tuple(self._tensor(spec, "OUTPUT") for spec in graph.outputs)
        self._check_names()
        count = int(self._engine.num_optimization_profiles)
        self._profiles = tuple(self._bounds(index) for index in range(count))
        self._stream_weights(options.weight_streaming_bytes)
        self._config = self._make_config(options, runtime_cache)
        self.captures_itself = options.graphs > 0 and hasattr(self._config, "cuda_graph_strategy")
        size = getattr(self._engine, "device_memory_size_v2", None)
        self.scratch_bytes = int(self._engine.device_memory_size if size is None else size)

    def profile_for(self, shapes: Shapes) -> int:
        """Return the first optimization profile that covers some shapes.

        Raises:
            ShapeError: If none does; it names the axis and the bounds of every profile.
        """
        for index, bounds in enumerate(self._profiles):
            if all(
                low <= size <= high
                for shape, (minimum, maximum) in zip(shapes, bounds, strict=True)
                for low, size, high in zip(minimum, shape, maximum, strict=True)
            ):
                return index
        raise self._outside(shapes)

    def new_context(self) -> Any:  # noqa: ANN401, an IExecutionContext
        """Return a new execution context, without activation memory.

        Raises:
            BackendError: If TensorRT fails, most often because memory runs out.
        """
        with self._lock:
            context = self._engine.create_execution_context(self._config)
            if context is None:
                raise self.failed("an execution context cannot be created")
        return context

    def new_output_allocator(self, allocate: Any) -> Any:  # noqa: ANN401
        """Return an IOutputAllocator.

        Args:
            allocate: Object with `reallocate(size_bytes) -> address` and a `shape` to be set.
        """
        base: Any = self._trt.IOutputAllocator

        class Allocator(base):  # type: ignore[misc]
            def __init__(self) -> None:
                base.__init__(self)  # the binding rejects super()

            def reallocate_output(self, _name: str, _memory: int, size: int, _align: int) -> int:
                return int(allocate.reallocate(size))

            def reallocate_output_async(
                self, _name: str, _memory: int, size: int, _align: int, _stream: int
            ) -> int:
                return int(allocate.reallocate(size))

            def notify_shape(self, _name: str, shape: Any) -> None:  # noqa: ANN401
                allocate.shape = tuple(shape)

        return Allocator()

    def check(self, done: object, what: str) -> None:
        """Raise if a TensorRT call failed, with the reason from its log.

        Raises:
            BackendError: If `done` is false.
        """
        if not done:
            raise self.failed(what)

    def failed(self, what: str) -> BackendError:
        """Return the error for a failed call, with TensorRT's messages."""
        logged = self._logged(self.scratch_bytes, f"{self.model}: {what}")
        if isinstance(logged, BackendError):
            return logged
        return BackendError(f"{self.model}: {self.name}: {what}: {logged or 'no reason given'}")

    def save_runtime_cache(self) -> None:
        """Save compiled kernels to the runtime cache."""
        if self._runtime_cache is not None:
            self._runtime_cache.save()

    def _logged(self, size_bytes: int, what: str) -> str | BackendError:
        """Return TensorRT's messages, or the error if memory ran out for `what`."""
        logged = " ".join(" ".join(self._log.errors).split())
        self._log.errors.clear()
        logged = logged if len(logged) <= 600 else f"{logged[:600]}..."
        if any(word in logged.lower() for word in _MEMORY_WORDS):
            return self.device.out_of_memory(size_bytes, what, logged)
        return logged

    def _start(self, logger: Any) -> Any:  # noqa: ANN401, an IRuntime
        try:
            return self._trt.Runtime(logger)
        except TypeError as error:  # from a null pointer
            raise BackendUnavailableError(
                f"{self.name} does not start on {self.device.properties.name}: "
                f"{self._logged(0, 'TensorRT') or 'no reason given'}. It may be built for a newer "
                "CUDA than the driver supports: update the driver, or install the TensorRT for the "
                "driver's CUDA (such as tensorrt-cu12); `mmedge doctor` names both."
            ) from error

    def _load(self, plan: bytes) -> Any:  # noqa: ANN401, an ICudaEngine
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is not None:
            return engine
        logged = self._logged(len(plan), f"the engine of {self.model}")
        if isinstance(logged, BackendError):
            raise logged
        found = self.device.properties
        raise self._mismatch(
            f"cannot be loaded by {self.name} on {found.name} (compute capability "
            f"{found.compute_capability}): {logged or 'no reason given'}. It was built for another "
            "version or GPU, or is damaged"
        )

    def _put_weights(self) -> None:
        wrong = put_weights(self._trt, self._logger, self._engine, self.model)
        if not wrong:
            return
        logged = self._logged(0, f"the weights of {self.model}")
        if isinstance(logged, BackendError):
            raise logged
        raise self._mismatch(
            f"was built without weights, and {self.name} cannot put them in from this file: {wrong}"
            f"{f' ({logged})' if logged else ''}",
            " without --stripped",
        )

    def _mismatch(self, what: str, how: str = "") -> EngineMismatchError:
        return EngineMismatchError(
            f"{self.model}: its engine {what}. Remove it with `mmedge cache prune --model "
            f"'{model_label(self.model)}'`, and build it again with `mmedge build`{how}."
        )

    def _tensor(self, spec: TensorSpec, mode: str) -> EngineTensor:
        engine, name = self._engine, spec.name
        if engine.get_tensor_mode(name) != getattr(self._trt.TensorIOMode, mode):
            raise self._mismatch(f"is of another graph: it has no {mode.lower()} '{name}'")
        kind = engine.get_tensor_dtype(name).name
        shape = tuple(engine.get_tensor_shape(name))
        fits = len(shape) == len(spec.shape) and all(
            size in (-1, expected) or isinstance(expected, str)
            for size, expected in zip(shape, spec.shape, strict=True)
        )
        if NUMPY_DTYPES.get(kind) != spec.dtype.name or not fits:
            raise self._mismatch(f"is of another graph: '{name}' is {kind}{shape}, expected {spec}")
        return EngineTensor(
            spec,
            engine.get_tensor_location(name) == self._trt.TensorLocation.HOST,
        )

    def _check_names(self) -> None:
        held = {self._engine.get_tensor_name(n) for n in range(self._engine.num_io_tensors)}
        known = {tensor.spec.name for tensor in (*self.inputs, *self.outputs)}
        if held != known:
            what = f"it has {sorted(held)}, expected {sorted(known)}"
            raise self._mismatch(f"is of another graph: {what}")

    def _bounds(self, profile: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """Return the min and max shape of each input in a profile."""
        found = []
        for tensor in self.inputs:
            shapes = self._engine.get_tensor_profile_shape(tensor.spec.name, profile)
            found.append((tuple(shapes[0]), tuple(shapes[2])))
        return tuple(found)

    def _outside(self, shapes: Shapes) -> ShapeError:
        wrong = ""
        ranges = []
        for index, bounds in enumerate(self._profiles):
            axes: dict[str, str] = {}
            for tensor, shape, (minimum, maximum) in zip(self.inputs, shapes, bounds, strict=True):
                name = tensor.spec.name
                for axis, size, low, high in zip(
                    tensor.spec.shape, shape, minimum, maximum, strict=True
                ):
                    if isinstance(axis, str):
                        axes[axis] = f"'{axis}' {low} to {high}"
                        if not low <= size <= high and not wrong:
                            wrong = f"Input '{name}': got {shape}, axis '{axis}' is {size}"
            ranges.append(f"profile {index}: {', '.join(axes.values())}")
        return ShapeError(
            f"{wrong or f'Inputs {shapes}'}; the engine was built for {'; '.join(ranges)}. Split "
            "the batch, shorten the inputs, or build an engine for larger axes (`mmedge build`, or "
            "SessionOptions.axes)."
        )

    def _stream_weights(self, budget_bytes: int | None) -> None:
        streamable = int(getattr(self._engine, "streamable_weights_size", 0))
        if not streamable:
            if budget_bytes is not None:
                raise BackendError(
                    f"{self.model}: weight_streaming_bytes is {budget_bytes}, but its engine was "
                    "built without weight streaming. Build it with --weight-streaming, or leave "
                    "the option out."
                )
            return
        if not hasattr(self._engine, "weight_streaming_budget_v2"):
            raise BackendError(
                f"{self.model}: {self.name} cannot limit the weights on the device. Use TensorRT "
                "10.1 or newer."
            )
        wanted = streamable if budget_bytes is None else min(budget_bytes, streamable)
        self._engine.weight_streaming_budget_v2 = wanted
        if self._engine.weight_streaming_budget_v2 != wanted:
            raise self.failed(f"a budget of {in_words(wanted)} for its weights is refused")

    def _make_config(self, options: EngineOptions, runtime_cache: Path | None) -> Any:  # noqa: ANN401
        """Return a runtime config for execution contexts, or a strategy in older versions.

        Contexts own no activation memory: all contexts of a slot share one block.
        """
        self._runtime_cache: _RuntimeCache | None = None
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self._engine, "create_runtime_config"):  # TensorRT before 10.11
            return strategy
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if options.graphs and hasattr(config, "cuda_graph_strategy"):
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if runtime_cache is not None and hasattr(config, "create_runtime_cache"):
            cache = config.create_runtime_cache()
            self._runtime_cache = _RuntimeCache(cache, runtime_cache, self._log)
            self.check(config.set_runtime_cache(cache), "its runtime cache cannot be set")
        return config


class _RuntimeCache:
    """TensorRT-RTX's compiled kernels for this GPU, in a file.

    The library ignores a file that is damaged or of another version or GPU.
    """

    def __init__(self, cache: Any, path: Path, log: BuildLog) -> None:  # noqa: ANN401
        self._cache = cache
        self._path = path
        self._lock = threading.Lock()
        self._saved = b""
        try:
            self._saved = read_private(path, _MAX_CACHE_BYTES)
        except FileNotFoundError:
            return  # the first process on this machine
        except (UnsafeFileError, StorageError) as error:
            _LOG.warning("%s: cannot be read, kernels are compiled again: %s", path, str(error))
            return
        if not cache.deserialize(self._saved):
            _LOG.info("%s: rejected by TensorRT-RTX, kernels are compiled again", path)
            log.errors.clear()
            self._saved = b""

    def save(self) -> None:
        with self._lock:
            blob = self._cache.serialize()
            data = b"" if blob is None else bytes(blob)
            if not data or data == self._saved:
                return
            try:
                write_atomic(self._path, data, private=True)
            except StorageError as error:
                _LOG.warning("The runtime cache cannot be saved: %s", str(error))
            self._saved = data
