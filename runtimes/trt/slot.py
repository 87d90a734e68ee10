"""Execution slot: a stream, buffers, and execution contexts with CUDA graphs.

A CUDA graph is valid only while the execution context it was captured from is unchanged (TensorRT's
developer guide, "CUDA Graphs"). So each shape with a graph has its own context. Contexts share the
slot's buffers and one block of activation memory, as only one of them runs at a time.

The first call of a shape is enqueued piece by piece, since TensorRT does work in it that cannot be
captured. The second is captured and launched; from the third on a call is one launch, copies
included.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from mmedge.errors import BackendError, InputError
from mmedge.runtimes.cuda.arrays import DeviceArray, DeviceView
from mmedge.runtimes.cuda.runtime import DeviceMemory
from mmedge.runtimes.cuda.streams import Event, Graph, Stream
from mmedge.runtimes.session import SessionOptions
from mmedge.runtimes.trt.device_engine import DeviceEngine, EngineTensor, Shapes
from mmedge.runtimes.trt.slot_memory import Buffer, GrowingOutput, size_bytes
from mmedge.specs import Array

__all__ = ["Call", "ExecutionSlot", "OutputPlace", "Prepared"]

_LOG = logging.getLogger("mmedge.engines")

OutputPlace: TypeAlias = Literal["host", "new", "bound"]
"""Output destination: host, new device memory in each call, or the same memory in all calls."""


@dataclass(frozen=True, slots=True)
class Call:
    """Everything that a CUDA graph of a call depends on.

    Attributes:
        shapes: Of the inputs.
        addresses: Of the inputs on the device, 0 for inputs from the host.
        values: Bytes of each input that the engine reads on the host.
        outputs: Their destination.
    """

    shapes: Shapes
    addresses: tuple[int, ...]
    values: tuple[bytes, ...] = ()
    outputs: OutputPlace = "host"


@dataclass(eq=False)
class Prepared:
    """An execution context and the call that it is set up for.

    Attributes:
        context: The IExecutionContext.
        call: The call that it is set up for.
        shapes: Of the outputs whose shapes depend on the call alone.
        results: Memory of outputs that stay on the device.
        growing: Outputs whose shapes are known only after the run.
        graph: The captured graph.
    """

    context: Any
    call: Call | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    results: dict[str, DeviceMemory] = field(default_factory=dict)
    growing: dict[str, GrowingOutput] = field(default_factory=dict)
    graph: Graph | None = None
    _profile: int = -1
    _runs: int = 0
    _refused: bool = False
    _allocators: list[Any] = field(default_factory=list)  # TensorRT holds no references

    def reset(self) -> None:
        """Drop everything but the context."""
        if self.graph is not None:
            self.graph.free()
        self.graph = self.call = None
        self._runs, self._refused = 0, False
        self.results = {}


class ExecutionSlot:
    """Resources of one call at a time. The thread's current device must be the engine's.

    Args:
        engine: The engine.
        options: Graphs, activation memory, spinning.
        page_locked: Addresses of inputs in page-locked memory of the caller, by name; the others go
            through page-locked memory of the slot.

    Attributes:
        stream: Its CUDA stream.

    Raises:
        BackendError: If memory runs out.
    """

    def __init__(
        self,
        engine: DeviceEngine,
        options: SessionOptions,
        page_locked: Mapping[str, int] | None = None,
    ) -> None:
        self._engine = engine
        self._device = engine.device
        graphs = options.engine.graphs
        self._own_graphs = graphs > 0 and not engine.captures_itself
        # Without CUDA graphs one context serves all shapes.
        self._limit = graphs if self._own_graphs else 1
        self._as_needed = options.engine.scratch == "needed"
        self._page_locked = dict(page_locked or {})
        self.stream = Stream(engine.device)
        self._done = None if options.spin else Event(engine.device, blocking=True)
        self._buffers = {
            tensor.spec.name: Buffer(
                engine.device,
                tensor.spec,
                f"{kind} '{tensor.spec.name}' of {engine.model}",
                on_device=not tensor.on_host,
            )
            for kind, tensors in (("input", engine.inputs), ("output", engine.outputs))
            for tensor in tensors
        }
        self._scratch: DeviceMemory | None = None
        self._prepared: OrderedDict[Call, Prepared] = OrderedDict()
        self._spare: list[Prepared] = []

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run on host arrays that match the specs; return new host arrays.

        Raises:
            ShapeError: If no profile covers the shapes; the slot is unchanged.
            BackendError: If something fails; the slot is unusable afterwards.
        """
        prepared = self.prepare(self.call_of(feed, {}, "host"), feed)
        self.launch(prepared)
        self.wait()
        return {name: array.copy() for name, array in self.host_outputs(prepared).items()}

    def run_on_device(
        self, feed: Mapping[str, Array], views: Mapping[str, DeviceView]
    ) -> dict[str, DeviceArray]:
        """Run on host and device arrays; return new device arrays.

        Raises:
            InputError: If no profile covers the shapes, or an input must be on the host.
            BackendError: As run.
        """
        prepared = self.prepare(self.call_of(feed, views, "new"), feed)
        for tensor in self._engine.outputs:
            name = tensor.spec.name
            if name in prepared.shapes and not tensor.on_host:
                memory = self._result(tensor, prepared.shapes[name])
                prepared.results[name] = memory
                self._set_address(prepared, name, memory.address)
        self.launch(prepared)
        self.wait()
        outputs = self.device_outputs(prepared)
        prepared.results = {}
        for growing in prepared.growing.values():
            growing.memory = None  # the caller's now
        return outputs

    def call_of(
        self, feed: Mapping[str, Array], views: Mapping[str, DeviceView], outputs: OutputPlace
    ) -> Call:
        """Return the call for some inputs, each on the host or on the device.

        Raises:
            InputError: If an input on the device is read on the host.
        """
        shapes, addresses, values = [], [], []
        for tensor in self._engine.inputs:
            name = tensor.spec.name
            seen = views.get(name)
            if seen is not None and tensor.on_host:
                raise InputError(
                    f"Input '{name}': is on the device, but the engine reads it on the host, since "
                    "shapes depend on it. Pass a numpy array."
                )
            shapes.append(feed[name].shape if seen is None else seen.shape)
            addresses.append(0 if seen is None else seen.address)
            if tensor.on_host:
                values.append(feed[name].tobytes())
        return Call(tuple(shapes), tuple(addresses), tuple(values), outputs)

    def prepare(self, call: Call, feed: Mapping[str, Array]) -> Prepared:
        """Stage host inputs for copying, and return a context for a call.

        Raises:
            ShapeError, BackendError: As run.
        """
        known = self._prepared.get(call)
        if known is not None:
            self.fill(feed)
            self._prepared.move_to_end(call)
            return known
        profile = self._engine.profile_for(call.shapes)
        self._make_room(call)
        self.fill(feed)
        prepared = self._context()
        self._set_up(prepared, call, profile)
        self._prepared[call] = prepared
        return prepared

    def fill(self, feed: Mapping[str, Array]) -> None:
        """Copy host arrays to page-locked memory, unless they are page-locked."""
        for name, array in feed.items():
            if name not in self._page_locked:
                np.copyto(self._buffers[name].array(array.shape), array)

    def launch(self, prepared: Prepared) -> None:
        """Enqueue a prepared call, as a CUDA graph where possible.

        Raises:
            BackendError: If it fails.
        """
        if prepared.graph is None and self._can_capture(prepared):
            self._capture(prepared)
        if prepared.graph is not None:
            prepared.graph.launch(self.stream)
        else:
            self._enqueue(prepared)
        prepared._runs += 1

    def wait(self) -> None:
        """Wait until all work in the stream is done.

        Raises:
            BackendError: If something in it failed.
        """
        if self._done is None:
            self.stream.synchronize()
        else:
            self._done.record(self.stream.handle)
            self._done.synchronize()

    def host_outputs(self, prepared: Prepared) -> dict[str, Array]:
        """Return the outputs of a finished call on the host, in the slot's memory.

        Raises:
            BackendError: If TensorRT did not report a shape, or memory runs out.
        """
        for name, growing in prepared.growing.items():
            shape, buffer = self._reported_shape(growing), self._buffers[name]
            buffer.reserve(shape)
            size = size_bytes(shape, growing.spec)
            if size and growing.memory is not None:
                self.stream.copy_to_host(buffer.host_address, growing.memory.address, size)
        if prepared.growing:
            self.wait()
        return {
            tensor.spec.name: self._buffers[tensor.spec.name].array(
                self._shape_of(prepared, tensor.spec.name)
            )
            for tensor in self._engine.outputs
        }

    def device_outputs(self, prepared: Prepared) -> dict[str, DeviceArray]:
        """Return the outputs of a finished call, on the device.

        Raises:
            BackendError: As host_outputs.
        """
        outputs = {}
        for tensor in self._engine.outputs:
            name = tensor.spec.name
            shape = self._shape_of(prepared, name)
            if name in prepared.growing:
                memory = prepared.growing[name].memory or self._result(tensor, shape)
            elif tensor.on_host:
                memory = self._result(tensor, shape)
                size = size_bytes(shape, tensor.spec)
                source = self._buffers[name].host_address
                self.stream.copy_to_device(memory.address, source, size)
                self.wait()
            else:
                memory = prepared.results[name]
            outputs[name] = DeviceArray(memory, shape, tensor.spec.dtype)
        return outputs

    def close(self) -> None:
        """Free everything after the work in the stream is done.

        Raises:
            BackendError: If something in the stream failed.
        """
        self.stream.synchronize()
        for prepared in (*self._prepared.values(), *self._spare):
            prepared.reset()
        self._prepared.clear()  # contexts before their memory
        self._spare.clear()
        self._buffers.clear()
        self._scratch = None
        self.stream.free()

    def _context(self) -> Prepared:
        """Return an unused context, evicting the least recently used."""
        if self._spare:
            return self._spare.pop()
        if len(self._prepared) < self._limit:
            return Prepared(self._engine.new_context())
        _, prepared = self._prepared.popitem(last=False)
        prepared.reset()
        return prepared

    def _reset_all(self) -> None:
        """Drop all graphs and addresses after memory has moved."""
        for prepared in self._prepared.values():
            prepared.reset()
            self._spare.append(prepared)
        self._prepared.clear()

    def _make_room(self, call: Call) -> None:
        """Grow the input buffers for a new call."""
        moved = [
            self._buffers[tensor.spec.name].reserve(shape)
            for tensor, shape, address in zip(
                self._engine.inputs, call.shapes, call.addresses, strict=True
            )
            if not address
        ]
        if any(moved):
            self._reset_all()

    def _set_up(self, prepared: Prepared, call: Call, profile: int) -> None:
        """Set the shapes and addresses of a call on a context."""
        engine, context = self._engine, prepared.context
        if profile != prepared._profile:
            done = context.set_optimization_profile_async(profile, self.stream.handle)
            engine.check(done, f"optimization profile {profile} is refused")
            prepared._profile = profile
        for tensor, shape, address in zip(engine.inputs, call.shapes, call.addresses, strict=True):
            name = tensor.spec.name
            engine.check(context.set_input_shape(name, shape), f"'{name}' of {shape} is refused")
            self._set_address(prepared, name, address or self._input_address(tensor))
        if missing := context.infer_shapes():
            raise engine.failed(f"the inputs do not set all shapes, {missing} are unknown")
        prepared.shapes = {}
        moved = False
        for tensor in engine.outputs:
            name = tensor.spec.name
            shape = tuple(int(size) for size in context.get_tensor_shape(name))
            if name in prepared.growing or any(size < 0 for size in shape):
                self._let_grow(prepared, tensor)
                continue
            prepared.shapes[name] = shape
            if call.outputs == "host" or tensor.on_host:
                moved |= self._buffers[name].reserve(shape)
        moved |= self._reserve_scratch(context)
        if moved:
            self._reset_all()
        for tensor in engine.outputs:
            name = tensor.spec.name
            if name not in prepared.shapes:
                continue
            if call.outputs == "host" or tensor.on_host:
                self._set_address(prepared, name, self._buffers[name].address)
            elif call.outputs == "bound":
                prepared.results[name] = self._result(tensor, prepared.shapes[name])
                self._set_address(prepared, name, prepared.results[name].address)
        prepared.call = call

    def _input_address(self, tensor: EngineTensor) -> int:
        name = tensor.spec.name
        if tensor.on_host and name in self._page_locked:
            return self._page_locked[name]
        return self._buffers[name].address

    def _let_grow(self, prepared: Prepared, tensor: EngineTensor) -> None:
        name = tensor.spec.name
        if name in prepared.growing:
            return
        growing = GrowingOutput(tensor.spec, self._engine)
        allocator = self._engine.new_output_allocator(growing)
        done = prepared.context.set_output_allocator(name, allocator)
        self._engine.check(done, f"the allocator of output '{name}' is refused")
        prepared.growing[name] = growing
        prepared._allocators.append(allocator)

    def _reported_shape(self, growing: GrowingOutput) -> tuple[int, ...]:
        if growing.shape is None:
            raise self._engine.failed(f"the shape of output '{growing.spec.name}' was not reported")
        return growing.shape

    def _shape_of(self, prepared: Prepared, name: str) -> tuple[int, ...]:
        growing = prepared.growing.get(name)
        return prepared.shapes[name] if growing is None else self._reported_shape(growing)

    def _reserve_scratch(self, context: Any) -> bool:  # noqa: ANN401, an IExecutionContext
        """Give a context activation memory, and return whether it moved."""
        needed = self._engine.scratch_bytes
        if self._as_needed:
            needed = int(context.update_device_memory_size_for_shapes())
        moved = False
        if self._scratch is None or self._scratch.size_bytes < needed:
            moved = self._scratch is not None
            self._scratch = None
            what = f"activations of {self._engine.model}"
            self._scratch = self._device.allocate(max(needed, 1), what)
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(self._scratch.address, self._scratch.size_bytes)
        else:  # TensorRT 10.0
            context.device_memory = self._scratch.address
        return moved

    def _result(self, tensor: EngineTensor, shape: tuple[int, ...]) -> DeviceMemory:
        what = f"output '{tensor.spec.name}' of {self._engine.model}"
        return self._device.allocate(max(size_bytes(shape, tensor.spec), 1), what)

    def _set_address(self, prepared: Prepared, name: str, address: int) -> None:
        done = prepared.context.set_tensor_address(name, address)
        self._engine.check(done, f"the address of '{name}' is refused")

    def _enqueue(self, prepared: Prepared) -> None:
        """Enqueue the copies and the engine."""
        engine, stream, call = self._engine, self.stream, prepared.call
        if call is None:
            raise BackendError(f"{engine.model}: the context is not set up for a call.")
        for tensor, shape, address in zip(engine.inputs, call.shapes, call.addresses, strict=True):
            name = tensor.spec.name
            if not address and not tensor.on_host:
                buffer = self._buffers[name]
                source = self._page_locked.get(name) or buffer.host_address
                stream.copy_to_device(buffer.address, source, size_bytes(shape, tensor.spec))
        for growing in prepared.growing.values():
            growing.shape = growing.failure = None
        done = prepared.context.execute_async_v3(stream.handle)
        for growing in prepared.growing.values():
            if growing.failure is not None:
                raise growing.failure
        engine.check(done, "the run failed")
        if call.outputs != "host":
            return
        for tensor in engine.outputs:
            name = tensor.spec.name
            if name in prepared.shapes and not tensor.on_host:
                size = size_bytes(prepared.shapes[name], tensor.spec)
                if size:
                    buffer = self._buffers[name]
                    stream.copy_to_host(buffer.host_address, buffer.address, size)

    def _can_capture(self, prepared: Prepared) -> bool:
        """Return whether a call may be captured: not on its first run.

        Inputs that the engine reads on the host are read at capture, and outputs of unknown size
        need the host in every run: neither can be replayed.
        """
        call = prepared.call
        return (
            self._own_graphs
            and prepared._runs > 0
            and not prepared._refused
            and not prepared.growing
            and call is not None
            and call.outputs != "new"
            and not call.values
        )

    def _capture(self, prepared: Prepared) -> None:
        """Capture a call; if that fails, log it and run without a graph."""
        try:
            self.stream.begin_capture()
            try:
                self._enqueue(prepared)
            except BaseException:
                with suppress(BackendError):  # the capture is invalid
                    self.stream.end_capture()
                raise
            prepared.graph = self.stream.end_capture()
        except BackendError as error:
            prepared._refused = True
            _LOG.warning(
                "%s: no CUDA graph for inputs of %s: %s",
                self._engine.model,
                prepared.call.shapes if prepared.call is not None else "no shape",
                str(error),  # the error would keep the slot alive
            )
