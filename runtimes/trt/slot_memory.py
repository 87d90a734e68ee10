"""Memory of a slot: growing buffers, and outputs of unknown size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmedge.errors import BackendError
from mmedge.runtimes.cuda.runtime import Device, DeviceMemory, PinnedMemory
from mmedge.runtimes.trt.device_engine import DeviceEngine
from mmedge.specs import Array, TensorSpec

__all__ = ["Buffer", "GrowingOutput", "size_bytes"]


class Buffer:
    """Memory for one input or output that grows with what it has to hold.

    Args:
        device: Where.
        spec: What it holds.
        what: Its name for messages.
        on_device: Whether there is device memory beside the page-locked host memory.
    """

    def __init__(self, device: Device, spec: TensorSpec, what: str, *, on_device: bool) -> None:
        self._device = device
        self._spec = spec
        self._what = what
        self._on_device = on_device
        self._pinned: PinnedMemory | None = None
        self._memory: DeviceMemory | None = None
        self._array: Array | None = None  # made for the last shape

    def reserve(self, shape: tuple[int, ...]) -> bool:
        """Make it large enough for a shape, and tell whether it moved.

        Raises:
            BackendError: If memory runs out.
        """
        needed = size_bytes(shape, self._spec)
        before = 0 if self._pinned is None else self._pinned.size_bytes
        if before >= max(needed, 1):
            return False
        # Twice as much as before, so that shapes that grow step by step do not move it each time.
        needed = max(needed, 2 * before, 1)
        self._pinned = self._memory = self._array = None
        pinned = self._device.allocate_pinned(needed, self._what)
        if self._on_device:
            self._memory = self._device.allocate(needed, self._what)
        self._pinned = pinned
        return True

    def array(self, shape: tuple[int, ...]) -> Array:
        """Return its host memory as an array, which keeps that memory."""
        array = self._array
        if array is None or array.shape != shape:
            array = self._array = self._host().array(shape, self._spec.dtype)
        return array

    @property
    def host_address(self) -> int:
        """Where it lies in host memory."""
        return self._host().address

    @property
    def address(self) -> int:
        """Where it lies on the device, or in host memory if it is there alone."""
        if not self._on_device:
            return self.host_address
        if self._memory is None:
            raise self._empty()
        return self._memory.address

    def _host(self) -> PinnedMemory:
        if self._pinned is None:
            raise self._empty()
        return self._pinned

    def _empty(self) -> BackendError:
        return BackendError(f"There is no memory for {self._what}.")


@dataclass(eq=False)
class GrowingOutput:
    """An output whose size is known only once it is computed.

    Attributes:
        spec: Its spec.
        engine: Whose output it is.
        memory: Where it was written to, None before the first run.
        shape: As the engine told it, None until it did.
        failure: Why it could not be allocated.
    """

    spec: TensorSpec
    engine: DeviceEngine
    memory: DeviceMemory | None = None
    shape: tuple[int, ...] | None = None
    failure: BackendError | None = None

    def reallocate(self, needed: int) -> int:
        """Return where so many bytes can be written; 0, which TensorRT takes for a refusal."""
        if self.memory is None or self.memory.size_bytes < needed:
            self.memory = None
            what = f"output '{self.spec.name}' of {self.engine.model}"
            try:
                self.memory = self.engine.device.allocate(max(needed, 1), what)
            except BackendError as error:
                self.failure = error  # TensorRT's caller must hear of it, not TensorRT
                return 0
        return self.memory.address


def size_bytes(shape: tuple[int, ...], spec: TensorSpec) -> int:
    """Return the bytes of an array of a shape."""
    return int(np.prod(shape, dtype=np.int64)) * spec.dtype.itemsize
