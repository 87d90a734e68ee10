"""CUDA's layer: errors, memory, arrays on the device. The GPU is not there, see fake_gpu.py."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeGpu, OnDevice
from tiny_graphs import embed, feed_of

from mmedge.errors import BackendError, BackendUnavailableError, DTypeError, InputError, ShapeError
from mmedge.runtimes.cuda import arrays as device_arrays
from mmedge.runtimes.cuda import runtime as cuda
from mmedge.runtimes.cuda.arrays import DeviceArray
from mmedge.runtimes.cuda.runtime import Device
from mmedge.runtimes.cuda.streams import Event, Stream
from mmedge.runtimes.trt.session import TrtSession
from mmedge.specs import Array


def test_a_probe_describes_every_gpu(fake_gpu: FakeGpu) -> None:
    fake_gpu.cuda.devices = 2
    found: Any = cuda.probe()
    assert (found["driver"], found["runtime"]) == ("13.0", "13.5")
    assert [(each["index"], each["name"]) for each in found["devices"]] == [
        (0, "Fake GPU 0"),
        (1, "Fake GPU 1"),
    ]
    assert found["devices"][0]["free_bytes"] == 64 << 20


def test_without_a_driver_the_library_itself_is_understood() -> None:
    if Path("/proc/driver/nvidia").exists() or not cuda.bindings_installed():
        pytest.skip("there is a driver, or no cuda-bindings")
    assert cuda.driver_version() == ""
    assert int(cuda.cuda_version().split(".")[0]) >= 12
    with pytest.raises(BackendUnavailableError, match="no NVIDIA driver"):
        Device(0)


@pytest.mark.gpu
def test_a_real_device_copies_captures_and_counts() -> None:
    try:
        device = Device(0)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    with device.current():
        stream, size = Stream(device), 1 << 20
        memory = device.allocate(size, "a test")
        pinned, back = (device.allocate_pinned(size, "a test") for _ in range(2))
        mine = pinned.array((size,), np.dtype(np.uint8))
        assert device.holds(memory.address)
        assert device.is_page_locked(pinned.address)
        done = Event(device, blocking=True)
        stream.begin_capture()
        stream.copy_to_device(memory.address, pinned.address, size)
        stream.copy_to_host(back.address, memory.address, size)
        graph = stream.end_capture()
        for value in (6, 7):
            mine[...] = value
            graph.launch(stream)
            stream.synchronize()
            np.testing.assert_array_equal(back.array((size,), np.dtype(np.uint8)), mine)
        done.record(stream.handle)
        done.synchronize()
        free, total = device.memory_bytes()
        with pytest.raises(BackendError, match="Out of memory on cuda:0"):
            device.allocate(2 * total, "a test")
        assert free <= total


# Arrays on the device.


@pytest.fixture
def session(fake_gpu: FakeGpu, tmp_path: Path) -> Iterator[TrtSession]:
    with fake_gpu.embedder(tmp_path) as opened:
        yield opened


def on_device(gpu: FakeGpu, feed: dict[str, Array]) -> dict[str, Any]:
    return {name: OnDevice(gpu.cuda, array) for name, array in feed.items()}


def assert_embedded(got: Any, feed: dict[str, Array]) -> None:
    for name, expected in embed(feed).items():
        assert isinstance(got[name], DeviceArray)
        np.testing.assert_allclose(got[name].numpy(), expected, rtol=1e-5, atol=1e-5)


class Dlpack:
    """An array on the fake GPU with __dlpack__ only, as DLPack's specification has it."""

    def __init__(self, held: OnDevice, kind: int = 2) -> None:
        self.held, self.kind = held, kind
        array = held.array
        self.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        code = {"i": 0, "u": 1, "f": 2, "b": 6}[array.dtype.kind]
        self.tensor = device_arrays._DLTensor(
            held.address, kind, 0, array.ndim, code, 8 * array.itemsize, 1
        )
        self.tensor.shape = self.shape

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 0

    def __dlpack__(self, *, stream: int | None = None) -> object:
        assert stream is None or stream > 0
        make = ctypes.pythonapi.PyCapsule_New
        make.restype = ctypes.py_object
        make.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return make(ctypes.addressof(self.tensor), b"dltensor", None)


@pytest.mark.parametrize("wrap", [lambda held: held, Dlpack], ids=["interface", "dlpack"])
def test_inputs_on_the_device_are_not_copied(
    wrap: Callable[[OnDevice], Any], session: TrtSession, fake_gpu: FakeGpu
) -> None:
    feed = feed_of(3)
    given: dict[str, Any] = {name: wrap(held) for name, held in on_device(fake_gpu, feed).items()}
    for _ in range(3):
        assert_embedded(session.run_device(given), feed)
    assert fake_gpu.cuda.copied["to device"] == 0
    assert_embedded(session.run_device({"x": given["x"], "gate": feed["gate"]}), feed)
    assert fake_gpu.cuda.copied["to device"] == feed["gate"].nbytes


def test_outputs_on_the_device_belong_to_the_caller(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    session, feed = fake_gpu.embedder(tmp_path), feed_of(3)
    first = session.run_device(feed)
    binding = session.bind_device(on_device(fake_gpu, feed))
    for seed in range(3):
        fresh = feed_of(3, seed)
        for name, held in binding.inputs.items():
            held.write(fresh[name])  # type: ignore[attr-defined]
        assert_embedded(binding.run(), fresh)
    session.close()
    assert_embedded(first, feed)
    assert first["y"].__cuda_array_interface__["data"] == (first["y"].address, False)
    for call in (binding.run, lambda: session.run_device(feed)):
        with pytest.raises(BackendError, match="closed"):
            call()
    del first, binding, call, held
    gc.collect()
    assert fake_gpu.cuda.used() == 0


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"strides": (4, 32)}, InputError, r"'x': its elements .* not contiguous.*contiguous"),
        ({"data": 4}, InputError, r"'x': starts at 0x.*256 bytes.*clone"),
        ({"data": None}, InputError, "'x': is not on cuda:0"),
        ({"typestr": "<f8"}, DTypeError, "'x': got dtype float64"),
        ({"shape": (3, 7)}, ShapeError, r"'x': got \(3, 7\)"),
        ({"mask": object()}, InputError, "'x': masked"),
        ({"typestr": "what"}, InputError, "'x': its __cuda_array_interface__ cannot be read"),
    ],
)
def test_device_arrays_that_cannot_be_read_in_place(
    change: dict[str, Any],
    kind: type[InputError],
    message: str,
    session: TrtSession,
    fake_gpu: FakeGpu,
) -> None:
    feed = feed_of(3)
    given = on_device(fake_gpu, feed)
    x = given["x"]
    if "data" in change:
        offset = change["data"]
        at = x.address + offset if offset else feed["x"].ctypes.data
        change = {"data": (at, False)}
    x.interface |= change
    for run in (session.run_device, session.bind_device):
        with pytest.raises(kind, match=message):
            run(given)
    with pytest.raises(InputError, match="'x': got"):
        session.run_device(given | {"x": [1.0]})
