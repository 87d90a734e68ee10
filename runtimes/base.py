"""Base classes for backends: specs, checks, bindings, closing."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np

from mmedge.errors import BackendError
from mmedge.runtimes.session import Binding, Placement, Session, StatefulRun
from mmedge.runtimes.state import HostState, contiguous
from mmedge.specs import Array, Axis, State, TensorSpec, check_bindable, check_feed, shape_of

__all__ = ["BoundRun", "Releasable", "SessionBase", "check_same_shapes", "closed_error"]

_Engine = TypeVar("_Engine")


class Releasable(Protocol):
    """Holder of engine memory, freed when the session is closed."""

    def release(self) -> None:
        """Free the engine's memory; later runs raise a BackendError."""
        ...


_Binding = TypeVar("_Binding", bound=Releasable)


class SessionBase(Session, Generic[_Engine]):
    """A Session on an engine. A backend adds `_run`; `_bound` where its engine binds memory.

    Args:
        engine: What runs the graph; dropped when the session is closed.
        model: The ONNX file, for messages.
        inputs: Input specs, in the graph's order.
        outputs: Output specs, in the graph's order.
        placement: What really runs where.
        axes: Bounds of dynamic axes, see SessionOptions.
    """

    def __init__(
        self,
        engine: _Engine,
        model: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        placement: Placement,
        axes: Mapping[str, Axis] | None = None,
    ) -> None:
        self._engine: _Engine | None = engine
        self._model = model
        self._inputs = inputs
        self._outputs = outputs
        self._placement = placement
        self._axes = axes
        self._lock = threading.Lock()
        self._bindings: weakref.WeakSet[Releasable] = weakref.WeakSet()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Input specs, in the graph's order."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Output specs, in the graph's order."""
        return self._outputs

    @property
    def placement(self) -> Placement:
        """Actual placement, reported by the engine."""
        return self._placement

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph; see Session.run."""
        engine = self._opened()
        check_feed(self._inputs, feed, self._axes)
        return self._run(engine, {name: contiguous(array) for name, array in feed.items()})

    def bind(self, feed: Mapping[str, Array]) -> Binding:
        """Preallocate for the shapes of `feed`; see Session.bind.

        An output whose shape the inputs do not give is found by running the graph once.
        """
        engine = self._opened()
        sizes = check_bindable(self._inputs, feed, self._axes)
        inputs = dict(feed)
        outputs = {
            spec.name: np.empty(shape, spec.dtype)
            for spec in self._outputs
            if (shape := shape_of(spec, sizes)) is not None
        }
        if len(outputs) < len(self._outputs):
            outputs = {
                name: np.empty_like(value) for name, value in self._run(engine, feed).items()
            }
        call = self._bound(engine, inputs, outputs)
        return self._track(BoundRun(self._model, inputs, outputs, call))

    def start(
        self,
        state: State,
        *,
        batch: int = 1,
        capacity: int | None = None,
        given: Mapping[str, Array] | None = None,
    ) -> StatefulRun:
        """Start stateful calls; see Session.start."""
        self._opened()
        kind = self._state_kind(state)
        return kind(self, state, batch=batch, capacity=capacity, given=given or {})

    def close(self) -> None:
        """Free the engine's memory after pending runs have finished."""
        with self._lock:
            engine, self._engine = self._engine, None
            bindings = list(self._bindings)
        for binding in bindings:
            binding.release()
        if engine is not None:
            self._free(engine)

    def _run(self, engine: _Engine, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph on C-contiguous arrays that match the specs.

        Raises:
            BackendError: If the engine fails.
        """
        raise NotImplementedError

    def _bound(
        self, engine: _Engine, inputs: dict[str, Array], outputs: dict[str, Array]
    ) -> Callable[[], None]:
        """Return a bound run on these arrays; by default `_run` and a copy.

        Raises:
            BackendError: If the engine refuses them.
        """

        def call() -> None:
            made = self._run(engine, inputs)
            check_same_shapes(self._model, made, outputs)
            for name, array in made.items():
                outputs[name][...] = array

        return call

    def _state_kind(self, state: State) -> type[HostState]:  # noqa: ARG002
        """Return the class that keeps a state of this session."""
        return HostState

    def _free(self, engine: _Engine) -> None:
        """Free what the engine does not free when it is garbage-collected."""

    def _track(self, binding: _Binding) -> _Binding:
        """Return a binding that is released with the session, which may be closed by now."""
        with self._lock:
            if self._engine is not None:
                self._bindings.add(binding)
                return binding
        binding.release()
        return binding

    def _opened(self) -> _Engine:
        # A local reference keeps the engine alive until a call ends, even if the session is closed.
        engine = self._engine
        if engine is None:
            raise closed_error(self._model)
        return engine

    def __repr__(self) -> str:
        state = "closed" if self._engine is None else self._placement.device
        return f"<{type(self).__name__} {self._model.name} ({state})>"


class BoundRun:
    """A Binding: arrays, and the call that runs an engine on them.

    Args:
        model: The ONNX file, for messages.
        inputs: Input buffers by name.
        outputs: Output buffers by name.
        call: Runs the engine from the inputs to the outputs.
        release: Frees what `call` holds; None where dropping it is enough.
    """

    def __init__(
        self,
        model: Path,
        inputs: dict[str, Array],
        outputs: dict[str, Array],
        call: Callable[[], None],
        release: Callable[[], None] | None = None,
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._outputs = outputs
        self._call: Callable[[], None] | None = call
        self._free = release

    @property
    def inputs(self) -> Mapping[str, Array]:
        """Input buffers by name, to be written in place."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, Array]:
        """Output buffers by name, overwritten by every run."""
        return self._outputs

    def run(self) -> Mapping[str, Array]:
        """Run the graph on the bound buffers and return `outputs`.

        Raises:
            InputError: If the backend refuses what the buffers hold.
            BackendError: If the engine fails, an output has another shape than when it was bound,
                or the session is closed.
        """
        call = self._call
        if call is None:
            raise closed_error(self._model)
        call()
        return self._outputs

    def release(self) -> None:
        """Free the engine's memory. The arrays stay."""
        self._call = None
        if self._free is not None:
            self._free()


def check_same_shapes(model: Path, made: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
    """Check that outputs have the shapes of their binding.

    Raises:
        BackendError: If one has not, as one may whose size depends on values.
    """
    for name, array in made.items():
        if array.shape != outputs[name].shape:
            raise BackendError(
                f"{model}: output '{name}' has shape {array.shape}, bound was "
                f"{outputs[name].shape}: its size depends on the inputs' values. Use run."
            )


def closed_error(model: Path) -> BackendError:
    """Return the error for using a closed session."""
    return BackendError(f"{model}: the session is closed. Open another with open_session.")
