"""Interleaved speed test of a candidate against fp32, in every backend that runs it.

Timing happens in this process, as on a device. A graph that could crash its engine here has been
through a worker first: ONNX Runtime's when the candidate was made, the others' before they are
timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mmedge.bundle.differences import difference
from mmedge.bundle.manifest import Layout
from mmedge.bundle.quality import Figure
from mmedge.bundle.tuning import Speed
from mmedge.converters.graphs.opening import open_graph
from mmedge.converters.graphs.worker import Worker, lent
from mmedge.converters.variants.builder import TOLERANCES, BuiltVariant
from mmedge.energy.counter import EnergyCounter, energy_per_call_mj
from mmedge.errors import BackendError
from mmedge.runtimes.backends import BACKENDS, DEFAULT_BACKEND, backend
from mmedge.runtimes.selection.interleaved import InterleavedTiming, time_interleaved
from mmedge.runtimes.session import Session
from mmedge.specs import Array, Compare

__all__ = ["Runner", "SpeedTest", "installed_backends"]

_ROUNDS = 40
_SECONDS = 6.0
_ENERGY_SECONDS = 2.0
_FP32 = "fp32"


@dataclass(frozen=True)
class Runner:
    """One graph that can be timed.

    Attributes:
        models: ONNX file by layout.
        golden: Its outputs for the golden inputs, from ONNX Runtime, by name.
        cosine_min: Smallest cosine of another backend's outputs with them.
    """

    models: Mapping[Layout, Path]
    golden: Mapping[str, Array]
    cosine_min: float

    @classmethod
    def of(cls, built: BuiltVariant) -> Runner:
        """Return a variant as it is timed."""
        return cls(built.models, built.golden, TOLERANCES[built.recipe.precision].cosine_min)


class SpeedTest:
    """Times candidates of one role against its fp32 on one input."""

    def __init__(
        self,
        fp32: Runner,
        feed: Mapping[str, Array],
        golden: Mapping[str, Array],
        counter: EnergyCounter | None = None,
        worker: Worker | None = None,
        *,
        rounds: int = _ROUNDS,
        seconds: float = _SECONDS,
    ) -> None:
        """Set up the timing of fp32.

        Args:
            fp32: The role in fp32.
            feed: One sample, as the graph takes it.
            golden: Golden inputs, for which a backend has to agree with ONNX Runtime.
            counter: Energy counter, None to skip energy.
            worker: Where a graph runs first; None starts one each time.
            rounds: Maximum rounds.
            seconds: Time to stop after.
        """
        self._limits = rounds, seconds
        self._fp32 = fp32
        self._feed = feed
        self._golden = golden
        self._counter = counter
        self._worker = worker
        self._survived: set[tuple[str, Path]] = set()
        self._fastest_fp32: str | None = None

    def fp32(self) -> Speed:
        """Time fp32 in every backend; the fastest is the reference.

        Raises:
            BackendError: If no backend agrees with ONNX Runtime.
            ProfileError: If the energy counter cannot be read.
        """
        speed = self._time(self._fp32, None)
        if speed is None:
            raise BackendError("Speed of fp32: no installed backend agrees with ONNX Runtime.")
        self._fastest_fp32 = speed.backend
        return speed

    def candidate(self, runner: Runner) -> Speed | None:
        """Time a candidate, alternating with the fastest fp32; None where no backend agrees.

        Raises:
            BackendError: If fp32 cannot be run.
            ProfileError: If the energy counter cannot be read.
        """
        return self._time(runner, self._fastest_fp32 or self.fp32().backend)

    def _time(self, runner: Runner, reference: str | None) -> Speed | None:
        """Time a graph in every backend.

        Args:
            runner: The graph.
            reference: The backend of fp32 to alternate with; None for fp32 itself.
        """
        with ExitStack() as stack:

            def call(runner: Runner, backend_name: str) -> Callable[[], object] | None:
                session = self._open(runner, backend_name)
                if session is None:
                    return None
                stack.callback(session.close)
                return lambda: session.run(self._feed)

            calls = {name: call(runner, name) for name in installed_backends()}
            ours = {name: found for name, found in calls.items() if found is not None}
            fp32 = None if reference is None else call(self._fp32, reference)
            if reference is not None and fp32 is None:
                raise BackendError(f"Speed of fp32: the outputs of {reference} have changed.")
            if not ours:
                return None
            # Ratios are relative to the first entry.
            turns = ours if fp32 is None else {_FP32: fp32, **ours}
            rounds, seconds = self._limits
            raced = time_interleaved(turns, rounds=rounds, seconds=seconds)
            fastest = min(ours, key=lambda name: raced[name].latency_p50_ms)
            energy_mj = None
            if self._counter is not None:
                one = {fastest: ours[fastest]}
                energies = energy_per_call_mj(one, self._counter, seconds=_ENERGY_SECONDS)
                energy_mj = energies[fastest]
        return _speed(fastest, raced[fastest], energy_mj, is_reference=fp32 is None)

    def _open(self, runner: Runner, backend_name: str) -> Session | None:
        """Open a graph in a backend, None where it fails or its outputs differ."""
        layouts = backend(backend_name).layouts("cpu")
        model = next((runner.models[key] for key in layouts if key in runner.models), None)  # type: ignore[index]
        if model is None:
            return None
        try:
            self._survive(model, backend_name)
            session = open_graph(model, backend_name=backend_name)
        except BackendError:
            return None  # it lacks an operator, or crashed; ONNX Runtime ran it already
        try:
            outputs = session.run(self._golden)
        except BackendError:
            session.close()
            return None
        found = [
            difference(expected, outputs[name], Compare.VALUES).cosines.min()
            for name, expected in runner.golden.items()
            if expected.size
        ]
        if not all(cosine >= runner.cosine_min for cosine in found):
            session.close()
            return None
        return session

    def _survive(self, model: Path, backend_name: str) -> None:
        """Run a graph once in a worker with a backend.

        Raises:
            BackendError: If it rejects the graph, or crashes.
        """
        tried = (backend_name, model)
        if backend_name == DEFAULT_BACKEND or tried in self._survived:
            return
        with lent(self._worker) as worker:
            label = f"{model.name}, before it is timed"
            with worker.open(model, label, backend_name=backend_name) as graph:
                graph.run(self._golden)
                graph.run(self._feed)
        self._survived.add(tried)


def installed_backends() -> tuple[str, ...]:
    """Return the backends whose engine is installed here and runs graphs on the CPU."""
    return tuple(
        name
        for name in BACKENDS
        if backend(name).engine_version() is not None and backend(name).layouts("cpu")
    )


def _speed(
    backend_name: str, result: InterleavedTiming, energy_mj: float | None, *, is_reference: bool
) -> Speed:
    ratio = result.ratio
    compared = Figure(
        value=ratio, low=min(result.ratio_low, ratio), high=max(result.ratio_high, ratio)
    )
    return Speed(
        backend=backend_name,
        latency_ms=max(result.latency_p50_ms, 1e-6),
        # fp32 was timed only against itself.
        ratio=Figure(value=1.0, low=1.0, high=1.0) if is_reference else compared,
        energy_mj=energy_mj,
    )
