"""Sessions on TensorRT engines.

A call runs in a slot (slot.py). `EngineOptions.contexts` slots serve concurrent calls; more calls
wait. A binding has its own slot. `run_device` and `bind_device` read inputs on the device and leave
the outputs there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TypeAlias

import numpy as np

from mmedge.errors import BackendError, InputError
from mmedge.runtimes.base import BoundRun, SessionBase, check_same_shapes, closed_error
from mmedge.runtimes.cuda.arrays import (
    DeviceArray,
    DeviceInput,
    DeviceView,
    is_device_array,
    view,
)
from mmedge.runtimes.cuda.streams import Event
from mmedge.runtimes.session import Placement, SessionOptions
from mmedge.runtimes.trt.device_engine import DeviceEngine
from mmedge.runtimes.trt.slot import Call, ExecutionSlot, Prepared
from mmedge.runtimes.trt.state import TrtState
from mmedge.specs import Array, State, check_bindable, check_feed

__all__ = ["TrtDeviceBinding", "TrtSession"]

_Input: TypeAlias = Array | DeviceInput


class TrtSession(SessionBase[DeviceEngine]):
    """A Session on a TensorRT engine. Made by `open_session` of a TensorRT backend.

    Args:
        engine: The engine, owned by the session.
        options: The session's options.
        placement: Its placement; `providers` counts the engine's layers by precision.
    """

    def __init__(self, engine: DeviceEngine, options: SessionOptions, placement: Placement) -> None:
        inputs = tuple(tensor.spec for tensor in engine.inputs)
        outputs = tuple(tensor.spec for tensor in engine.outputs)
        super().__init__(engine, engine.model, inputs, outputs, placement, options.axes)
        self._device = engine.device
        self._options = options
        self._turn = threading.Condition()
        self._idle: list[ExecutionSlot] = []
        self._made = 0
        self._waiting = 0
        self._has_run = False

    def _run(self, engine: DeviceEngine, feed: Mapping[str, Array]) -> dict[str, Array]:
        with self._device.current(), _Lent(self, engine) as slot:
            outputs = slot.run(feed)
        if not self._has_run:
            self._has_run = True  # most kernels are compiled now
            engine.save_runtime_cache()
        return outputs

    def run_device(
        self, feed: Mapping[str, _Input], *, stream: int | None = None
    ) -> dict[str, DeviceArray]:
        """Run on device arrays, and leave the outputs on the device.

        Args:
            feed: As for run; arrays may also be on the device, with `__cuda_array_interface__` or
                `__dlpack__`. These are read in place: contiguous, at an address aligned to 256
                bytes.
            stream: Handle of the CUDA stream that writes them. None uses the stream that the arrays
                name, or CUDA's default stream.

        Returns:
            Arrays on the device by name, complete, in new memory for each call. In a loop
            bind_device is faster.

        Raises:
            InputError: As run, and if an array is elsewhere or cannot be read in place.
            BackendError: As run.
        """
        engine = self._opened()
        with self._device.current(), _Lent(self, engine) as slot:
            host, views = self._split(feed, slot, stream)
            return slot.run_on_device(host, views)

    def bind(self, feed: Mapping[str, Array]) -> BoundRun:
        """Preallocate for the shapes of `feed`; see Session.bind.

        Inputs in page-locked memory (PinnedMemory.array, torch's pin_memory) are copied to the
        device directly, others through such memory. The engine runs twice, so that a binding's
        first run is as fast as the others.
        """
        engine = self._opened()
        check_bindable(self._inputs, feed, self._axes)
        page_locked = {
            name: array.ctypes.data
            for name, array in feed.items()
            if self._device.is_page_locked(array.ctypes.data)
            and self._device.is_page_locked(array.ctypes.data + array.nbytes - 1)
        }
        with self._device.current(), self._slot_for_binding(engine, page_locked) as slot:
            prepared = _warm_up(slot, slot.call_of(feed, {}, "host"), feed)
            outputs = slot.host_outputs(prepared)
        inputs = dict(feed)
        bound = _Bound(engine, slot, prepared, outputs)
        return self._track(
            BoundRun(self._model, inputs, outputs, lambda: bound.run_on(inputs), bound.release)
        )

    def bind_device(
        self, feed: Mapping[str, _Input], *, stream: int | None = None
    ) -> TrtDeviceBinding:
        """Preallocate for device inputs, with outputs that stay on the device.

        Args:
            feed: As for run_device. Arrays on the host are copied in every run.
            stream: As for run_device.

        Raises:
            InputError: As run_device.
            BackendError: As run, and if the size of an output is known only after the run, or
                depends on the values of an input.
        """
        engine = self._opened()
        values = [tensor.spec.name for tensor in engine.inputs if tensor.on_host]
        if values:
            raise BackendError(
                f"{self._model}: shapes depend on the values of {values}, so nothing can be bound "
                "on the device. Use run_device."
            )
        with self._device.current(), self._slot_for_binding(engine, {}) as slot:
            host, views = self._split(feed, slot, stream)
            prepared = _warm_up(slot, slot.call_of(host, views, "bound"), host)
            if prepared.growing:
                raise BackendError(
                    f"{self._model}: the size of {sorted(prepared.growing)} is known only after "
                    "the run, so it cannot be bound. Use run_device."
                )
            outputs = slot.device_outputs(prepared)
        return self._track(TrtDeviceBinding(engine, slot, prepared, dict(feed), host, outputs))

    def _state_kind(self, state: State) -> type[TrtState]:  # noqa: ARG002
        return TrtState

    def _free(self, engine: DeviceEngine) -> None:
        with self._turn:
            idle, self._idle = self._idle, []
        with self._device.current():
            for slot in idle:
                _close(slot)
        engine.save_runtime_cache()

    def _take(self, engine: DeviceEngine) -> ExecutionSlot:
        with self._turn:
            while not self._idle and self._made >= self._options.engine.contexts:
                self._waiting += 1
                try:
                    self._turn.wait()
                finally:
                    self._waiting -= 1
            if self._idle:
                return self._idle.pop()
            self._made += 1
        try:
            return ExecutionSlot(engine, self._options)
        except BaseException:
            self._give(None)
            raise

    def _give(self, slot: ExecutionSlot | None) -> None:
        """Return a slot for the next call; None if it was closed and is to be replaced."""
        with self._turn:
            if slot is None:
                self._made -= 1
            elif self._engine is not None or len(self._idle) < self._waiting:
                self._idle.append(slot)
                slot = None
            self._turn.notify()
        if slot is not None:
            _close(slot)

    @contextmanager
    def _slot_for_binding(
        self, engine: DeviceEngine, page_locked: Mapping[str, int]
    ) -> Iterator[ExecutionSlot]:
        """Make a slot, closing it if it cannot be bound."""
        slot = ExecutionSlot(engine, self._options, page_locked)
        try:
            yield slot
        except BaseException:
            _close(slot)
            raise

    def _split(
        self, feed: Mapping[str, _Input], slot: ExecutionSlot, stream: int | None
    ) -> tuple[dict[str, Array], dict[str, DeviceView]]:
        """Check a feed, and split it into host and device arrays."""
        views = {
            name: view(name, value, self._device, slot.stream, stream)
            for name, value in feed.items()
            if is_device_array(value)
        }
        host = {name: value for name, value in feed.items() if name not in views}
        stand_ins = {name: seen.stand_in() for name, seen in views.items()}
        check_feed(self._inputs, {**host, **stand_ins}, self._axes)  # type: ignore[dict-item]
        return host, views  # type: ignore[return-value]


class _Lent:
    """Context manager with exclusive use of a slot; a failed slot is not reused."""

    __slots__ = ("_engine", "_session", "_slot")

    def __init__(self, session: TrtSession, engine: DeviceEngine) -> None:
        self._session = session
        self._engine = engine

    def __enter__(self) -> ExecutionSlot:
        self._slot = self._session._take(self._engine)
        return self._slot

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Wrong inputs are rejected before anything has run.
        if kind is None or issubclass(kind, InputError):
            self._session._give(self._slot)
        else:
            self._session._give(None)
            _close(self._slot)


class _Bound:
    """A slot that repeats one call. Closing it drops all references to the engine.

    Args:
        engine: The engine.
        slot: The slot.
        prepared: The call.
        outputs: Host outputs; None if they stay on the device.
    """

    def __init__(
        self,
        engine: DeviceEngine,
        slot: ExecutionSlot,
        prepared: Prepared,
        outputs: dict[str, Array] | None = None,
    ) -> None:
        self._model = engine.model
        self._device = engine.device
        # Shapes may depend on the values of these inputs.
        self._reads_host = any(tensor.on_host for tensor in engine.inputs)
        self._bound: tuple[ExecutionSlot, Prepared] | None = slot, prepared
        self._host_outputs = outputs
        self._lock = threading.Lock()
        self._failed = False

    def run_on(self, host: Mapping[str, Array], writer: int | None = None) -> None:
        """Run once; after a failure the binding refuses to run."""
        with self._lock, self._device.current():
            if self._bound is None:
                if self._failed:
                    raise BackendError(
                        f"{self._model}: an earlier run of this binding failed. Bind again."
                    )
                raise closed_error(self._model)
            slot, prepared = self._bound
            try:
                if writer is not None:
                    event = Event(self._device)
                    event.record(writer)
                    slot.stream.wait(event)
                if self._reads_host and prepared.call is not None:
                    call = slot.call_of(host, {}, prepared.call.outputs)
                    prepared = slot.prepare(call, host)
                else:
                    slot.fill(host)
                slot.launch(prepared)
                slot.wait()
                if self._host_outputs is not None and (prepared.growing or self._reads_host):
                    self._refresh(slot.host_outputs(prepared), self._host_outputs)
            except BackendError:
                self._failed = True
                self._drop()
                raise

    def _refresh(self, made: dict[str, Array], outputs: dict[str, Array]) -> None:
        """Update outputs whose shapes or addresses changed."""
        check_same_shapes(self._model, made, outputs)
        for name, array in made.items():
            if not np.may_share_memory(array, outputs[name]):
                outputs[name][...] = array

    def release(self) -> None:
        """Free the slot."""
        with self._lock, self._device.current():
            self._drop()

    def _drop(self) -> None:
        bound, self._bound = self._bound, None
        if bound is not None:
            _close(bound[0])


class TrtDeviceBinding(_Bound):
    """Bound inputs and outputs on the device. Made by `TrtSession.bind_device`.

    `run` reads the current content of the inputs: writes must have finished, or their stream be
    given.
    """

    def __init__(
        self,
        engine: DeviceEngine,
        slot: ExecutionSlot,
        prepared: Prepared,
        inputs: dict[str, _Input],
        host: dict[str, Array],
        outputs: dict[str, DeviceArray],
    ) -> None:
        super().__init__(engine, slot, prepared)
        self._inputs = inputs
        self._host = host
        self._outputs = outputs

    @property
    def inputs(self) -> Mapping[str, _Input]:
        """Bound inputs by name."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, DeviceArray]:
        """Arrays on the device by name, overwritten by every run."""
        return self._outputs

    def run(self, *, stream: int | None = None) -> Mapping[str, DeviceArray]:
        """Run the engine and return `outputs`, which are complete.

        Args:
            stream: Handle of the CUDA stream that writes the inputs; None if writes have finished.

        Raises:
            BackendError: If it fails, or the session is closed.
        """
        self.run_on(self._host, stream)
        return self._outputs


def _warm_up(slot: ExecutionSlot, call: Call, feed: Mapping[str, Array]) -> Prepared:
    """Prepare a call and run it twice, so that its graph is captured."""
    prepared = slot.prepare(call, feed)
    for _ in range(2):
        slot.launch(prepared)
        slot.wait()
    return prepared


def _close(slot: ExecutionSlot) -> None:
    """Free a slot; its failures were already raised."""
    with suppress(BackendError):
        slot.close()
