"""Thin typed layer over the CUDA runtime API of cuda-python, `cuda.bindings.runtime`.

Errors, versions, devices and memory; streams, events and graphs are in streams.py.

Needs cuda-bindings 13, or 12.9 where the driver or JetPack 6 has CUDA 12; they are imported at the
first call. Every error code becomes a BackendError with CUDA's name and text, and a fix.

Each thread has its own current device. Calls other than those of `Device` belong in a `with
device.current():` block, which restores the device of a caller that uses CUDA itself.
"""

from __future__ import annotations

import importlib
import re
import threading
import weakref
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from mmedge.errors import BackendError, BackendUnavailableError

if TYPE_CHECKING:
    from mmedge.specs import Array

__all__ = [
    "FOR_CUDA_12",
    "Current",
    "Device",
    "DeviceMemory",
    "DeviceProperties",
    "Owned",
    "PinnedMemory",
    "bindings_installed",
    "capturing",
    "cuda_version",
    "device_count",
    "device_index",
    "driver_version",
    "in_words",
    "load_bindings",
    "probe",
]

FOR_CUDA_12 = '"cuda-bindings>=12.9,<13"'
"""Requirement of the bindings for a CUDA 12 driver, quoted for a shell."""

_MODULE = "cuda.bindings.runtime"
_OUT_OF_MEMORY = "cudaErrorMemoryAllocation"

capturing = threading.local()
"""`later`: handles to free when this thread stops capturing; None while it does not capture."""

# CUDA error name -> fix.
_FIXES = {
    "cudaErrorNoDevice": "No GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES.",
    "cudaErrorInvalidDevice": "Check nvidia-smi and CUDA_VISIBLE_DEVICES.",
    "cudaErrorDevicesUnavailable": "Another process holds the GPU exclusively: see nvidia-smi.",
    "cudaErrorSystemDriverMismatch": "The driver was updated under a running system: reboot.",
    "cudaErrorCompatNotSupportedOnDevice": "CUDA's compatibility package does not serve this GPU: "
    "update the driver itself.",
    "cudaErrorStubLibrary": "Only a stub of the driver is installed: install the driver.",
    "cudaErrorInitializationError": "CUDA does not start in this process: do not use it across a "
    "fork.",
    _OUT_OF_MEMORY: "Use a smaller batch, a smaller variant or fewer contexts, or free memory.",
}
# After these errors the GPU is unusable in this process.
_LOST = frozenset(
    {
        "cudaErrorIllegalAddress",
        "cudaErrorLaunchFailure",
        "cudaErrorLaunchTimeout",
        "cudaErrorHardwareStackError",
        "cudaErrorIllegalInstruction",
        "cudaErrorMisalignedAddress",
        "cudaErrorInvalidAddressSpace",
        "cudaErrorInvalidPc",
        "cudaErrorAssert",
        "cudaErrorECCUncorrectable",
        "cudaErrorContained",
        "cudaErrorExternalDevice",
    }
)


@dataclass(frozen=True, slots=True)
class DeviceProperties:
    """Properties of a GPU.

    Attributes:
        index: CUDA's number, from 0.
        name: Such as "NVIDIA GeForce RTX 4070" or "Orin".
        compute_capability: Such as "8.9".
        memory_bytes: Total memory.
        integrated: Whether it shares the host's memory, as on a Jetson.
        multiprocessors: Their number.
    """

    index: int
    name: str
    compute_capability: str
    memory_bytes: int
    integrated: bool
    multiprocessors: int


def device_index(device: str) -> int | None:
    """Return the index of "cuda" or "cuda:N"; None if it is no CUDA device."""
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    return None if match is None else int(match[1] or 0)


def bindings_installed() -> bool:
    """Return whether CUDA's Python bindings are installed, without loading them."""
    try:
        return find_spec(_MODULE) is not None
    except (ImportError, ValueError):  # no `cuda` at all; hidden from imports
        return False


def load_bindings() -> ModuleType:
    """Import `cuda.bindings.runtime`.

    Raises:
        BackendUnavailableError: If it is not installed or cannot start.
    """
    try:
        return importlib.import_module(_MODULE)
    except ImportError as error:
        raise BackendUnavailableError(
            f"CUDA's Python bindings cannot be imported ({error}). Install mmedge[cuda]; on "
            f"JetPack 6, or with a driver for CUDA 12: pip install {FOR_CUDA_12}."
        ) from error


def driver_version() -> str:
    """Return the newest CUDA version that the driver supports, "13.0"; "" without a driver.

    Raises:
        BackendUnavailableError: If the bindings are missing.
    """
    return _version(_call(load_bindings(), "cudaDriverGetVersion"))


def cuda_version() -> str:
    """Return the CUDA runtime version of the bindings, such as "13.0".

    Raises:
        BackendUnavailableError: If the bindings are missing.
    """
    return _version(_call(load_bindings(), "cudaRuntimeGetVersion"))


def device_count() -> int:
    """Return the number of GPUs visible to CUDA.

    Raises:
        BackendUnavailableError: If the bindings or the driver are missing, or the driver is too
            old for the bindings.
    """
    return int(_call(load_bindings(), "cudaGetDeviceCount"))


class Device:
    """One GPU.

    Args:
        index: CUDA's number, from 0.

    Raises:
        BackendUnavailableError: If there is no such GPU, or as for device_count.
    """

    def __init__(self, index: int) -> None:
        self._runtime = load_bindings()
        count = int(_call(self._runtime, "cudaGetDeviceCount"))
        if not 0 <= index < count:
            raise BackendUnavailableError(
                f"Device 'cuda:{index}': the CUDA driver sees {count} GPU(s). Check nvidia-smi and "
                "CUDA_VISIBLE_DEVICES."
            )
        self.index = index
        found = self.call("cudaGetDeviceProperties", index)
        self.properties = DeviceProperties(
            index=index,
            name=_text(found.name),
            compute_capability=f"{found.major}.{found.minor}",
            memory_bytes=int(found.totalGlobalMem),
            integrated=bool(found.integrated),
            multiprocessors=int(found.multiProcessorCount),
        )

    def __repr__(self) -> str:
        return f"<Device cuda:{self.index} ({self.properties.name})>"

    def call(self, name: str, *arguments: object) -> Any:  # noqa: ANN401, cuda-bindings' types
        """Call a runtime API function by name and return its result.

        Raises:
            BackendError: If it fails, with CUDA's own name and text.
        """
        return _call(self._runtime, name, *arguments)

    def current(self) -> Current:
        """Return a context manager that makes this the thread's current device."""
        return Current(self)

    def memory_bytes(self) -> tuple[int, int]:
        """Return free and total device memory."""
        with self.current():
            free, total = self.call("cudaMemGetInfo")
        return int(free), int(total)

    def allocate(self, size_bytes: int, what: str) -> DeviceMemory:
        """Allocate device memory.

        Args:
            size_bytes: At least 1.
            what: Its purpose, for the message.

        Raises:
            BackendError: If there is not enough; the message has the needed and the free size.
        """
        return DeviceMemory(self, self._allocated("cudaMalloc", size_bytes, what), size_bytes)

    def allocate_pinned(self, size_bytes: int, what: str) -> PinnedMemory:
        """Allocate page-locked host memory, for fast copies to and from the device.

        Args:
            size_bytes: At least 1.
            what: Its purpose, for the message.

        Raises:
            BackendError: If there is not enough.
        """
        # Portable: page-locked for all devices.
        flags = self._runtime.cudaHostAllocPortable
        address = self._allocated("cudaHostAlloc", size_bytes, what, flags)
        return PinnedMemory(self, address, size_bytes)

    def out_of_memory(self, size_bytes: int, what: str, detail: str = "") -> BackendError:
        """Return the out-of-memory error, with the memory needed and free.

        Args:
            size_bytes: Size needed, 0 if unknown.
            what: Its purpose.
            detail: The message of CUDA or TensorRT.
        """
        try:
            free, total = self.memory_bytes()
            left = f"{in_words(free)} of {in_words(total)} are free"
        except BackendError:
            left = "free memory is unknown"
        needed = f"{in_words(size_bytes)} needed for {what}" if size_bytes else f"needed for {what}"
        return BackendError(
            f"Out of memory on cuda:{self.index} ({self.properties.name}): {needed}, {left}. "
            f"{_FIXES[_OUT_OF_MEMORY]}{f' ({detail})' if detail else ''}"
        )

    def is_page_locked(self, address: int) -> bool:
        """Return whether host memory is page-locked, by any library."""
        found = self._attributes(address)
        host = self._runtime.cudaMemoryType.cudaMemoryTypeHost
        return found is not None and found.type == host

    def holds(self, address: int) -> bool:
        """Return whether an address is memory on this device that the GPU can read."""
        found = self._attributes(address)
        kinds = self._runtime.cudaMemoryType
        return found is not None and (
            found.type == kinds.cudaMemoryTypeManaged
            or (found.type == kinds.cudaMemoryTypeDevice and found.device == self.index)
        )

    def _attributes(self, address: int) -> Any:  # noqa: ANN401
        with self.current():
            code, found = self._runtime.cudaPointerGetAttributes(address)
        return found if int(code) == 0 else None

    def _allocated(self, name: str, size_bytes: int, what: str, *flags: int) -> int:
        with self.current():
            code, address = getattr(self._runtime, name)(size_bytes, *flags)
        if int(code) == 0:
            return int(address)
        error = _error(self._runtime, name, code)
        if _OUT_OF_MEMORY in str(error) and name == "cudaMalloc":
            raise self.out_of_memory(size_bytes, what, _OUT_OF_MEMORY)
        raise BackendError(f"{in_words(size_bytes)} of memory for {what}: {error}")

    def free(self, name: str, handle: object) -> None:
        """Free a handle whose owner is gone, ignoring failures.

        The garbage collector may call this while the thread captures; it then frees later, since
        freeing would break the capture.
        """
        later: list[tuple[Device, str, object]] | None = getattr(capturing, "later", None)
        if later is not None:
            later.append((self, name, handle))
            return
        before = self._runtime.cudaGetDevice()
        self._runtime.cudaSetDevice(self.index)
        getattr(self._runtime, name)(handle)
        if int(before[0]) == 0 and before[1] != self.index:
            self._runtime.cudaSetDevice(before[1])


class Current:
    """Context manager that makes a device current. Made by Device.current.

    A class, since a generator costs several times as much and every call needs it.

    Args:
        device: The device.
    """

    __slots__ = ("_before", "_device")

    def __init__(self, device: Device) -> None:
        self._device = device
        self._before = device.index

    def __enter__(self) -> None:
        self._before = self._device.call("cudaGetDevice")
        if self._before != self._device.index:
            self._device.call("cudaSetDevice", self._device.index)

    def __exit__(self, *_: object) -> None:
        if self._before != self._device.index:
            self._device.call("cudaSetDevice", self._before)


class Owned:
    """A CUDA resource that is freed with its owner, or earlier.

    Args:
        device: Its device.
        destroy: The runtime API function that frees it.
        handle: The argument of that function.
    """

    def __init__(self, device: Device, destroy: str, handle: object) -> None:
        self.device = device
        self._finalizer = weakref.finalize(self, device.free, destroy, handle)
        self._finalizer.atexit = False  # the driver frees the rest at process exit

    def free(self) -> None:
        """Free it now. Calling twice is allowed."""
        self._finalizer()


class DeviceMemory(Owned):
    """Device memory, freed with this object. Made by Device.allocate.

    Attributes:
        address: Its address, aligned for any use.
        size_bytes: Its size.
    """

    def __init__(self, device: Device, address: int, size_bytes: int) -> None:
        super().__init__(device, "cudaFree", address)
        self.address = address
        self.size_bytes = size_bytes


class PinnedMemory(Owned):
    """Page-locked host memory, freed when no array uses it. Made by Device.allocate_pinned.

    Attributes:
        address: Its address.
        size_bytes: Its size.
    """

    def __init__(self, device: Device, address: int, size_bytes: int) -> None:
        super().__init__(device, "cudaFreeHost", address)
        self.address = address
        self.size_bytes = size_bytes

    @property
    def __array_interface__(self) -> dict[str, object]:  # numpy holds a reference to the owner
        return {
            "version": 3,
            "shape": (self.size_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
        }

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an array over the start of the memory, which lives as long as the array."""
        size_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return np.asarray(self)[:size_bytes].view(dtype).reshape(shape)


def probe() -> dict[str, object]:
    """Return the versions of driver and runtime, and the properties of each GPU.

    Raises:
        BackendError: If the bindings or the driver are missing, or CUDA does not start.
    """
    devices = []
    for index in range(device_count()):
        device = Device(index)
        described = asdict(device.properties) | {"free_bytes": device.memory_bytes()[0]}
        devices.append(described)
    return {"driver": driver_version(), "runtime": cuda_version(), "devices": devices}


def in_words(size_bytes: int) -> str:
    """Return a size in MiB or GiB."""
    size_mib = size_bytes / 2**20
    return f"{size_mib / 1024:.1f} GiB" if size_mib >= 1024 else f"{size_mib:.1f} MiB"


def _call(runtime: ModuleType, name: str, *arguments: object) -> Any:  # noqa: ANN401
    code, *values = getattr(runtime, name)(*arguments)
    if code:
        raise _error(runtime, name, code)
    return values[0] if len(values) == 1 else tuple(values)


def _error(runtime: ModuleType, name: str, code: object) -> BackendError:
    error = _text(runtime.cudaGetErrorName(code)[1])
    text = _text(runtime.cudaGetErrorString(code)[1])
    if error == "cudaErrorInsufficientDriver":
        return BackendUnavailableError(_driver_too_old(runtime))
    kind = BackendUnavailableError if error in _UNAVAILABLE else BackendError
    fix = _FIXES.get(error, "")
    if error in _LOST:
        fix = "The GPU is unusable in this process: restart it."
    return kind(f"CUDA {name}: {error}: {text}.{f' {fix}' if fix else ''}")


_UNAVAILABLE = frozenset(_FIXES) - {_OUT_OF_MEMORY}


def _driver_too_old(runtime: ModuleType) -> str:
    bindings = _version(runtime.cudaRuntimeGetVersion()[1])
    driver = _version(runtime.cudaDriverGetVersion()[1])
    if not driver:
        return (
            "There is no NVIDIA driver on this machine, or this process does not see it. Install "
            "it (on a Jetson: JetPack; in a container: start it with --gpus all)."
        )
    major = bindings.split(".")[0]
    older = f", or install bindings for it: pip install {FOR_CUDA_12}"
    return (
        f"The NVIDIA driver is too old: it supports CUDA {driver}, the installed cuda-bindings "
        f"need CUDA {major}.0 or newer (driver {_DRIVERS.get(major, 'of that CUDA')}). Update the "
        f"driver{older if driver.startswith('12.') else ''}."
    )


# CUDA major version -> oldest Linux driver that supports it, minor versions included.
_DRIVERS = {"12": "525 or newer", "13": "580 or newer"}


def _version(number: int) -> str:
    """Return "13.0" for 13000, "" for 0."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def _text(value: object) -> str:
    """Return a CUDA string, which may be a fixed-size struct field with padding."""
    if isinstance(value, bytes):
        return value.split(b"\0")[0].decode("utf-8", "replace")
    return str(value)
