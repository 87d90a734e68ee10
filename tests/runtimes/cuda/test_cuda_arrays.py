"""Inputs that lie on the device already, and answers that stay there."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeGpu, OnDevice
from tiny_graphs import embed, feed_of

from mmedge.errors import BackendError, DTypeError, InputError, ShapeError
from mmedge.runtimes.cuda import arrays as device_arrays
from mmedge.runtimes.cuda.arrays import DeviceArray
from mmedge.runtimes.cuda.runtime import Device
from mmedge.runtimes.cuda.streams import Stream
from mmedge.runtimes.trt.session import TrtSession
from mmedge.specs import Array


@pytest.fixture
def session(fake_gpu: FakeGpu, tmp_path: Path) -> Iterator[TrtSession]:
    with fake_gpu.embedder(tmp_path) as opened:
        yield opened


def on_device(gpu: FakeGpu, feed: dict[str, Array], **interface: Any) -> dict[str, Any]:
    return {name: OnDevice(gpu.cuda, array, **interface) for name, array in feed.items()}


def assert_embedded(got: Any, feed: dict[str, Array]) -> None:
    assert list(got) == ["y", "norm"]
    for name, expected in embed(feed).items():
        assert isinstance(got[name], DeviceArray)
        np.testing.assert_allclose(got[name].numpy(), expected, rtol=1e-5, atol=1e-5)


class Dlpack:
    """An array on the fake GPU that offers __dlpack__ alone, as DLPack's specification says."""

    def __init__(self, held: OnDevice, kind: int = 2, strides: bool = False) -> None:
        self.held, self.kind = held, kind
        array = held.array
        self.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        steps = [step // array.itemsize for step in array.strides]
        self.strides = (ctypes.c_int64 * array.ndim)(*steps) if strides else None
        self.asked: list[int | None] = []
        code = {"i": 0, "u": 1, "f": 2, "b": 6}[array.dtype.kind]
        self.tensor = device_arrays._DLTensor(
            held.address, kind, 0, array.ndim, code, 8 * array.itemsize, 1
        )
        self.tensor.shape = self.shape
        if self.strides is not None:
            self.tensor.strides = self.strides

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 0

    def __dlpack__(self, *, stream: int | None = None) -> object:
        self.asked.append(stream)
        make = ctypes.pythonapi.PyCapsule_New
        make.restype = ctypes.py_object
        make.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return make(ctypes.addressof(self.tensor), b"dltensor", None)


@pytest.mark.parametrize("wrap", [lambda held: held, Dlpack], ids=["interface", "dlpack"])
def test_inputs_on_the_device_are_not_copied(
    wrap: Callable[[OnDevice], Any], session: TrtSession, fake_gpu: FakeGpu
) -> None:
    feed = feed_of(3)
    given = {name: wrap(held) for name, held in on_device(fake_gpu, feed).items()}

    for _ in range(3):
        assert_embedded(session.run_device(given), feed)

    assert fake_gpu.cuda.copied["to device"] == 0
    read = sum(array.nbytes for array in embed(feed).values())
    assert fake_gpu.cuda.copied["to host"] == 3 * read  # by .numpy() alone


def test_inputs_may_lie_here_and_there(session: TrtSession, fake_gpu: FakeGpu) -> None:
    feed = feed_of(3)
    for there in ("x", "gate"):
        mixed: dict[str, Any] = dict(feed)
        mixed[there] = OnDevice(fake_gpu.cuda, feed[there])
        assert_embedded(session.run_device(mixed), feed)
    assert fake_gpu.cuda.copied["to device"] == sum(array.nbytes for array in feed.values())


def test_answers_are_the_callers(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    session = fake_gpu.embedder(tmp_path)
    feed, other = feed_of(3), feed_of(3, seed=1)
    first = session.run_device(on_device(fake_gpu, feed))
    session.run_device(on_device(fake_gpu, other))
    assert_embedded(first, feed)
    session.close()
    assert_embedded(first, feed)
    interface = first["y"].__cuda_array_interface__
    assert interface["shape"] == (3, 4)
    assert interface["typestr"] == "<f4"
    assert interface["data"] == (first["y"].address, False)
    assert first["y"].size_bytes == 3 * 4 * 4
    del first
    assert fake_gpu.cuda.used() == 0


def test_what_is_still_being_written_is_waited_for(session: TrtSession, fake_gpu: FakeGpu) -> None:
    feed, device = feed_of(3), Device(0)
    for how in ("interface", "argument", "default"):
        writer = Stream(device)
        handle = 1 if how == "default" else writer.handle
        given = on_device(fake_gpu, feed_of(3, seed=5))
        for name, held in given.items():
            fake_gpu.cuda.put(handle, lambda held=held, name=name: held.write(feed[name]))
            if how == "interface":
                held.interface["stream"] = handle
            elif how == "default":  # version 2, as torch's, tells nothing of a stream
                del held.interface["stream"]
        answers = session.run_device(given, stream=handle if how == "argument" else None)
        assert_embedded(answers, feed)


def test_dlpack_is_told_the_stream(session: TrtSession, fake_gpu: FakeGpu) -> None:
    feed = feed_of(2)
    given = {name: Dlpack(held, strides=True) for name, held in on_device(fake_gpu, feed).items()}
    session.run_device(given)
    (lane,) = session._idle
    assert {stream for each in given.values() for stream in each.asked} == {lane.stream.handle}


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"strides": (4, 32)}, InputError, r"'x': its elements .* not contiguous.*contiguous"),
        ({"offset": 4}, InputError, r"'x': starts at 0x.*256 bytes.*clone"),
        ({"host": True}, InputError, "'x': does not lie on cuda:0"),
        ({"typestr": "<f8"}, DTypeError, "'x': got dtype float64"),
        ({"shape": (3, 7)}, ShapeError, r"'x': got \(3, 7\)"),
        ({"shape": (9, 8)}, ShapeError, r"'batch' is 9|'batch' is 3 elsewhere"),
        ({"mask": object()}, InputError, "'x': masked"),
        ({"typestr": "what"}, InputError, "'x': its __cuda_array_interface__ cannot be read"),
    ],
)
def test_what_cannot_be_read_where_it_lies_is_refused(
    change: dict[str, Any],
    kind: type[InputError],
    says: str,
    session: TrtSession,
    fake_gpu: FakeGpu,
) -> None:
    feed = feed_of(3)
    given = on_device(fake_gpu, feed)
    x = given["x"]
    if "offset" in change:
        x.interface["data"] = (x.address + change["offset"], False)
    elif "host" in change:
        x.interface["data"] = (feed["x"].ctypes.data, False)
    else:
        x.interface |= change

    for run in (session.run_device, session.bind_device):
        with pytest.raises(kind, match=says):
            run(given)
    assert_embedded(session.run_device(on_device(fake_gpu, feed)), feed)


def test_an_array_of_another_gpu_is_refused(session: TrtSession, fake_gpu: FakeGpu) -> None:
    fake_gpu.cuda.devices = 2
    fake_gpu.cuda.cudaSetDevice(1)
    given = on_device(fake_gpu, feed_of(2))
    fake_gpu.cuda.cudaSetDevice(0)
    with pytest.raises(InputError, match=r"does not lie on cuda:0.*Copy it"):
        session.run_device(given)


def test_other_things_are_no_arrays(session: TrtSession, fake_gpu: FakeGpu) -> None:
    feed: dict[str, Any] = dict(feed_of(2))
    for odd in ([1.0], Dlpack(OnDevice(fake_gpu.cuda, feed["x"]), kind=1)):  # on a CPU
        with pytest.raises(InputError, match="'x': got"):
            session.run_device(feed | {"x": odd})

    class Refuses:
        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            raise RuntimeError("it requires a gradient")

    with pytest.raises(InputError, match=r"'x'.*it requires a gradient"):
        session.run_device(feed | {"x": Refuses()})


def test_a_bound_loop_copies_nothing_and_allocates_nothing(
    session: TrtSession, fake_gpu: FakeGpu
) -> None:
    feed = feed_of(3)
    given = on_device(fake_gpu, feed)
    binding = session.bind_device(given)
    assert binding.inputs == given
    addresses = {name: array.address for name, array in binding.outputs.items()}
    calls = fake_gpu.cuda.calls
    for seed in range(3):
        fresh = feed_of(3, seed)
        for name, held in given.items():
            held.write(fresh[name])
        before, copied = calls.copy(), fake_gpu.cuda.copied.copy()
        answers = binding.run()
        assert calls - before == {"cudaGraphLaunch": 1, "cudaStreamSynchronize": 1}
        assert fake_gpu.cuda.copied == copied
        assert_embedded(answers, fresh)
        assert {name: array.address for name, array in answers.items()} == addresses


def test_a_bound_loop_waits_for_the_stream_that_writes(
    session: TrtSession, fake_gpu: FakeGpu
) -> None:
    feed = feed_of(3)
    given = on_device(fake_gpu, feed)
    binding = session.bind_device(given)
    writer = Stream(Device(0))
    fresh = feed_of(3, seed=9)
    for name, held in given.items():
        held.write_later(fresh[name], writer)
    assert_embedded(binding.run(stream=writer.handle), fresh)


def test_a_bound_loop_ends_with_its_session(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    session = fake_gpu.embedder(tmp_path)
    feed = feed_of(3)
    binding = session.bind_device(on_device(fake_gpu, feed))
    session.close()
    with pytest.raises(BackendError, match="closed"):
        binding.run()
    with pytest.raises(BackendError, match="closed"):
        session.run_device(feed)
    with pytest.raises(BackendError, match="closed"):
        session.bind_device(feed)
    assert_embedded(binding.outputs, feed)
