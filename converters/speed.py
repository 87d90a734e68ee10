"""How fast a candidate is on this machine, in turns with fp32, in every backend that takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmedge.bundle.figures import Figure
from mmedge.bundle.manifest import Layout
from mmedge.bundle.search import Speed
from mmedge.converters.quality import cosines
from mmedge.errors import BackendError
from mmedge.runtimes.race import RaceResult, race
from mmedge.runtimes.session import BACKENDS, Session, SessionOptions, backend, open_session
from mmedge.specs import Array

__all__ = ["Runner", "SpeedTest", "installed_backends"]

_ROUNDS = 40
_SECONDS = 6.0


@dataclass(frozen=True)
class Runner:
    """One graph that can be timed.

    Attributes:
        models: ONNX file by layout.
        golden: Its answer to the golden batch, from ONNX Runtime.
        cosine_min: How far another backend's answer may lie from it.
    """

    models: Mapping[Layout, Path]
    golden: Array
    cosine_min: float


class SpeedTest:
    """Times candidates of one role against its fp32 on one input."""

    def __init__(self, fp32: Runner, name: str, feed: Array, golden: Array) -> None:
        """Take what all candidates are compared with.

        Args:
            fp32: The role in fp32.
            name: Of the graph's input.
            feed: One sample, as the graph takes it.
            golden: The golden batch, which a backend has to answer as ONNX Runtime does.
        """
        self._fp32 = fp32
        self._name = name
        self._feed = {name: feed}
        self._golden = {name: golden}
        self._fastest_fp32: str | None = None

    def fp32(self) -> Speed:
        """Time fp32 in every backend; the fastest is what candidates are compared with."""
        results = self._race({"fp32": self._fp32})
        key = min(results, key=lambda at: results[at].latency_p50_ms)
        self._fastest_fp32 = key[1]
        return _speed(key[1], results[key], results[key])

    def candidate(self, runner: Runner) -> Speed | None:
        """Time a candidate in turns with the fastest fp32; None where no backend agrees."""
        if self._fastest_fp32 is None:
            self.fp32()
        results = self._race({"fp32": self._fp32, "candidate": runner}, self._fastest_fp32)
        reference = results["fp32", self._fastest_fp32 or ""]
        ours = {key: result for key, result in results.items() if key[0] == "candidate"}
        if not ours:
            return None
        key = min(ours, key=lambda at: ours[at].latency_p50_ms)
        return _speed(key[1], ours[key], reference)

    def _race(
        self, runners: Mapping[str, Runner], fp32_backend: str | None = None
    ) -> dict[tuple[str, str], RaceResult]:
        with ExitStack() as stack:
            sessions: dict[str, Session] = {}
            for name, runner in runners.items():
                for backend_name in installed_backends():
                    if name == "fp32" and fp32_backend not in {None, backend_name}:
                        continue
                    session = self._open(runner, backend_name)
                    if session is not None:
                        stack.callback(session.close)
                        sessions[f"{name} {backend_name}"] = session
            calls = {key: self._call(session) for key, session in sessions.items()}
            raced = race(calls, rounds=_ROUNDS, seconds=_SECONDS)
        return {(key.split(" ")[0], key.split(" ")[1]): result for key, result in raced.items()}

    def _call(self, session: Session) -> Callable[[], object]:
        return lambda: session.run(self._feed)

    def _open(self, runner: Runner, backend_name: str) -> Session | None:
        """Open a graph in a backend, None where it does not take it or answers otherwise."""
        options = SessionOptions()
        layouts = backend(backend_name).layouts(options.device)
        model = next((runner.models[key] for key in layouts if key in runner.models), None)  # type: ignore[index]
        if model is None:
            return None
        try:
            session = open_session(model, backend_name=backend_name, options=options)
        except BackendError:
            return None  # an operator that it does not have; ONNX Runtime ran it already
        try:
            (answer,) = session.run(self._golden).values()
        except BackendError:
            session.close()
            return None
        if float(cosines(runner.golden, answer).min()) < runner.cosine_min:
            session.close()
            return None
        return session


def installed_backends() -> tuple[str, ...]:
    """Return the backends whose engine is installed here."""
    return tuple(name for name in BACKENDS if backend(name).engine_version() is not None)


def _speed(backend_name: str, result: RaceResult, reference: RaceResult) -> Speed:
    ours, theirs = np.asarray(result.latencies_ms), np.asarray(reference.latencies_ms)
    ratios = np.maximum(ours, 1e-6) / np.maximum(theirs, 1e-6)
    drawn = np.random.default_rng(0).integers(0, len(ratios), (1000, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn], axis=1), (0.025, 0.975))
    middle = float(np.median(ratios))
    return Speed(
        backend=backend_name,
        latency_ms=max(result.latency_p50_ms, 1e-6),
        ratio=Figure(value=middle, low=min(float(low), middle), high=max(float(high), middle)),
    )
