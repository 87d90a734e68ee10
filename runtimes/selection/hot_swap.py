"""Hot swap: replacing a session's engine while it is in use."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from mmedge.errors import BackendError
from mmedge.runtimes.session import Binding, Placement, Session, StatefulRun
from mmedge.specs import Array, State, TensorSpec

__all__ = ["HotSwapSession"]

_Made = TypeVar("_Made", Binding, StatefulRun)


@dataclass(eq=False)
class _Engine:
    """A session, and the number of calls and bindings that use it."""

    session: Session
    users: int = 0
    retired: bool = False


class HotSwapSession(Session):
    """A session whose calls move to another session on `swap`.

    A call ends in the session in which it began, so no call is dropped. A binding or a state stays
    with the session that made it. The old session is closed once its last call has ended and its
    last binding and state are gone.

    Args:
        first: Session until the first swap. Closed with this session.
    """

    def __init__(self, first: Session) -> None:
        # Re-entrant: the garbage collector may release a binding while this thread holds it.
        self._lock = threading.RLock()
        self._current: _Engine | None = _Engine(first)
        self._old: list[_Engine] = []
        self._last = first  # for specs and placement, even when closed

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Input specs, in the graph's order."""
        return self._last.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Output specs, in the graph's order."""
        return self._last.outputs

    @property
    def placement(self) -> Placement:
        """Placement of the next call."""
        return self._last.placement

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph; see Session.run."""
        with self._in_use() as session:
            return session.run(feed)

    def bind(self, feed: Mapping[str, Array]) -> Binding:
        """Preallocate in the current session; see Session.bind."""
        return self._made(lambda session: session.bind(feed))

    def start(
        self,
        state: State,
        *,
        batch: int = 1,
        capacity: int | None = None,
        given: Mapping[str, Array] | None = None,
    ) -> StatefulRun:
        """Start stateful calls in the current session; see Session.start."""
        return self._made(
            lambda session: session.start(state, batch=batch, capacity=capacity, given=given)
        )

    def swap(self, to: Session) -> None:
        """Run later calls in another session.

        Args:
            to: Has the inputs and outputs of the first. Closed with this
                session; at once if it cannot be used.

        Raises:
            BackendError: If its inputs or outputs differ, or this session is closed.
        """
        differing = _differing(self._last, to)
        with self._lock:
            if self._current is not None and not differing:
                old, self._current, self._last = self._current, _Engine(to), to
                old.retired = True
                unused = old.users == 0
                if not unused:
                    self._old.append(old)
                usable = True
            else:
                usable = False
        if not usable:
            to.close()
            raise BackendError(
                f"Hot swap rejected: the new session {differing}. The old one stays in use. "
                "Build the engine from the graph of the same variant."
                if differing
                else "The session is closed. Load the model again."
            )
        if unused:
            old.session.close()

    def close(self) -> None:
        """Close the current and all old sessions; see Session.close."""
        with self._lock:
            engines = [*self._old, *([] if self._current is None else [self._current])]
            self._current, self._old = None, []
        for engine in engines:
            engine.session.close()

    @contextmanager
    def _in_use(self) -> Iterator[Session]:
        engine = self._taken()
        try:
            yield engine.session
        finally:
            self._given_back(engine)

    def _made(self, make: Callable[[Session], _Made]) -> _Made:
        """Return an object made by the current session, which stays open while it lives."""
        engine = self._taken()
        try:
            made = make(engine.session)
        except BaseException:
            self._given_back(engine)
            raise
        weakref.finalize(made, self._given_back, engine)
        return made

    def _taken(self) -> _Engine:
        with self._lock:
            engine = self._current
            if engine is None:
                raise BackendError("The session is closed. Load the model again.")
            engine.users += 1
            return engine

    def _given_back(self, engine: _Engine) -> None:
        with self._lock:
            engine.users -= 1
            done = engine.retired and engine.users == 0
            if done and engine in self._old:
                self._old.remove(engine)
        if done:
            engine.session.close()


def _differing(ours: Session, theirs: Session) -> str:
    """Return how the inputs or outputs of two sessions differ, "" if they do not.

    Names of dynamic axes may differ: an engine need not keep them.
    """
    for kind, one, other in (
        ("takes", ours.inputs, theirs.inputs),
        ("returns", ours.outputs, theirs.outputs),
    ):
        if [_shape_of(spec) for spec in one] != [_shape_of(spec) for spec in other]:
            got, expected = (", ".join(map(str, specs)) for specs in (other, one))
            return f"{kind} {got}, expected {expected}"
    return ""


def _shape_of(spec: TensorSpec) -> tuple[object, ...]:
    sizes = tuple(None if isinstance(size, str) else size for size in spec.shape)
    return (spec.name, spec.dtype, sizes)
