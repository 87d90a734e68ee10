"""Device arrays: inputs from other libraries, outputs of a session.

Inputs are arrays with `__cuda_array_interface__` (version 2 or 3: torch, CuPy, Numba, JAX,
https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html) or `__dlpack__`
(https://dmlc.github.io/dlpack/latest/). Both give the address and the stream that writes the array;
nothing is copied.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from mmedge.errors import InputError
from mmedge.runtimes.cuda.runtime import Device, DeviceMemory
from mmedge.runtimes.cuda.streams import Event, Stream
from mmedge.specs import Array

__all__ = ["ALIGNMENT_BYTES", "DeviceArray", "DeviceInput", "DeviceView", "is_device_array", "view"]

ALIGNMENT_BYTES = 256
"""Alignment that TensorRT requires of input and output addresses."""

_DEFAULT_STREAM = 1  # CUDA's legacy default stream, which synchronizes with all others
# DLPack: DLDeviceType and DLDataTypeCode, for the types that numpy has.
_CUDA_KINDS = {2: "device", 13: "managed"}
_LETTERS = {0: "i", 1: "u", 2: "f", 6: "b"}


@runtime_checkable
class _HasInterface(Protocol):
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


@runtime_checkable
class _HasDlpack(Protocol):
    def __dlpack__(self, *, stream: int | None = None) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...


DeviceInput: TypeAlias = _HasInterface | _HasDlpack
"""An array on the device, from any library."""


@dataclass(frozen=True, slots=True)
class DeviceView:
    """Location of an array on the device.

    Attributes:
        address: Of its first element.
        shape: Its shape.
        dtype: Its dtype.
        contiguous: Whether its elements are contiguous in C order.
        stream: Handle of the stream that may still write it, None if it is complete.
        owner: Reference that keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    contiguous: bool
    stream: int | None
    owner: object

    def stand_in(self) -> Array:
        """Return a host array of the same shape and dtype without memory, for checks."""
        return np.broadcast_to(np.zeros((), self.dtype), self.shape)


def is_device_array(value: object) -> bool:
    """Return whether a value declares to be on a CUDA device."""
    if isinstance(value, np.ndarray):
        return False
    if _has_interface(value):
        return True
    return isinstance(value, _HasDlpack) and value.__dlpack_device__()[0] in _CUDA_KINDS


def view(
    name: str, value: object, device: Device, stream: Stream, writer: int | None = None
) -> DeviceView:
    """Return an array's location, ready to be read in a stream.

    Args:
        name: Of the input, for messages.
        value: The array.
        device: The device that it must be on.
        stream: The reading stream, which waits until the array is complete.
        writer: Handle of the stream that writes the array; None uses the stream that the array
            names, or CUDA's default stream if it names none, as torch's arrays do.

    Raises:
        InputError: If it is elsewhere, not contiguous, not aligned to 256 bytes, or unreadable.
    """
    read = _by_interface if _has_interface(value) else _by_dlpack
    found = read(name, value, stream)
    if not device.holds(found.address):
        raise InputError(
            f"Input '{name}': is not on cuda:{device.index}, where the session runs. Copy it "
            "there, or open the session on its device."
        )
    if not found.contiguous:
        raise InputError(
            f"Input '{name}': its elements on the device are not contiguous. Pass a contiguous "
            "copy (torch's .contiguous(), CuPy's ascontiguousarray)."
        )
    if found.address % ALIGNMENT_BYTES:
        raise InputError(
            f"Input '{name}': starts at {found.address:#x}, expected an address aligned to "
            f"{ALIGNMENT_BYTES} bytes. Pass a copy (.clone(), .copy()) instead of a slice."
        )
    writer = found.stream if writer is None else writer
    if writer is not None and writer != stream.handle:
        event = Event(device)
        event.record(writer)
        stream.wait(event)
    return found


class DeviceArray:
    """A complete output on the device, owned by the caller.

    torch.as_tensor, cupy.asarray and numba.cuda.as_cuda_array use it without a copy. Its memory is
    freed with the last reference.

    Args:
        memory: Its memory.
        shape: Its shape.
        dtype: Its dtype.
    """

    def __init__(self, memory: DeviceMemory, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._memory = memory
        self.shape = shape
        self.dtype = dtype

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self._memory.address, False),
            "strides": None,
            "stream": None,
        }

    @property
    def address(self) -> int:
        """Device address."""
        return self._memory.address

    @property
    def size_bytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @classmethod
    def of(cls, array: Array, device: Device) -> DeviceArray:
        """Return a copy of a C-contiguous host array on a device.

        Raises:
            BackendError: If there is too little memory, or the copy fails.
        """
        with device.current():
            made = cls._new(array.shape, array.dtype, device)
            if array.nbytes:
                stream = Stream(device)
                stream.copy_to_device(made.address, array.ctypes.data, array.nbytes)
                stream.synchronize()
        return made

    @classmethod
    def _new(cls, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device) -> DeviceArray:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return cls(device.allocate(max(size, 1), f"an array {dtype.name}{shape}"), shape, dtype)

    def take(self, rows: Array) -> DeviceArray:
        """Return a new device array of some rows of the first axis, (N,) integers.

        Raises:
            BackendError: As for `of`.
        """
        device = self._memory.device
        with device.current():
            made = self._new((len(rows), *self.shape[1:]), self.dtype, device)
            size = made.size_bytes // len(rows)
            if size:
                stream = Stream(device)
                for to, row in enumerate(rows.tolist()):
                    stream.copy_on_device(made.address + to * size, self.address + row * size, size)
                stream.synchronize()
        return made

    def numpy(self) -> Array:
        """Return a copy in host memory.

        Raises:
            BackendError: If the copy fails.
        """
        device = self._memory.device
        copy = np.empty(self.shape, self.dtype)
        if copy.nbytes:
            with device.current():
                stream = Stream(device)
                stream.copy_to_host(copy.ctypes.data, self.address, copy.nbytes)
                stream.synchronize()
        return copy

    def __repr__(self) -> str:
        return f"<DeviceArray {self.dtype.name}{self.shape} on cuda:{self._memory.device.index}>"


def _has_interface(value: object) -> bool:
    try:
        return hasattr(value, "__cuda_array_interface__")
    except RuntimeError:  # torch raises for a tensor that requires a gradient
        return True


def _by_interface(name: str, value: object, _: Stream) -> DeviceView:
    try:
        interface: dict[str, Any] = value.__cuda_array_interface__  # type: ignore[attr-defined]
        shape = tuple(int(size) for size in interface["shape"])
        dtype = np.dtype(interface["typestr"])
        address = int(interface["data"][0] or 0)
        strides, stream = interface.get("strides"), interface.get("stream", _DEFAULT_STREAM)
    except (RuntimeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"Input '{name}': its __cuda_array_interface__ cannot be read ({error})."
        ) from error
    if interface.get("mask") is not None:
        raise InputError(f"Input '{name}': masked arrays are not supported. Fill it first.")
    return DeviceView(
        address,
        shape,
        dtype,
        strides is None or _is_contiguous(shape, strides, dtype.itemsize),
        None if stream is None else int(stream),
        value,
    )


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...], step: int) -> bool:
    """Return whether strides are in C order, ignoring axes of size 1."""
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _by_dlpack(name: str, value: object, stream: Stream) -> DeviceView:
    """Read a DLManagedTensor, DLPack's form before 1.0, which every producer still supports.

    The view holds the capsule, which is not marked as used: its destructor frees the array with the
    last reference.
    """
    if not isinstance(value, _HasDlpack):
        raise InputError(
            f"Input '{name}': got {type(value).__name__}, expected a numpy array, or an array on "
            "the device with __cuda_array_interface__ or __dlpack__."
        )
    kind = value.__dlpack_device__()[0]
    if kind not in _CUDA_KINDS:
        raise InputError(
            f"Input '{name}': is on DLPack's device type {kind}, expected CUDA memory. Pass a "
            "numpy array, or move it to the GPU."
        )
    try:
        capsule = value.__dlpack__(stream=stream.handle)
    except (BufferError, RuntimeError, TypeError) as error:
        raise InputError(f"Input '{name}': its __dlpack__ fails: {error}.") from error
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype = ctypes.c_void_p
    pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
    try:
        address = pointer(capsule, b"dltensor")
    except ValueError as error:
        raise InputError(f"Input '{name}': its __dlpack__ returns no 'dltensor'.") from error
    tensor = _DLTensor.from_address(address)
    letter = _LETTERS.get(tensor.code)
    if letter is None or tensor.lanes != 1 or tensor.bits % 8:
        raise InputError(
            f"Input '{name}': numpy has no dtype for its DLPack type ({tensor.code}, {tensor.bits} "
            "bits). Convert it to the dtype of the graph."
        )
    dtype = np.dtype("bool" if letter == "b" else f"{letter}{tensor.bits // 8}")
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    contiguous = True
    if tensor.strides:
        elements = tuple(tensor.strides[axis] for axis in range(tensor.ndim))
        contiguous = _is_contiguous(shape, elements, 1)
    where = int(tensor.data or 0) + int(tensor.byte_offset)
    return DeviceView(where, shape, dtype, contiguous, None, (capsule, value))
