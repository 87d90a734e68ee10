"""Running a feed in several stateful calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from mmedge.runtimes.session import Session
from mmedge.specs import Array, State, TensorSpec

__all__ = ["run_steps"]

_STEPS = 2  # after the first call


def run_steps(session: Session, state: State, feed: Mapping[str, Array]) -> dict[str, Array]:
    """Run a feed as a prefill and two single-position steps.

    A state without positions, such as that of a GRU, is handed on between three calls of the whole
    feed.

    Args:
        session: What runs.
        state: Of its graph.
        feed: Every input, of one call from the state's beginning.

    Returns:
        Outputs that are no state, those of the calls joined along the positions, or along the
        first axis where there are none.

    Raises:
        InputError, BackendError: See StatefulRun.step.
    """
    held = {tensor.input for tensor in state.tensors}
    specs = [spec for spec in session.inputs if spec.name not in held]
    given = {t.input: feed[t.input] for t in state.tensors if t.update == "constant"}
    shape = next(feed[spec.name].shape for spec in session.inputs if state.batch in spec.shape)
    batch = shape[
        next(s.shape for s in session.inputs if state.batch in s.shape).index(state.batch)
    ]
    with session.start(state, batch=batch, given=given) as run:
        calls = [run.step(part) for part in _parts(specs, state, feed)]
    axes = {spec.name: _positions(spec, state) for spec in session.outputs}
    return {
        name: np.concatenate([call[name] for call in calls], axis=axes[name]) for name in calls[0]
    }


def _parts(
    specs: list[TensorSpec], state: State, feed: Mapping[str, Array]
) -> Iterator[dict[str, Array]]:
    """Yield the feed of each call."""
    lengths = {
        feed[spec.name].shape[spec.shape.index(state.new)]
        for spec in specs
        if state.new in spec.shape
    }
    if not lengths:
        for _ in range(1 + _STEPS):
            yield {spec.name: feed[spec.name] for spec in specs}
        return
    (length,) = lengths
    first = max(1, length - _STEPS)
    for start, stop in [(0, first), *((at, at + 1) for at in range(first, length))]:
        yield {spec.name: _cut(spec, state, feed[spec.name], start, stop) for spec in specs}


def _positions(spec: TensorSpec, state: State) -> int:
    """Return the axis of an output's positions, the first where it has none."""
    names = [name for name in (state.new, state.kept) if name in spec.shape]
    return spec.shape.index(names[0]) if names else 0


def _cut(spec: TensorSpec, state: State, array: Array, start: int, stop: int) -> Array:
    """Slice an input to some positions; axes that include the past start at 0."""
    if state.kept is not None and state.kept in spec.shape:  # outputs for all of the positions
        whole = np.arange(stop - start, dtype=spec.dtype)[::-1]
        return np.ascontiguousarray(np.broadcast_to(whole, (len(array), stop - start)))
    cuts = []
    for dim in spec.shape:
        terms = dim.split(" + ") if isinstance(dim, str) else ()
        begin = start if len(terms) == 1 else 0
        cuts.append(slice(begin, stop) if state.new in terms else slice(None))
    return array[tuple(cuts)]
