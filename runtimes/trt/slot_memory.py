"""Slot memory: growing buffers, and outputs of unknown size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmedge.errors import BackendError
from mmedge.runtimes.cuda.runtime import Device, DeviceMemory, PinnedMemory
from mmedge.runtimes.trt.device_engine import DeviceEngine
from mmedge.specs import Array, TensorSpec

__all__ = ["Buffer", "GrowingOutput", "size_bytes"]


class Buffer:
    """Growing memory for one input or output.

    Args:
        device: The device.
        spec: Of the input or output.
        what: Its name for messages.
        on_device: Whether to allocate device memory beside the page-locked host memory.
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
        """Grow to hold a shape, and return whether the memory moved.

        Raises:
            BackendError: If memory runs out.
        """
        needed = size_bytes(shape, self._spec)
        before = 0 if self._pinned is None else self._pinned.size_bytes
        if before >= max(needed, 1):
            return False
        # Doubled, so that growing shapes move it rarely.
        needed = max(needed, 2 * before, 1)
        self._pinned = self._memory = self._array = None
        pinned = self._device.allocate_pinned(needed, self._what)
        if self._on_device:
            self._memory = self._device.allocate(needed, self._what)
        self._pinned = pinned
        return True

    def array(self, shape: tuple[int, ...]) -> Array:
        """Return the host memory as an array, which keeps it alive."""
        array = self._array
        if array is None or array.shape != shape:
            array = self._array = self._host().array(shape, self._spec.dtype)
        return array

    @property
    def host_address(self) -> int:
        """Host address."""
        return self._host().address

    @property
    def address(self) -> int:
        """Device address, or host address if it has no device memory."""
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
    """An output whose size is known only after the run.

    Attributes:
        spec: Its spec.
        engine: Its engine.
        memory: Its memory, None before the first run.
        shape: As reported by the engine, None before.
        failure: Why allocation failed.
    """

    spec: TensorSpec
    engine: DeviceEngine
    memory: DeviceMemory | None = None
    shape: tuple[int, ...] | None = None
    failure: BackendError | None = None

    def reallocate(self, needed: int) -> int:
        """Return the address of this many bytes; 0 on failure, which TensorRT rejects."""
        if self.memory is None or self.memory.size_bytes < needed:
            self.memory = None
            what = f"output '{self.spec.name}' of {self.engine.model}"
            try:
                self.memory = self.engine.device.allocate(max(needed, 1), what)
            except BackendError as error:
                self.failure = error  # raised later to the caller, not to TensorRT
                return 0
        return self.memory.address


def size_bytes(shape: tuple[int, ...], spec: TensorSpec) -> int:
    """Return the size of an array of a shape, in bytes."""
    return int(np.prod(shape, dtype=np.int64)) * spec.dtype.itemsize
