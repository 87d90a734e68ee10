"""Exchanging the engine of a session under calls: none is dropped, none runs in a closed engine."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tiny_graphs import INPUTS, OUTPUTS, embed, feed_of

from mmedge.errors import BackendError, InputError
from mmedge.runtimes.fake import FakeSession
from mmedge.runtimes.selection.hot_swap import HotSwapSession
from mmedge.specs import Array, TensorSpec


class Recorded(FakeSession):
    """A fake whose outputs identify it, and that can be held up."""

    def __init__(self, number: float) -> None:
        super().__init__(INPUTS, OUTPUTS, self._answer)
        self.number = number
        self.closed = False
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def _answer(self, feed: dict[str, Array]) -> dict[str, Array]:  # type: ignore[override]
        self.entered.set()
        assert self.go_on.wait(30)
        assert not self.closed, "runs in an engine that was closed"
        return {name: np.full_like(values, self.number) for name, values in embed(feed).items()}

    def close(self) -> None:
        super().close()
        self.closed = True


def number(session: HotSwapSession) -> float:
    return float(session.run(feed_of(2))["y"][0, 0])


def test_calls_after_a_swap_run_in_the_new_engine() -> None:
    first, second = Recorded(1), Recorded(2)
    with HotSwapSession(first) as session:
        assert number(session) == 1
        session.swap(second)
        assert number(session) == 2
        assert first.closed
    assert second.closed


def test_a_call_ends_in_the_engine_in_which_it_began() -> None:
    first, second = Recorded(1), Recorded(2)
    first.go_on.clear()
    with HotSwapSession(first) as session, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(number, session)
        assert first.entered.wait(30)
        session.swap(second)
        assert number(session) == 2
        assert not first.closed
        first.go_on.set()
        assert slow.result(30) == 1
        assert first.closed


def test_no_call_of_many_threads_is_dropped_and_each_thread_sees_engines_in_order() -> None:
    engines = [Recorded(n) for n in range(8)]
    session = HotSwapSession(engines[0])
    done = threading.Event()

    def caller() -> list[float]:
        seen = []
        while not done.is_set():
            seen.append(number(session))
        return [*seen, number(session)]

    with ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(caller) for _ in range(4)]
        for engine in engines[1:]:
            engine_before = session.placement
            assert engine_before.backend == "fake"
            session.swap(engine)
        done.set()
        for outputs in (each.result(60) for each in callers):
            assert outputs == sorted(outputs)
            assert outputs[-1] == 7
    assert all(engine.closed for engine in engines[:-1])
    session.close()
    assert engines[-1].closed


def test_a_binding_stays_with_its_engine_and_keeps_it_open() -> None:
    first, second = Recorded(1), Recorded(2)
    session = HotSwapSession(first)
    binding = session.bind(feed_of(2))
    session.swap(second)
    assert float(binding.run()["y"][0, 0]) == 1
    assert not first.closed
    del binding
    gc.collect()
    assert first.closed
    session.close()


def test_a_failed_bind_holds_nothing() -> None:
    first = Recorded(1)
    session = HotSwapSession(first)
    with pytest.raises(InputError):
        session.bind({})
    session.swap(Recorded(2))
    assert first.closed
    session.close()


def test_an_engine_of_other_specs_is_refused_and_closed() -> None:
    first = Recorded(1)
    session = HotSwapSession(first)
    other = FakeSession((TensorSpec("z", np.dtype("float32"), ("batch", 2)),), OUTPUTS)
    with pytest.raises(BackendError, match=r"takes z float32\(batch, 2\), expected"):
        session.swap(other)
    with pytest.raises(BackendError, match="closed"):
        other.run({"z": np.zeros((1, 2), np.float32)})
    assert number(session) == 1
    session.close()


def test_names_of_dynamic_axes_may_differ() -> None:
    renamed = tuple(
        TensorSpec(s.name, s.dtype, tuple("n" if isinstance(n, str) else n for n in s.shape))
        for s in INPUTS
    )
    session = HotSwapSession(Recorded(1))
    session.swap(FakeSession(renamed, OUTPUTS, embed))
    assert session.inputs == renamed
    session.close()


def test_a_swap_after_closing_closes_the_newcomer() -> None:
    session = HotSwapSession(Recorded(1))
    session.close()
    late = Recorded(2)
    with pytest.raises(BackendError, match="closed"):
        session.swap(late)
    assert late.closed
    with pytest.raises(BackendError, match="closed"):
        session.run(feed_of(1))
