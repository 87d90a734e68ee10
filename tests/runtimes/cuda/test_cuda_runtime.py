"""The layer over CUDA's runtime API: on a GPU that is not there, and on the library without one."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import cudaError_t, cudaMemoryType
from fake_gpu import FakeGpu

from mmedge.errors import BackendError, BackendUnavailableError
from mmedge.runtimes.cuda import runtime as cuda
from mmedge.runtimes.cuda.runtime import Device, DeviceProperties, in_words
from mmedge.runtimes.cuda.streams import Event, Graph, Stream

HOST = cudaMemoryType.cudaMemoryTypeHost


def test_a_device_says_what_it_is(fake_gpu: FakeGpu) -> None:
    fake_gpu.cuda.devices = 2
    assert cuda.device_count() == 2
    assert cuda.device_properties(1) == DeviceProperties(1, "Fake GPU 1", "8.9", 64 << 20, False, 4)
    assert (cuda.driver_version(), cuda.cuda_version()) == ("13.0", "13.5")
    assert Device(0).memory_bytes() == (64 << 20, 64 << 20)
    assert repr(Device(1)) == "<Device cuda:1 (Fake GPU 1)>"


@pytest.mark.parametrize("code", list(cudaError_t)[1:])
def test_every_error_is_told_by_cudas_own_name_and_text(
    code: cudaError_t, fake_gpu: FakeGpu
) -> None:
    stream = Stream(Device(0))
    fake_gpu.cuda.failures["cudaStreamSynchronize"] = [code]
    with pytest.raises(BackendError) as caught:
        stream.synchronize()
    if code is cudaError_t.cudaErrorInsufficientDriver:
        assert "too old" in str(caught.value)
    else:
        assert f"{code.name}: what CUDA says of {int(code)}" in str(caught.value)


def test_what_is_unavailable_is_told_from_what_failed(fake_gpu: FakeGpu) -> None:
    device = Device(0)
    for code, kind in (
        (cudaError_t.cudaErrorNoDevice, BackendUnavailableError),
        (cudaError_t.cudaErrorInvalidDevice, BackendUnavailableError),
        (cudaError_t.cudaErrorInvalidValue, BackendError),
        (cudaError_t.cudaErrorMemoryAllocation, BackendError),
    ):
        fake_gpu.cuda.failures["cudaStreamSynchronize"] = [code]
        with pytest.raises(BackendError) as caught:
            Stream(device).synchronize()
        assert type(caught.value) is kind


def test_memory_goes_with_its_last_reference(fake_gpu: FakeGpu) -> None:
    device = Device(0)
    memory = device.allocate(1000, "a test")
    pinned = device.allocate_pinned(1000, "a test")
    assert fake_gpu.cuda.used() == fake_gpu.cuda.used(HOST) == 1000
    array = pinned.array((5, 10), np.dtype(np.float32))
    array[...] = 3
    assert (array.shape, array.ctypes.data) == ((5, 10), pinned.address)
    part = array[2]
    del pinned, array, memory
    gc.collect()
    assert (fake_gpu.cuda.used(), fake_gpu.cuda.used(HOST)) == (0, 1000)
    np.testing.assert_array_equal(part, np.full(10, 3))
    del part
    assert fake_gpu.cuda.used(HOST) == 0


def test_freeing_twice_is_fine(fake_gpu: FakeGpu) -> None:
    memory = Device(0).allocate(10, "a test")
    memory.free()
    memory.free()
    assert fake_gpu.cuda.calls["cudaFree"] == 1


def test_out_of_memory(fake_gpu: FakeGpu) -> None:
    device = Device(0)
    held = device.allocate(60 << 20, "a test")
    with pytest.raises(BackendError) as caught:
        device.allocate(6 << 20, "two tests")
    said = str(caught.value)
    assert "6.0 MiB needed for two tests, 4.0 MiB of 64.0 MiB are free" in said
    held.free()
    device.allocate(6 << 20, "two tests")
    fake_gpu.cuda.failures["cudaHostAlloc"] = [cudaError_t.cudaErrorMemoryAllocation]
    with pytest.raises(BackendError, match=r"1\.0 GiB of memory for a test.*MemoryAllocation"):
        device.allocate_pinned(1 << 30, "a test")


def test_pointers_are_told_apart(fake_gpu: FakeGpu) -> None:
    fake_gpu.cuda.devices = 2
    device = Device(0)
    memory, pinned = device.allocate(10, "a test"), device.allocate_pinned(10, "a test")
    pageable = np.zeros(10)
    assert device.holds(memory.address)
    assert not Device(1).holds(memory.address)
    assert not device.holds(pinned.address)
    assert [device.is_page_locked(at) for at in (pinned.address, pageable.ctypes.data)] == [
        True,
        False,
    ]


def test_copies_come_when_the_stream_gets_there(fake_gpu: FakeGpu) -> None:
    device = Device(0)
    stream = Stream(device)
    memory, pinned = device.allocate(40, "a test"), device.allocate_pinned(40, "a test")
    array = pinned.array((10,), np.dtype(np.float32))
    array[...] = 1
    stream.copy_to_device(memory.address, pinned.address, 40)
    array[...] = 2  # the copy has not been made yet
    back = device.allocate_pinned(40, "a test").array((10,), np.dtype(np.float32))
    stream.copy_to_host(back.ctypes.data, memory.address, 40)
    event = Event(device)
    event.record(stream.handle)
    other = Stream(device)
    other.wait(event)
    assert not (back == 2).any()
    other.synchronize()
    np.testing.assert_array_equal(back, np.full(10, 2))


def test_a_graph_replays_what_was_captured(fake_gpu: FakeGpu) -> None:
    device = Device(0)
    stream = Stream(device)
    memory, pinned = device.allocate(4, "a test"), device.allocate_pinned(4, "a test")
    array = pinned.array((4,), np.dtype(np.uint8))
    stream.begin_capture()
    stream.copy_to_device(memory.address, pinned.address, 4)
    graph = stream.end_capture()
    assert isinstance(graph, Graph)
    assert fake_gpu.cuda.copied == {}
    for value in (1, 2):
        array[...] = value
        graph.launch(stream)
        stream.synchronize()
        assert fake_gpu.cuda.blocks[memory.address].bytes().tolist() == [value] * 4
    graph.free()
    assert fake_gpu.cuda.launchable == fake_gpu.cuda.graphs == {}


def test_events_tell_the_time_between_them(fake_gpu: FakeGpu) -> None:
    device = Device(0)
    stream = Stream(device)
    first, second = Event(device, timing=True), Event(device, timing=True)
    for event in (first, second):
        event.record(stream.handle)
        event.synchronize()
    assert second.since_ms(first) == 1.5


def test_the_device_is_a_matter_of_each_thread(fake_gpu: FakeGpu) -> None:
    fake_gpu.cuda.devices = 2
    seen = []

    def look() -> None:
        seen.append(fake_gpu.cuda.current)

    with pytest.raises(KeyError), Device(1).current():  # noqa: PT012
        look()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        raise KeyError
    look()
    assert seen == [1, 0, 0]


def test_sizes_in_words() -> None:
    assert [in_words(n) for n in (0, 512 << 10, 5 << 20, 3 << 30)] == [
        "0.0 MiB",
        "0.5 MiB",
        "5.0 MiB",
        "3.0 GiB",
    ]


def test_without_a_driver_the_library_itself_is_understood() -> None:
    if not cuda.bindings_installed():
        pytest.skip("needs cuda-bindings")
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a driver")
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
    assert device.properties.memory_bytes > 0
    with device.current():
        stream = Stream(device)
        size = 1 << 20
        memory = device.allocate(size, "a test")
        pinned = device.allocate_pinned(size, "a test")
        back = device.allocate_pinned(size, "a test")
        mine = pinned.array((size,), np.dtype(np.uint8))
        mine[...] = 5
        back.array((size,), np.dtype(np.uint8))[...] = 0
        assert device.holds(memory.address)
        assert device.is_page_locked(pinned.address)
        begun, done = Event(device, timing=True), Event(device, timing=True, blocking=True)
        begun.record(stream.handle)
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
        assert done.since_ms(begun) > 0
        free, total = device.memory_bytes()
        with pytest.raises(BackendError, match="Out of memory on cuda:0"):
            device.allocate(2 * total, "a test")
        assert free <= total
