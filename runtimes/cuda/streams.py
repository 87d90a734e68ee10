"""CUDA streams, events and graphs; memory and devices are in runtime.py."""

from __future__ import annotations

from mmedge.runtimes.cuda.runtime import Device, Owned, capturing, load_bindings

__all__ = ["Event", "Graph", "Stream"]


class Event(Owned):
    """A CUDA event.

    Args:
        device: Of the streams it is used with.
        blocking: Whether a waiting thread sleeps instead of polling.
    """

    def __init__(self, device: Device, *, blocking: bool = False) -> None:
        runtime = load_bindings()
        with device.current():
            flags = runtime.cudaEventBlockingSync if blocking else 0
            flags |= runtime.cudaEventDisableTiming
            self._handle = device.call("cudaEventCreateWithFlags", flags)
        super().__init__(device, "cudaEventDestroy", self._handle)

    @property
    def handle(self) -> int:
        """CUDA's handle."""
        return int(self._handle)

    def record(self, stream: int) -> None:
        """Record the work queued in a stream so far, by the stream's handle."""
        self.device.call("cudaEventRecord", self._handle, stream)

    def synchronize(self) -> None:
        """Wait until all work before the event is done."""
        self.device.call("cudaEventSynchronize", self._handle)


class Graph(Owned):
    """A captured graph, ready to launch. Made by Stream.end_capture."""

    def __init__(self, device: Device, captured: object) -> None:
        try:
            self._handle = device.call("cudaGraphInstantiate", captured, 0)
        finally:
            device.call("cudaGraphDestroy", captured)
        super().__init__(device, "cudaGraphExecDestroy", self._handle)

    def launch(self, stream: Stream) -> None:
        """Launch the graph in a stream."""
        self.device.call("cudaGraphLaunch", self._handle, stream.handle)


class Stream(Owned):
    """An ordered queue of work on a device, independent of other streams.

    Args:
        device: Its device.
    """

    def __init__(self, device: Device) -> None:
        runtime = load_bindings()
        with device.current():
            self._handle = device.call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        super().__init__(device, "cudaStreamDestroy", self._handle)
        self.handle = int(self._handle)
        kinds = runtime.cudaMemcpyKind
        self._to_device = kinds.cudaMemcpyHostToDevice
        self._to_host = kinds.cudaMemcpyDeviceToHost
        self._on_device = kinds.cudaMemcpyDeviceToDevice
        # Lets other threads allocate while this one captures.
        self._capture_mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal

    def copy_to_device(self, target: int, source: int, size_bytes: int) -> None:
        """Copy from host to device memory by address, asynchronously."""
        self.device.call(
            "cudaMemcpyAsync", target, source, size_bytes, self._to_device, self.handle
        )

    def copy_to_host(self, target: int, source: int, size_bytes: int) -> None:
        """Copy from device to host memory by address, asynchronously."""
        self.device.call("cudaMemcpyAsync", target, source, size_bytes, self._to_host, self.handle)

    def copy_on_device(self, target: int, source: int, size_bytes: int) -> None:
        """Copy within device memory by address, asynchronously."""
        self.device.call(
            "cudaMemcpyAsync", target, source, size_bytes, self._on_device, self.handle
        )

    def wait(self, event: Event) -> None:
        """Make later work wait for an event of another stream."""
        self.device.call("cudaStreamWaitEvent", self.handle, event.handle, 0)

    def synchronize(self) -> None:
        """Wait until all work in the stream is done."""
        self.device.call("cudaStreamSynchronize", self.handle)

    def begin_capture(self) -> None:
        """Start capturing the stream's work instead of running it."""
        self.device.call("cudaStreamBeginCapture", self.handle, self._capture_mode)
        capturing.later = []

    def end_capture(self) -> Graph:
        """Return the captured graph, ready to launch.

        Raises:
            BackendError: If something cannot be captured. The stream remains usable.
        """
        try:
            captured = self.device.call("cudaStreamEndCapture", self.handle)
        finally:
            later, capturing.later = capturing.later, None
            for device, name, handle in later:
                device.free(name, handle)
        return Graph(self.device, captured)
