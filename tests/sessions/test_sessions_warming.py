"""Background builds: which session runs when, and bad engines."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import numpy as np
import pytest
from bundles import DIM

from mmedge.bundle import Bundle
from mmedge.errors import BackendError, EngineBuildError, MmedgeError
from mmedge.runtimes import open_session
from mmedge.runtimes.fake import FakeSession
from mmedge.runtimes.selection.hot_swap import HotSwapSession
from mmedge.runtimes.session import BuildProgress, Session
from mmedge.sessions.verification import replay
from mmedge.sessions.warming import WarmingRole, WarmingState, WarmingUp

ROLE = "image_encoder"


class Bench:
    """A role whose first session is ONNX Runtime's and whose engine a test sets."""

    def __init__(self, bundle: Bundle) -> None:
        self.variant = bundle.variant(ROLE, "fp32")
        self.golden = bundle.golden()
        self.model = bundle.model_path(self.variant)
        self.session = HotSwapSession(open_session(self.model))
        self.go_on = threading.Event()
        self.go_on.set()
        self.building = threading.Event()
        self.failure: MmedgeError | None = None
        self.engines: list[Session] = []
        self.engine: Callable[[], Session] = lambda: open_session(self.model)

    def prepare(self, progress: BuildProgress, stop: threading.Event) -> None:
        progress("build", 1, 2)
        self.building.set()
        while not self.go_on.wait(0.01):
            if stop.is_set():
                raise BackendError("was stopped")
        if self.failure is not None:
            raise self.failure
        progress("build", 2, 2)

    def open(self) -> Session:
        self.engines.append(self.engine())
        return self.engines[-1]

    def warming_role(self) -> WarmingRole:
        return WarmingRole(
            ROLE,
            self.session,
            self.prepare,
            self.open,
            lambda session: replay(session, self.golden, ROLE, self.variant, None),
        )

    def output(self) -> np.ndarray:
        (results,) = self.session.run(self.golden.inputs[ROLE]).values()
        return results


@pytest.fixture
def bench(tiny_bundle: Bundle) -> Bench:
    return Bench(tiny_bundle)


def test_the_engine_takes_over_once_it_is_right(bench: Bench) -> None:
    seen: list[WarmingState] = []
    bench.go_on.clear()
    warming = WarmingUp([bench.warming_role()], lambda _, state: seen.append(state))
    assert bench.building.wait(30)
    before = bench.output()  # runs while the engine is built
    assert warming.states[ROLE].stage == "building"
    assert not warming.wait(0.01)
    bench.go_on.set()
    assert warming.wait(30)

    assert bench.session._last is bench.engines[0]
    np.testing.assert_allclose(bench.output(), before, atol=1e-6)
    stages = list(dict.fromkeys(state.stage for state in seen))
    assert stages == ["building", "checking", "ready"]
    assert WarmingState("building", "build", 1, 2) in seen
    assert warming.states[ROLE].settled
    assert "onnxruntime" in warming.states[ROLE].detail
    bench.session.close()


def test_an_engine_with_other_outputs_is_refused(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def liar() -> Session:
        first = bench.session
        return FakeSession(
            first.inputs,
            first.outputs,
            lambda feed: {"embedding": np.eye(len(feed["pixel_values"]), DIM, dtype=np.float32)},
        )

    bench.engine = liar
    with caplog.at_level(logging.WARNING, "mmedge.engines"):
        warming = WarmingUp([bench.warming_role()])
        assert not warming.wait(30)
    assert warming.states[ROLE].stage == "refused"
    assert "cosine" in warming.states[ROLE].detail
    assert "expected at least" in warming.states[ROLE].detail
    assert "refused" in caplog.text
    assert bench.session.placement.backend == "onnxruntime"
    with pytest.raises(BackendError, match="closed"):
        bench.engines[0].run(bench.golden.inputs[ROLE])
    assert bench.output().shape[1] == DIM
    bench.session.close()


def test_a_failed_build_gives_its_reason_and_the_first_backend_goes_on(bench: Bench) -> None:
    bench.failure = EngineBuildError("node 'n' (op Foo) is not taken")
    warming = WarmingUp([bench.warming_role()])
    assert not warming.wait(30)
    assert warming.states[ROLE] == WarmingState("failed", "node 'n' (op Foo) is not taken")
    assert bench.output().shape[1] == DIM
    bench.session.close()


def test_an_error_in_the_thread_is_reported(bench: Bench) -> None:
    def broken() -> Session:
        raise ZeroDivisionError("oh")

    bench.engine = broken
    warming = WarmingUp([bench.warming_role()])
    assert not warming.wait(30)
    assert warming.states[ROLE] == WarmingState("failed", "ZeroDivisionError: oh")
    bench.session.close()


def test_an_engine_that_fails_on_the_golden_inputs_is_closed(bench: Bench) -> None:
    first = bench.session
    bench.engine = lambda: FakeSession(
        first.inputs, first.outputs, failures=[BackendError("out of memory")]
    )
    warming = WarmingUp([bench.warming_role()])
    assert not warming.wait(30)
    assert warming.states[ROLE] == WarmingState("failed", "out of memory")
    with pytest.raises(BackendError, match="closed"):
        bench.engines[0].run(bench.golden.inputs[ROLE])
    bench.session.close()


def test_stopping_ends_the_build_and_leaves_later_roles_alone(bench: Bench) -> None:
    bench.go_on.clear()
    second = WarmingRole("other", bench.session, bench.prepare, bench.open, lambda _: 1 / 0)  # type: ignore[arg-type, return-value]
    warming = WarmingUp([bench.warming_role(), second])
    assert bench.building.wait(30)
    assert warming.states["other"].stage == "waiting"
    warming.stop()
    assert {state.stage for state in warming.states.values()} == {"stopped"}
    assert bench.engines == []
    bench.session.close()


def test_a_model_closed_meanwhile_keeps_no_engine(bench: Bench) -> None:
    bench.go_on.clear()
    warming = WarmingUp([bench.warming_role()])
    assert bench.building.wait(30)
    bench.session.close()
    bench.go_on.set()
    assert not warming.wait(30)
    assert warming.states[ROLE].stage == "failed"
    with pytest.raises(BackendError, match="closed"):
        bench.engines[0].run(bench.golden.inputs[ROLE])


def test_a_report_that_fails_costs_nothing(bench: Bench) -> None:
    def report(_role: str, _state: WarmingState) -> None:
        raise RuntimeError("the caller's own mistake")

    assert WarmingUp([bench.warming_role()], report).wait(30)
    bench.session.close()
