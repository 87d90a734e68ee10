"""Interleaved speed test of a candidate against fp32, in every backend that runs it.

Graphs run and are timed in a worker process without torch, as on a device: one that crashes an
engine is left out, and the engines' memory goes with the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mmedge.bundle.differences import difference
from mmedge.bundle.manifest import Layout
from mmedge.bundle.quality import Figure
from mmedge.bundle.tuning import Speed
from mmedge.converters.graphs.opening import open_graph
from mmedge.converters.graphs.worker import IsolatedGraph, Worker, lent
from mmedge.converters.variants.builder import TOLERANCES, BuiltVariant
from mmedge.energy.counter import EnergyCounter, energy_per_call_mj
from mmedge.errors import BackendError
from mmedge.runtimes.backends import BACKENDS, backend
from mmedge.runtimes.selection.interleaved import InterleavedTiming
from mmedge.specs import Array, Compare

__all__ = ["Runner", "SpeedTest", "installed_backends"]

_ROUNDS = 40
_SECONDS = 6.0
_ENERGY_SECONDS = 2.0
_FP32 = "fp32"
_CLEAR = 0.9  # of a time or its inverse: no doubt which is faster, and by enough to matter


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
        clear_rounds: int | None = None,
    ) -> None:
        """Set up the timing of fp32.

        Args:
            fp32: The role in fp32.
            feed: One sample, as the graph takes it.
            golden: Golden inputs, for which a backend has to agree with ONNX Runtime.
            counter: Energy counter, None to skip energy.
            worker: Where graphs run; None starts one for each comparison.
            rounds: Maximum rounds.
            seconds: Time to stop after.
            clear_rounds: Rounds after which a clear difference from fp32 is enough; None for no
                such stop.
        """
        self._rounds = (rounds,) if clear_rounds is None else (clear_rounds, rounds)
        self._seconds = seconds
        self._fp32 = fp32
        self._feed = feed
        self._golden = golden
        self._counter = counter
        self._worker = worker
        self._out: set[tuple[str, Path]] = set()
        self._fastest_fp32: str | None = None

    def fp32(self) -> Speed:
        """Time fp32 in every backend; the fastest is the reference.

        Raises:
            BackendError: If no backend agrees with ONNX Runtime.
            ProfileError: If the energy counter cannot be read.
        """
        return self.compare(())[0]

    def candidate(self, runner: Runner) -> Speed | None:
        """Time a candidate, alternating with the fastest fp32; None where no backend agrees.

        Raises:
            BackendError: If fp32 cannot be run.
            ProfileError: If the energy counter cannot be read.
        """
        if self._fastest_fp32 is None:
            return self.compare((runner,))[1][0]
        with lent(self._worker) as worker, ExitStack() as stack:
            return self._time(runner, self._reference(worker, stack), worker)

    def compare(self, runners: Sequence[Runner]) -> tuple[Speed, list[Speed | None]]:
        """Time fp32 and candidates, fp32 opened once for all of them; see fp32 and candidate.

        Raises:
            BackendError: If no backend agrees with ONNX Runtime in fp32.
            ProfileError: If the energy counter cannot be read.
        """
        with lent(self._worker) as worker, ExitStack() as stack:
            opened = self._open_all(self._fp32, worker, stack)
            if not opened:
                raise BackendError("Speed of fp32: no installed backend agrees with ONNX Runtime.")
            fp32 = self._race(self._fp32, opened, None, worker)
            self._fastest_fp32 = fp32.backend
            for name, graph in opened.items():
                if name != fp32.backend:
                    graph.close()
            reference = opened[fp32.backend]
            timed = []
            for runner in runners:
                if not reference.alive:
                    reference = self._reference(worker, stack)
                timed.append(self._time(runner, reference, worker))
            return fp32, timed

    def _reference(self, worker: Worker, stack: ExitStack) -> IsolatedGraph:
        """Open fp32 in its fastest backend."""
        name = self._fastest_fp32 or ""
        graph = self._open(self._fp32, name, worker, stack)
        if graph is None:
            raise BackendError(f"Speed of fp32: the outputs of {name} have changed.")
        return graph

    def _time(self, runner: Runner, fp32: IsolatedGraph, worker: Worker) -> Speed | None:
        """Time a graph in every backend that agrees, alternating with fp32."""
        with ExitStack() as stack:
            opened = self._open_all(runner, worker, stack)
            if not opened:
                return None
            if not fp32.alive:  # one of the others has crashed the process
                fp32 = self._reference(worker, stack)
            return self._race(runner, opened, fp32, worker)

    def _open_all(
        self, runner: Runner, worker: Worker, stack: ExitStack
    ) -> dict[str, IsolatedGraph]:
        """Open a graph in every backend that agrees, again where one crashed the process."""
        while True:
            opened = {
                name: graph
                for name in installed_backends()
                if (graph := self._open(runner, name, worker, stack)) is not None
            }
            if all(graph.alive for graph in opened.values()):
                return opened

    def _open(
        self, runner: Runner, backend_name: str, worker: Worker, stack: ExitStack
    ) -> IsolatedGraph | None:
        """Open a graph in a backend, None where it fails or its outputs differ."""
        model = _model_for(runner, backend_name)
        if model is None or (backend_name, model) in self._out:
            return None
        try:
            label = f"{model.name}, before it is timed"
            graph = stack.enter_context(
                worker.open(model, label, backend_name=backend_name, spin=True)
            )
            outputs = graph.run(self._golden)
        except BackendError:
            # It lacks an operator, or crashed; ONNX Runtime ran it already.
            self._out.add((backend_name, model))
            return None
        found = [
            difference(expected, outputs[name], Compare.VALUES).cosines.min()
            for name, expected in runner.golden.items()
            if expected.size
        ]
        if all(cosine >= runner.cosine_min for cosine in found):
            return graph
        graph.close()
        return None

    def _race(
        self,
        runner: Runner,
        opened: Mapping[str, IsolatedGraph],
        fp32: IsolatedGraph | None,
        worker: Worker,
    ) -> Speed:
        """Time the graphs of a runner by backend; without `fp32`, they are fp32 themselves."""
        # Ratios are relative to the first entry.
        turns = dict(opened) if fp32 is None else {_FP32: fp32, **opened}
        for rounds in self._rounds:
            raced = worker.time(turns, self._feed, rounds=rounds, seconds=self._seconds)
            if fp32 is None or all(_is_clear(raced[name]) for name in opened):
                break
        fastest = min(opened, key=lambda name: raced[name].latency_p50_ms)
        energy_mj = None
        model = _model_for(runner, fastest)
        if self._counter is not None and model is not None:
            # In this process, so that the worker's messages take no energy.
            with open_graph(model, backend_name=fastest, spin=True) as session:
                calls = {fastest: partial(session.run, self._feed)}
                energies = energy_per_call_mj(calls, self._counter, seconds=_ENERGY_SECONDS)
            energy_mj = energies[fastest]
        return _speed(fastest, raced[fastest], energy_mj, is_reference=fp32 is None)


def _model_for(runner: Runner, backend_name: str) -> Path | None:
    """Return the graph in the layout that a backend prefers on the CPU, None where it has none."""
    layouts = backend(backend_name).layouts("cpu")
    return next((runner.models[key] for key in layouts if key in runner.models), None)  # type: ignore[index]


def installed_backends() -> tuple[str, ...]:
    """Return the backends whose engine is installed here and runs graphs on the CPU."""
    return tuple(
        name
        for name in BACKENDS
        if backend(name).engine_version() is not None and backend(name).layouts("cpu")
    )


def _is_clear(result: InterleavedTiming) -> bool:
    return result.ratio_high < _CLEAR or result.ratio_low > 1 / _CLEAR


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
