"""Session contract: one graph, ready to run on any engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from mmedge.closing import Closing
from mmedge.errors import InputError
from mmedge.specs import Array, Axis, State, TensorSpec

__all__ = [
    "Binding",
    "BuildProgress",
    "EngineOptions",
    "Placement",
    "Session",
    "SessionOptions",
    "StatefulRun",
]

BuildProgress: TypeAlias = Callable[[str, int, int], None]
"""Build callback: phase, steps done, steps in all."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """TensorRT options; other backends ignore them.

    Attributes:
        contexts: Concurrent calls, each with its own execution context, stream and buffers,
            allocated on first use; further calls wait.
        graphs: CUDA graphs kept per context, one per shape, the least recently used evicted first;
            0 for none. TensorRT-RTX manages its own graphs: 0 turns them off.
        scratch: Device memory for activations. "most": enough for the largest shapes of the
            profiles, allocated at once. "needed": enough for the shapes seen so far.
        weight_streaming_bytes: Device memory for the weights of an engine built with weight
            streaming; the rest stays on the host. None keeps all on the device.

    Raises:
        InputError: If a number is out of range.
    """

    contexts: int = 4
    graphs: int = 8
    scratch: Literal["most", "needed"] = "most"
    weight_streaming_bytes: int | None = None

    def __post_init__(self) -> None:
        bounds = {"contexts": 1, "graphs": 0, "weight_streaming_bytes": 0}
        for name, bound in bounds.items():
            got = getattr(self, name)
            if got is not None and got < bound:
                raise InputError(f"{name}: got {got}, expected at least {bound}.")


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """Session options. The defaults suit a single caller that needs low latency.

    Attributes:
        device: "cpu", "cuda" or "cuda:N"; where it cannot run there, PlacementError.
        threads: Threads inside one operator; None for one per CPU that this process may use.
        spin: Keep idle worker threads spinning between operators: lower latency under constant
            load, wasted power otherwise.
        arena: Keep freed memory for the next call. Off returns it to the system after each call,
            which takes time; loading inline weights may then peak higher.
        prepack: Copy weights into the kernels' preferred layout. Off starts faster, needs less
            memory and runs slower.
        graph_optimization: Level of the engine's graph optimization; "auto" takes the highest that
            is safe for the graph.
        profile_to: Folder for the engine's own per-node trace, complete once the session is closed;
            None for none.
        axes: Bounds of dynamic axes, by name. TensorRT builds engines for them; every backend
            takes an empty axis only where its `min` is 0.
        engine: How a TensorRT engine is run; other backends ignore it.

    Raises:
        InputError: If `threads` is below 1.
    """

    device: str = "cpu"
    threads: int | None = None
    spin: bool = True
    arena: bool = True
    prepack: bool = True
    graph_optimization: Literal["auto", "none", "basic", "extended", "all"] = "auto"
    profile_to: Path | None = None
    axes: Mapping[str, Axis] | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise InputError(
                f"threads: got {self.threads}, expected at least 1, or None for one per CPU."
            )


@dataclass(frozen=True, slots=True)
class Placement:
    """Actual placement of a graph, read from the engine.

    Attributes:
        backend: Name in BACKENDS.
        device: The device requested, which holds every node but those in `exceptions`.
        engine: Engine and version, e.g. "onnxruntime 1.32.0".
        providers: Nodes by execution provider; empty if the engine does not report it.
        exceptions: Nodes that run elsewhere by design (shape arithmetic on the CPU of a GPU
            session), by name, with the device that runs them.
    """

    backend: str
    device: str
    engine: str
    providers: Mapping[str, int] = field(default_factory=dict)
    exceptions: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        parts = [f"{count} nodes on {name}" for name, count in self.providers.items()]
        parts += [f"{len(self.exceptions)} elsewhere"] if self.exceptions else []
        nodes = f": {', '.join(parts)}" if parts else ""
        return f"<Placement {self.backend} ({self.engine}) on {self.device}{nodes}>"


class Binding(Protocol):
    """Preallocated buffers of one shape: write to `inputs`, call `run`, read `outputs`.

    The arrays stay the same from call to call: nothing is allocated and nothing is copied on the
    host. A binding belongs to one thread at a time.
    """

    @property
    def inputs(self) -> Mapping[str, Array]:
        """Input buffers by name, to be written in place."""
        ...

    @property
    def outputs(self) -> Mapping[str, Array]:
        """Output buffers by name, overwritten by every run."""
        ...

    def run(self) -> Mapping[str, Array]:
        """Run the graph on the bound buffers and return `outputs`."""
        ...


class StatefulRun(Closing, Protocol):
    """Stateful calls, whose state stays where the engine keeps it.

    One thread at a time. Where a call is refused or fails, the state is as it was before.
    """

    @property
    def length(self) -> int:
        """Number of positions in the state; 0 if nothing grows."""
        ...

    def step(self, feed: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run the graph on new positions.

        Args:
            feed: One array for every input that is no state, as for Session.run.

        Returns:
            Outputs that are no state, by name, owned by the caller.

        Raises:
            InputError: If the feed does not match, or the state would outgrow its capacity.
            BackendError: As for Session.run, and if an output is not the state that was declared,
                or this is closed.
        """
        ...

    def reorder(self, rows: Array) -> None:
        """Reorder the sequences, as beam search does.

        Args:
            rows: (new batch,) integers: which sequence each one continues. A sequence may come
                several times or not at all, so the batch may change.

        Raises:
            InputError: If a number is not one of a sequence.
            BackendError: If this is closed.
        """
        ...

    def truncate(self, length: int) -> None:
        """Drop the positions from `length` on, for example to undo a chat turn.

        Raises:
            InputError: If there are not so many, or a part of the state is replaced at each call.
            BackendError: If this is closed.
        """
        ...

    def save(self) -> dict[str, Array]:
        """Return a copy of the state by input name, for Session.start(given=...).

        Raises:
            BackendError: If this is closed.
        """
        ...


@runtime_checkable
class Session(Closing, Protocol):
    """One graph, ready to run.

    `run` may be called from several threads at once, also while another closes the session: a call
    that has begun returns its outputs, a later one raises BackendError.
    """

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Input specs, in the graph's order."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Output specs, in the graph's order."""
        ...

    @property
    def placement(self) -> Placement:
        """Actual placement, reported by the engine."""
        ...

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph.

        Args:
            feed: One array for every input, matching its spec in dtype and shape. Arrays that are
                not C-contiguous are copied.

        Returns:
            Output arrays by name, owned by the caller.

        Raises:
            InputError: If the feed does not match `inputs` (ShapeError, DTypeError).
            BackendError: If the engine fails, or the session is closed.
        """
        ...

    def bind(self, feed: Mapping[str, Array]) -> Binding:
        """Preallocate for the shapes of `feed`, whose C-contiguous arrays become the inputs.

        Raises:
            InputError: As for run, and if an array is not C-contiguous and aligned.
            BackendError: If the engine fails, or the session is closed.
        """
        ...

    def start(
        self,
        state: State,
        *,
        batch: int = 1,
        capacity: int | None = None,
        given: Mapping[str, Array] | None = None,
    ) -> StatefulRun:
        """Start stateful calls.

        Args:
            state: Of this graph. It begins with zeros and without positions.
            batch: Number of sequences.
            capacity: Largest number of positions; None for the largest that the state and the
                graph allow.
            given: First values by input name: those that stay constant, or all that a `save`
                returned. They are not copied: leave them as they are.

        Raises:
            InputError: If the state is not of this graph, a value is missing or does not match, or
                the capacity is too small or too large.
            BackendError: If the session is closed.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory. Closing twice is allowed; later runs raise a BackendError."""
        ...
