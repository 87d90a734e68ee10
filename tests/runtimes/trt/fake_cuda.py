# ruff: noqa: N801, N802, N815, CUDA has its own way with names
"""CUDA's runtime API on host memory, as far as mmedge.runtimes.cuda.runtime calls it.

Stands where `cuda.bindings.runtime` does. It is on the side of the bugs: what is put into a stream
is not done before somebody waits for it, memory that was freed is poisoned and told from memory
that is there, allocations are counted against a limit, and a capture breaks by what would break it
on a GPU. Addresses are real: they lead to host memory.
"""

from __future__ import annotations

import ctypes
import enum
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

ALIGNMENT = 256
_FRESH, _FREED = 0xA5, 0xDD

Op = Callable[[], None]


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class cudaMemoryType(enum.IntEnum):
    cudaMemoryTypeUnregistered = 0
    cudaMemoryTypeHost = 1
    cudaMemoryTypeDevice = 2
    cudaMemoryTypeManaged = 3


OK = (cudaError_t.cudaSuccess,)


class FaultError(Exception):
    """Work on the device touched what it must not."""


@dataclass
class Block:
    """A piece of memory. `raw` outlives it, so that whoever still uses it reads poison."""

    address: int
    size: int
    kind: cudaMemoryType
    device: int
    raw: Any

    def bytes(self) -> Any:
        begin = self.address - self.raw.ctypes.data
        return self.raw[begin : begin + self.size]


class Handle:
    """What CUDA hands out for a stream, an event or a graph."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __int__(self) -> int:
        return self.number


@dataclass
class Stream:
    device: int
    queue: deque[Op] = field(default_factory=deque)
    put: int = 0
    done: int = 0
    captured: list[Op] | None = None
    broken: bool = False


@dataclass
class Event:
    stream: Stream | None = None
    upto: int = 0


class FakeCuda(ModuleType):
    """The module.

    Args:
        memory_bytes: Of each device.
        devices: How many.
        driver: As cudaDriverGetVersion tells it; 0 for none.
        capability: Of each device.

    Attributes:
        calls: How often each function was called.
        copied: Bytes that were copied, by kind.
        failures: Codes that the next calls of a function return, by its name.
        refuse_capture: Whether captures end in failure.
    """

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaMemoryType = cudaMemoryType
    cudaStreamNonBlocking = 1
    cudaEventBlockingSync = 1
    cudaEventDisableTiming = 2
    cudaHostAllocPortable = 1

    def __init__(
        self,
        *,
        memory_bytes: int = 64 << 20,
        devices: int = 1,
        driver: int = 13000,
        capability: tuple[int, int] = (8, 9),
    ) -> None:
        super().__init__("cuda.bindings.runtime")
        self.memory_bytes = memory_bytes
        self.devices = devices
        self.driver = driver
        self.capability = capability
        self.calls: Counter[str] = Counter()
        self.copied: Counter[str] = Counter()
        self.failures: dict[str, list[cudaError_t]] = {}
        self.refuse_capture = False
        self.blocks: dict[int, Block] = {}
        self.freed: list[Block] = []
        self.streams: dict[int, Stream] = {}
        self.events: dict[int, Event] = {}
        self.graphs: dict[int, list[Op]] = {}
        self.launchable: dict[int, list[Op]] = {}
        self._lost: cudaError_t | None = None
        self._handles = iter(range(0x1000, 1 << 40))
        self._lock = threading.RLock()
        self._thread = threading.local()
        self.streams[1] = Stream(0)  # the default stream

    # What the tests look at.

    def left(self) -> dict[str, int]:
        """Count what is there; all of it is to be gone at the end."""
        held = {
            "blocks": len(self.blocks),
            "streams": len(self.streams) - 1,
            "events": len(self.events),
            "graphs": len(self.graphs) + len(self.launchable),
        }
        return {name: count for name, count in held.items() if count}

    def used(self, kind: cudaMemoryType = cudaMemoryType.cudaMemoryTypeDevice) -> int:
        return sum(block.size for block in self.blocks.values() if block.kind == kind)

    def memory(self, address: int, size: int, kind: cudaMemoryType, device: int = 0) -> Any:
        """Return the bytes at an address that must be memory of a kind.

        Raises:
            FaultError: If it is not, as a GPU finds when it gets there.
        """
        block = self._block(address)
        if block is None or address + size > block.address + block.size:
            raise FaultError(f"{size} bytes at {address:#x} are not allocated")
        if block.kind != kind or (
            kind == cudaMemoryType.cudaMemoryTypeDevice and block.device != device
        ):
            raise FaultError(f"{address:#x} is {block.kind.name} of device {block.device}")
        begin = address - block.address
        return block.bytes()[begin : begin + size]

    def capturing(self, stream: int) -> bool:
        return self.streams[int(stream)].captured is not None

    def device_of(self, stream: int) -> int:
        return self.streams[int(stream)].device

    @property
    def current(self) -> int:
        return int(getattr(self._thread, "device", 0))

    def put(self, stream: int, op: Op) -> None:
        """Put work into a stream, or into what it captures."""
        with self._lock:
            into = self.streams[int(stream)]
            if into.captured is not None:
                into.captured.append(op)
            else:
                into.queue.append(op)
                into.put += 1

    def run(self, stream: int) -> None:
        """Do what is in a stream."""
        self._run(self.streams[int(stream)])

    # CUDA's functions.

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return (*OK, self.driver)

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return (*OK, 13050)

    def cudaGetErrorName(self, code: cudaError_t) -> tuple[Any, ...]:
        return (*OK, code.name.encode())

    def cudaGetErrorString(self, code: cudaError_t) -> tuple[Any, ...]:
        return (*OK, f"what CUDA says of {int(code)}".encode())

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        if self.driver < 13000:
            return (cudaError_t.cudaErrorInsufficientDriver, None)
        if not self.devices:
            return (cudaError_t.cudaErrorNoDevice, None)
        return (*OK, self.devices)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        major, minor = self.capability
        return (
            *OK,
            SimpleNamespace(
                name=f"Fake GPU {device}".encode() + b"\0" * 9,
                major=major,
                minor=minor,
                totalGlobalMem=self.memory_bytes,
                integrated=0,
                multiProcessorCount=4,
            ),
        )

    def cudaGetDevice(self) -> tuple[Any, ...]:
        return (*OK, self.current)

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        self._thread.device = device
        return OK

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return (*OK, self.memory_bytes - self._used_on(self.current), self.memory_bytes)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        return self._allocate("cudaMalloc", size, cudaMemoryType.cudaMemoryTypeDevice)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        assert flags == self.cudaHostAllocPortable
        return self._allocate("cudaHostAlloc", size, cudaMemoryType.cudaMemoryTypeHost)

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        return self._free("cudaFree", address)

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        return self._free("cudaFreeHost", address)

    def cudaPointerGetAttributes(self, address: int) -> tuple[Any, ...]:
        block = self._block(address)
        kind = cudaMemoryType.cudaMemoryTypeUnregistered if block is None else block.kind
        return (*OK, SimpleNamespace(type=kind, device=-1 if block is None else block.device))

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        assert flags == self.cudaStreamNonBlocking
        handle = Handle(next(self._handles))
        self.streams[int(handle)] = Stream(self.current)
        return (*OK, handle)

    def cudaStreamDestroy(self, stream: Any) -> tuple[Any, ...]:
        del self.streams[int(stream)]
        return OK

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any, ...]:
        return self._wait("cudaStreamSynchronize", self.streams[int(stream)])

    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> tuple[Any, ...]:
        assert flags == 0
        marked = self.events[int(event)]
        writer, upto = marked.stream, marked.upto
        if writer is not None:
            self.put(int(stream), lambda: self._run(writer, upto))
        return OK

    def cudaEventCreateWithFlags(self, _flags: int) -> tuple[Any, ...]:
        handle = Handle(next(self._handles))
        self.events[int(handle)] = Event()
        return (*OK, handle)

    def cudaEventDestroy(self, event: Any) -> tuple[Any, ...]:
        del self.events[int(event)]
        return OK

    def cudaEventRecord(self, event: Any, stream: Any) -> tuple[Any, ...]:
        into = self.streams[int(stream)]
        marked = self.events[int(event)]
        marked.stream, marked.upto = into, into.put
        return OK

    def cudaEventSynchronize(self, event: Any) -> tuple[Any, ...]:
        marked = self.events[int(event)]
        if marked.stream is None:
            return OK
        return self._wait("cudaEventSynchronize", marked.stream, marked.upto)

    def cudaEventElapsedTime(self, _earlier: Any, _later: Any) -> tuple[Any, ...]:
        return (*OK, 1.5)

    def cudaMemcpyAsync(
        self, target: int, source: int, size: int, kind: cudaMemcpyKind, stream: Any
    ) -> tuple[Any, ...]:
        if (failed := self._failing("cudaMemcpyAsync")) is not None:
            return failed
        into = self.streams[int(stream)]
        to_device = kind == cudaMemcpyKind.cudaMemcpyHostToDevice
        assert to_device or kind == cudaMemcpyKind.cudaMemcpyDeviceToHost
        host = source if to_device else target
        page_locked = self._block(host) is not None
        if not page_locked and into.captured is not None:
            return self._break(into)
        device = into.device

        def of(address: int) -> Any:
            on_host = address == host
            if on_host and not page_locked:
                return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
            wanted = (
                cudaMemoryType.cudaMemoryTypeHost
                if on_host
                else (cudaMemoryType.cudaMemoryTypeDevice)
            )
            return self.memory(address, size, wanted, device)

        # What is not page-locked is read when it is asked for, and written before the call ends.
        early = of(source).copy() if to_device and not page_locked else None

        def copy() -> None:
            of(target)[...] = of(source) if early is None else early
            self.copied["to device" if to_device else "to host"] += size

        self.put(int(stream), copy)
        if not to_device and not page_locked:
            return self._wait("cudaMemcpyAsync", into)
        return OK

    def cudaStreamBeginCapture(self, stream: Any, mode: cudaStreamCaptureMode) -> tuple[Any, ...]:
        if (failed := self._failing("cudaStreamBeginCapture")) is not None:
            return failed
        assert mode == cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        into = self.streams[int(stream)]
        assert into.captured is None
        into.captured, into.broken = [], self.refuse_capture
        self._thread.captures = into
        return OK

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        self.calls["cudaStreamEndCapture"] += 1
        into = self.streams[int(stream)]
        captured, into.captured = into.captured, None
        self._thread.captures = None
        assert captured is not None
        if into.broken:
            return (cudaError_t.cudaErrorStreamCaptureInvalidated, None)
        handle = Handle(next(self._handles))
        self.graphs[int(handle)] = captured
        return (*OK, handle)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        assert flags == 0
        if (failed := self._failing("cudaGraphInstantiate")) is not None:
            return failed
        handle = Handle(next(self._handles))
        self.launchable[int(handle)] = self.graphs[int(graph)]
        return (*OK, handle)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        del self.graphs[int(graph)]
        return OK

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[Any, ...]:
        del self.launchable[int(graph)]
        return OK

    def cudaGraphLaunch(self, graph: Any, stream: Any) -> tuple[Any, ...]:
        if (failed := self._failing("cudaGraphLaunch")) is not None:
            return failed
        if int(graph) not in self.launchable:
            return (cudaError_t.cudaErrorInvalidResourceHandle,)
        for op in self.launchable[int(graph)]:
            self.put(int(stream), op)
        return OK

    # How it works.

    def _failing(self, name: str) -> tuple[Any, ...] | None:
        """Count a call, and return the failure that is arranged for it."""
        self.calls[name] += 1
        if self._lost is not None:
            return (self._lost, None)
        arranged = self.failures.get(name)
        return (arranged.pop(0), None) if arranged else None

    def _run(self, stream: Stream, upto: int | None = None) -> None:
        with self._lock:
            while stream.queue and (upto is None or stream.done < upto):
                op = stream.queue.popleft()
                stream.done += 1
                op()

    def _wait(self, name: str, stream: Stream, upto: int | None = None) -> tuple[Any, ...]:
        if (failed := self._failing(name)) is not None:
            return failed[:1]
        if stream.captured is not None:
            return self._break(stream)
        try:
            self._run(stream, upto)
        except FaultError as fault:
            self.fault = fault
            self._lost = cudaError_t.cudaErrorIllegalAddress
            return (self._lost,)
        return OK

    def _break(self, stream: Stream) -> tuple[Any, ...]:
        stream.broken = True
        return (cudaError_t.cudaErrorStreamCaptureUnsupported, None)

    def _block(self, address: int) -> Block | None:
        with self._lock:
            for block in self.blocks.values():
                if block.address <= address < block.address + block.size:
                    return block
        return None

    def _used_on(self, device: int) -> int:
        kind = cudaMemoryType.cudaMemoryTypeDevice
        with self._lock:
            return sum(b.size for b in self.blocks.values() if (b.kind, b.device) == (kind, device))

    def _allocate(self, name: str, size: int, kind: cudaMemoryType) -> tuple[Any, ...]:
        if (failed := self._failing(name)) is not None:
            return failed
        captures = getattr(self._thread, "captures", None)
        if captures is not None:
            return self._break(captures)
        assert size > 0
        on_device = kind == cudaMemoryType.cudaMemoryTypeDevice
        with self._lock:
            if on_device and self._used_on(self.current) + size > self.memory_bytes:
                return (cudaError_t.cudaErrorMemoryAllocation, None)
            raw = np.full(size + ALIGNMENT, _FRESH, np.uint8)
            address = -(-raw.ctypes.data // ALIGNMENT) * ALIGNMENT
            self.blocks[address] = Block(address, size, kind, self.current, raw)
        return (*OK, address)

    def _free(self, name: str, address: int) -> tuple[Any, ...]:
        self.calls[name] += 1
        captures = getattr(self._thread, "captures", None)
        if captures is not None:
            return self._break(captures)
        with self._lock:
            if self._lost is None:  # freeing waits for the device
                for stream in self.streams.values():
                    if stream.captured is None:
                        try:
                            self._run(stream)
                        except FaultError as fault:
                            self.fault = fault
                            self._lost = cudaError_t.cudaErrorIllegalAddress
            block = self.blocks.pop(address)
            block.bytes()[...] = _FREED
            self.freed.append(block)
        return OK
