"""State across calls of a session: KV caches, GRUs, cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mmedge.closing import Closing
from mmedge.errors import BackendError, InputError, ShapeError
from mmedge.specs import (
    Array,
    Axis,
    Dim,
    State,
    StateTensor,
    TensorSpec,
    check_feed,
    did_you_mean,
    shape_of,
)

if TYPE_CHECKING:
    from mmedge.runtimes.base import SessionBase

__all__ = ["HostState", "contiguous"]

_HELD = "held positions"  # buffer axis that is passed up to its filled length


class HostState(Closing):
    """A StatefulRun over any session, with the state in host arrays.

    An engine that keeps state where it computes overrides `_hold`, `_read`, `_take`, `_shape` or
    `_call`.

    Args:
        session: What runs.
        state: Of its graph.
        batch: Number of sequences.
        capacity: Largest length; None for the largest that the state and the graph allow.
        given: First values by input name, see Session.start. They are not copied.

    Raises:
        InputError: See Session.start.
    """

    def __init__(
        self,
        session: SessionBase[Any],
        state: State,
        *,
        batch: int,
        capacity: int | None,
        given: Mapping[str, Array],
    ) -> None:
        self._session = session
        self._state = state
        specs = {spec.name: spec for spec in session.inputs}
        _check_names(state, specs, {spec.name for spec in session.outputs})
        self._specs = {tensor.input: specs[tensor.input] for tensor in state.tensors}
        made = {tensor.output for tensor in state.tensors}
        self._fed = tuple(spec for spec in session.inputs if spec.name not in self._specs)
        self._returned = tuple(spec for spec in session.outputs if spec.name not in made)
        self._growing = tuple(t for t in state.tensors if t.update in ("append", "in_place"))
        grown = [self._specs[t.input].shape[_axis(t)] for t in self._growing]
        self._empty = {dim: Axis(0, 0, 1) for dim in (*grown, _HELD) if isinstance(dim, str)}
        self._length = self._given_length(given, {state.batch: batch})
        self._capacity = self._largest(capacity, [dim for dim in grown if isinstance(dim, int)])
        first = self._first(given, {state.batch: batch})
        held = tuple(self._specs.values())
        self._sizes = check_feed(held, first, self._empty, {state.batch: batch})
        self._checked = False
        self._held: dict[str, Any] | None = {
            name: self._hold(contiguous(array)) for name, array in first.items()
        }

    @property
    def length(self) -> int:
        """Number of positions in the state."""
        return self._length

    def step(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph and update the state; see StatefulRun.step."""
        held = self._opened()
        sizes = check_feed(self._fed, feed, self._session._axes, self._sizes)
        new = sizes.get(self._state.new, 1) if self._growing else 0
        if self._growing and self._length + new > self._capacity:
            raise ShapeError(
                f"The state is full: it holds {self._length} positions and takes "
                f"{self._capacity}, got {new} new. Truncate it, or start one of a larger capacity."
            )
        ready = {name: contiguous(array) for name, array in feed.items()}
        outputs, present = self._call(ready, held, sizes)
        # The first call checks all, later calls only the first.
        grown = [tensor for tensor in self._growing if tensor.input in present]
        for tensor in grown[:1] if self._checked else grown:
            self._check_grown(tensor, held, present[tensor.input], new)
        self._checked = True
        self._held = held | present
        self._grow_to(self._length + new)
        return outputs

    def reorder(self, rows: Array) -> None:
        """Reorder the sequences; see StatefulRun.reorder."""
        held, batch = self._opened(), self._sizes[self._state.batch]
        rows = np.asarray(rows)
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or not rows.size:
            raise InputError(
                f"rows: got {rows.dtype.name}{rows.shape}, expected one integer for each sequence."
            )
        if rows.min() < 0 or rows.max() >= batch:
            raise InputError(f"rows: got {rows.tolist()}, expected numbers from 0 to {batch - 1}.")
        axes = {
            name: spec.shape.index(self._state.batch)
            for name, spec in self._specs.items()
            if self._state.batch in spec.shape
        }
        moved = {name: self._take(held[name], rows, axis) for name, axis in axes.items()}
        self._held = held | moved
        self._sizes[self._state.batch] = len(rows)

    def truncate(self, length: int) -> None:
        """Drop the positions from `length` on; see StatefulRun.truncate."""
        held = self._opened()
        if not 0 <= length <= self._length:
            raise InputError(f"length: got {length}, expected 0 to {self._length}.")
        replaced = [t.input for t in self._state.tensors if t.update == "replace"]
        if replaced and length != self._length:
            raise InputError(
                f"{replaced} cannot be taken back: each call replaces them. save() before, and "
                "start another with given=."
            )
        kept = {
            tensor.input: self._hold(contiguous(self._cut(tensor, held, length)))
            for tensor in self._growing
            if tensor.update == "append" and length != self._length
        }
        self._held = held | kept
        self._grow_to(length)

    def save(self) -> dict[str, Array]:
        """Return a copy of the state by input name; see StatefulRun.save."""
        held = self._opened()
        saved = {name: self._read(value) for name, value in held.items()}
        cut = {t.input: self._cut(t, held, self._length) for t in self._growing}
        return {name: array.copy() for name, array in (saved | cut).items()}

    def close(self) -> None:
        """Free the state. Closing twice is allowed."""
        self._held = None

    def _hold(self, array: Array) -> Any:  # noqa: ANN401
        """Return the engine's form of a host array."""
        return array

    def _read(self, value: Any) -> Array:  # noqa: ANN401
        """Return the host array of an engine value."""
        array: Array = value
        return array

    def _take(self, value: Any, rows: Array, axis: int) -> Any:  # noqa: ANN401
        """Return some rows of an engine value."""
        return self._hold(np.take(self._read(value), rows, axis))

    def _shape(self, value: Any) -> tuple[int, ...]:  # noqa: ANN401
        return tuple(value.shape)

    def _call(
        self,
        feed: Mapping[str, Array],
        held: Mapping[str, Any],
        sizes: Mapping[str, int],  # noqa: ARG002, for engines that allocate before they run
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """Run the graph once.

        Args:
            feed: Inputs that are no state, C-contiguous and checked.
            held: State by input name.
            sizes: Of the dynamic axes.

        Returns:
            Outputs that are no state by output name, and what is new of the state by input name.
        """
        made = self._session._run(self._session._opened(), {**feed, **held})
        outputs = {spec.name: made[spec.name] for spec in self._returned}
        return outputs, {t.input: made[t.output] for t in self._state.tensors if t.output}

    def _opened(self) -> dict[str, Any]:
        if self._held is None:
            raise BackendError("The state is closed. Start another with Session.start.")
        return self._held

    def _given_length(self, given: Mapping[str, Array], batch: Mapping[str, int]) -> int:
        """Check the given state, and return its number of positions."""
        if unknown := sorted(given.keys() - self._specs.keys()):
            raise InputError(
                f"given: {unknown} are no state, expected some of {sorted(self._specs)}."
                + did_you_mean(unknown[0], self._specs)
            )
        specs = {name: self._specs[name] for name in given}
        for tensor in self._growing:
            if tensor.update == "in_place" and tensor.input in specs:
                specs[tensor.input] = _sized(specs[tensor.input], _axis(tensor), _HELD)
        check_feed(tuple(specs.values()), given, self._empty, batch)
        held = {t.input: given[t.input].shape[_axis(t)] for t in self._growing if t.input in given}
        if held and (len(held) < len(self._growing) or len(set(held.values())) > 1):
            raise InputError(
                f"given: got positions {held}, expected the same number for each of "
                f"{[tensor.input for tensor in self._growing]}, or none of them."
            )
        return max(held.values(), default=0)

    def _largest(self, capacity: int | None, buffers: list[int]) -> int:
        """Return the capacity of the state, 0 if nothing grows."""
        if not self._growing:
            return 0
        limits = buffers + ([] if self._state.capacity is None else [self._state.capacity])
        largest = min(limits, default=capacity)
        found = largest if capacity is None else capacity
        if found is None or largest is None or not max(1, self._length) <= found <= largest:
            raise InputError(
                f"capacity: got {found} for a state of {self._length} positions, expected a number "
                f"from {max(1, self._length)} to {largest or 'what memory allows'}."
            )
        return found

    def _first(self, given: Mapping[str, Array], batch: Mapping[str, int]) -> dict[str, Array]:
        """Return the initial state: given tensors, zeros elsewhere."""
        sizes = dict.fromkeys(self._empty, 0) | dict(batch)
        first: dict[str, Array] = {}
        for tensor in self._state.tensors:
            spec, array = self._specs[tensor.input], given.get(tensor.input)
            if tensor.update == "in_place" and isinstance(spec.shape[_axis(tensor)], str):
                spec = _sized(spec, _axis(tensor), self._capacity)
            shape = shape_of(spec, sizes)
            if array is not None and tensor.update != "in_place":
                first[tensor.input] = array
            elif tensor.update == "constant" or shape is None:
                made = f", which {tensor.source[0]} makes" if tensor.source else ""
                raise InputError(f"given: {self._specs[tensor.input]} is missing{made}.")
            else:
                first[tensor.input] = np.zeros(shape, spec.dtype)
                if array is not None:
                    first[tensor.input][_upto(_axis(tensor), self._length)] = array
        return first

    def _check_grown(
        self, tensor: StateTensor, held: Mapping[str, Any], present: object, new: int
    ) -> None:
        expected = list(self._shape(held[tensor.input]))
        if tensor.update == "append":
            expected[_axis(tensor)] += new
        got = self._shape(present)
        if got != tuple(expected):
            raise BackendError(
                f"Output '{tensor.output}' has shape {got}, expected {tuple(expected)}: {new} new "
                f"positions by the axis '{self._state.new}'. Check the role's state."
            )

    def _cut(self, tensor: StateTensor, held: Mapping[str, Any], length: int) -> Array:
        return self._read(held[tensor.input])[_upto(_axis(tensor), length)]

    def _grow_to(self, length: int) -> None:
        self._length = length
        for tensor in self._growing:
            dim = self._specs[tensor.input].shape[_axis(tensor)]
            if tensor.update == "append" and isinstance(dim, str):
                self._sizes[dim] = length


def _axis(tensor: StateTensor) -> int:
    return tensor.axis or 0


def _sized(spec: TensorSpec, axis: int, size: Dim) -> TensorSpec:
    return replace(spec, shape=(*spec.shape[:axis], size, *spec.shape[axis + 1 :]))


def _upto(axis: int, length: int) -> tuple[slice, ...]:
    return (*[slice(None)] * axis, slice(length))


def _check_names(state: State, inputs: Mapping[str, TensorSpec], outputs: set[str]) -> None:
    """Check a state against its graph."""
    for tensor in state.tensors:
        for name, known in ((tensor.input, inputs.keys()), (tensor.output, outputs)):
            if name is not None and name not in known:
                raise InputError(
                    f"State: the graph has no '{name}', expected one of {sorted(known)}."
                    + did_you_mean(name, known)
                )
        if (tensor.output is None) != (tensor.update == "constant"):
            raise InputError(
                f"State '{tensor.input}': got output {tensor.output} for the update "
                f"'{tensor.update}', expected an output for every update but 'constant'."
            )
        spec = inputs[tensor.input]
        if tensor.update in ("append", "in_place"):
            if tensor.axis is None or not 0 <= tensor.axis < len(spec.shape):
                raise InputError(
                    f"State {spec}: got axis {tensor.axis}, expected the one that grows."
                )
            if tensor.update == "append" and isinstance(spec.shape[tensor.axis], int):
                raise InputError(f"State {spec}: axis {tensor.axis} has a fixed size, cannot grow.")


def contiguous(array: Array) -> Array:
    """Return an array, or a copy of it, that is C-contiguous and aligned."""
    if array.flags.c_contiguous and array.flags.aligned:
        return array
    return np.require(array, requirements=["C", "A"])
