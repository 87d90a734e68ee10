# ruff: noqa: N801, N802, N815, names of CUDA
"""CUDA's runtime API on host memory, as far as mmedge calls it. Work runs when it is enqueued."""

from __future__ import annotations

import ctypes
import enum
import threading
from collections import Counter
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

ALIGNMENT = 256

Op = Callable[[], object]


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class cudaMemoryType(enum.IntEnum):
    cudaMemoryTypeUnregistered = 0
    cudaMemoryTypeHost = 1
    cudaMemoryTypeDevice = 2
    cudaMemoryTypeManaged = 3


OK = (cudaError_t.cudaSuccess,)
HOST, DEVICE = cudaMemoryType.cudaMemoryTypeHost, cudaMemoryType.cudaMemoryTypeDevice


class FakeCuda(ModuleType):
    """The module `cuda.bindings.runtime`.

    Attributes:
        calls: Calls by function.
        copied: Bytes copied "to device", "to host" and "on device".
        failures: Error codes that the next calls of a function return, by its name.
        refuse_capture: Whether captures fail.
        blocks: Memory by address: kind, device, size and bytes.
        streams: Handles, each with its captured work.
    """

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaMemoryType = cudaMemoryType
    cudaStreamNonBlocking = 1
    cudaEventBlockingSync = 1
    cudaEventDisableTiming = 2
    cudaHostAllocPortable = 1

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.memory_bytes, self.devices, self.driver = 64 << 20, 1, 13000
        self.calls: Counter[str] = Counter()
        self.copied: Counter[str] = Counter()
        self.failures: dict[str, list[cudaError_t]] = {}
        self.refuse_capture = False
        self.blocks: dict[int, tuple[cudaMemoryType, int, int, Any]] = {}
        self.streams: dict[int, list[Op] | None] = {}
        self.events: set[int] = set()
        self.graphs: dict[int, list[Op]] = {}
        self.launchable: dict[int, list[Op]] = {}
        self._freed: list[Any] = []  # poisoned
        self._handles = iter(range(0x1000, 1 << 40))
        self._thread = threading.local()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(found) or isinstance(found, type):
            return found
        arranged = self.failures.get(name)

        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            return (arranged.pop(0), None) if arranged else found(*arguments)

        return call

    def left(self) -> dict[str, int]:
        """Count the resources that are not freed."""
        names = ("blocks", "streams", "events", "graphs", "launchable")
        return {name: len(getattr(self, name)) for name in names if getattr(self, name)}

    def used(self, kind: cudaMemoryType = DEVICE) -> int:
        return sum(size for held, _, size, _ in list(self.blocks.values()) if held == kind)

    def put(self, stream: int, op: Op) -> None:
        """Run some work, or add it to the stream's capture."""
        captured = self.streams.get(int(stream))
        op() if captured is None else captured.append(op)

    def capturing(self, stream: int) -> bool:
        return self.streams[int(stream)] is not None

    @property
    def current(self) -> int:
        return int(getattr(self._thread, "device", 0))

    def cudaDriverGetVersion(self) -> Any:
        return (*OK, self.driver)

    def cudaRuntimeGetVersion(self) -> Any:
        return (*OK, 13050)

    def cudaGetErrorName(self, code: cudaError_t) -> Any:
        return (*OK, code.name.encode())

    def cudaGetErrorString(self, code: cudaError_t) -> Any:
        return (*OK, f"error {int(code)}".encode())

    def cudaGetDeviceCount(self) -> Any:
        if self.driver < 13000:
            return (cudaError_t.cudaErrorInsufficientDriver, None)
        return (*OK, self.devices) if self.devices else (cudaError_t.cudaErrorNoDevice, None)

    def cudaGetDeviceProperties(self, device: int) -> Any:
        found = SimpleNamespace(
            name=f"Fake GPU {device}".encode() + b"\0" * 9,
            totalGlobalMem=self.memory_bytes,
            integrated=0,
            multiProcessorCount=4,
            major=8,
            minor=9,
        )
        return (*OK, found)

    def cudaGetDevice(self) -> Any:
        return (*OK, self.current)

    def cudaSetDevice(self, device: int) -> Any:
        self._thread.device = device
        return OK

    def cudaMemGetInfo(self) -> Any:
        return (*OK, self.memory_bytes - self.used(), self.memory_bytes)

    def cudaMalloc(self, size: int) -> Any:
        if self.used() + size > self.memory_bytes:
            return (cudaError_t.cudaErrorMemoryAllocation, None)
        return self._allocate(size, DEVICE)

    def cudaHostAlloc(self, size: int, _flags: int) -> Any:
        return self._allocate(size, HOST)

    def _allocate(self, size: int, kind: cudaMemoryType) -> Any:
        raw = np.full(size + ALIGNMENT, 0xA5, np.uint8)
        address = -(-raw.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.blocks[address] = (kind, self.current, size, raw)
        return (*OK, address)

    def cudaFree(self, address: int) -> Any:
        raw = self.blocks.pop(address)[3]
        raw.fill(0xDD)
        self._freed.append(raw)
        return OK

    cudaFreeHost = cudaFree

    def cudaPointerGetAttributes(self, address: int) -> Any:
        for begin, (kind, device, size, _) in list(self.blocks.items()):
            if begin <= address < begin + size:
                return (*OK, SimpleNamespace(type=kind, device=device))
        return (*OK, SimpleNamespace(type=cudaMemoryType.cudaMemoryTypeUnregistered, device=-1))

    def cudaStreamCreateWithFlags(self, _flags: int) -> Any:
        handle = next(self._handles)
        self.streams[handle] = None
        return (*OK, handle)

    def cudaStreamDestroy(self, stream: int) -> Any:
        del self.streams[stream]
        return OK

    def cudaStreamSynchronize(self, stream: int) -> Any:
        return (cudaError_t.cudaErrorStreamCaptureUnsupported,) if self.streams[stream] else OK

    def cudaStreamWaitEvent(self, _stream: int, event: int, _flags: int) -> Any:
        assert event in self.events
        return OK

    def cudaEventCreateWithFlags(self, _flags: int) -> Any:
        handle = next(self._handles)
        self.events.add(handle)
        return (*OK, handle)

    def cudaEventDestroy(self, event: int) -> Any:
        self.events.remove(event)
        return OK

    def cudaEventRecord(self, *_: int) -> Any:
        return OK

    cudaEventSynchronize = cudaEventRecord

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> Any:
        name = {1: "to device", 2: "to host", 3: "on device"}[int(kind)]

        def copy() -> None:
            ctypes.memmove(target, source, size)
            self.copied[name] += size

        self.put(stream, copy)
        return OK

    def cudaStreamBeginCapture(self, stream: int, _mode: int) -> Any:
        self.streams[stream] = []
        return OK

    def cudaStreamEndCapture(self, stream: int) -> Any:
        captured, self.streams[stream] = self.streams[stream], None
        if captured is None or self.refuse_capture:
            return (cudaError_t.cudaErrorStreamCaptureUnsupported, None)
        handle = next(self._handles)
        self.graphs[handle] = captured
        return (*OK, handle)

    def cudaGraphInstantiate(self, graph: int, _flags: int) -> Any:
        handle = next(self._handles)
        self.launchable[handle] = self.graphs[graph]
        return (*OK, handle)

    def cudaGraphDestroy(self, graph: int) -> Any:
        del self.graphs[graph]
        return OK

    def cudaGraphExecDestroy(self, graph: int) -> Any:
        del self.launchable[graph]
        return OK

    def cudaGraphLaunch(self, graph: int, _stream: int) -> Any:
        for op in self.launchable[graph]:
            op()
        return OK
