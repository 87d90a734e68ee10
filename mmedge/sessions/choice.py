"""Backend choice: the fastest one for a variant on this machine, measured once and cached.

Only where two or more installed backends can run a variant is there anything to measure. Each of
them opens it and runs the golden inputs; outputs outside the variant's tolerance exclude a backend.
The rest run interleaved for about half a second on one golden input, with the caller's options, and
the fastest stays open. ONNX Runtime, which the bundle was made with, keeps its place unless another
is at least 3 % faster. The measurement runs in a process of its own, with a time limit for each
backend; one measurement at a time on this machine, and the others take its result. What a busy
machine leaves in doubt is used and not remembered.

A backend that would first have to build an engine, for minutes, does not take part until the engine
is there. Measuring takes several times the CPU time of a load and the memory of all candidates: a
small device may forbid it, and takes what was cached, else the first candidate.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mmedge.bundle.manifest import Variant
from mmedge.bundle.opening import Bundle, open_bundle
from mmedge.errors import BackendError, StorageError
from mmedge.files import storage_errors
from mmedge.files.cache_folder import cache_folder
from mmedge.files.locks import key_lock
from mmedge.runtimes.backends import BACKENDS, DEFAULT_BACKEND, backend, engine_backends
from mmedge.runtimes.selection.interleaved import InterleavedTiming, time_interleaved
from mmedge.runtimes.selection.limits import time_limit
from mmedge.runtimes.selection.remembered import Choice, recall_choice, remember_choice
from mmedge.runtimes.selection.worker import (
    Report,
    options_from_json,
    options_to_json,
    run_apart,
    serve,
)
from mmedge.runtimes.session import Session, SessionOptions
from mmedge.sessions.opening import (
    graph_of,
    open_variant,
    takes,
    with_axes,
)
from mmedge.sessions.verification import open_in_time, replay
from mmedge.specs import Array, first_sample

__all__ = ["candidates", "engine_backend", "leading_backend", "open_fastest"]

_LOG = logging.getLogger("mmedge.engines")
_TIE = 0.03
_ROUNDS = 30
_SECONDS = 0.5

_BUSY = 1.5  # runnable tasks per processor, over the last minute
_SLACK = 1.25  # possible distortion of a ratio on a busy machine

_one_thread = threading.Lock()


def leading_backend() -> str:
    """Return the first installed backend, which defines the available devices.

    One that builds engines leads only where there is a GPU for them.
    """
    return next(
        (
            name
            for name in BACKENDS
            if backend(name).engine_version()
            and (backend(name).builder is None or backend(name).available_devices())
        ),
        DEFAULT_BACKEND,
    )


def engine_backend() -> str:
    """Return the first installed engine backend, else the first one."""
    names = (*engine_backends(), DEFAULT_BACKEND)
    return next((name for name in names[:-1] if backend(name).engine_version()), names[0])


def candidates(variant: Variant, device: str) -> tuple[str, ...]:
    """Return the installed backends with a layout of a variant for a device, cached best first.

    Loads no engine.
    """
    return tuple(
        name
        for name in BACKENDS
        if takes(variant, name, device) and backend(name).engine_version() is not None
    )


def open_fastest(
    bundle: Bundle, role: str, variant: Variant, options: SessionOptions, *, measure: bool = True
) -> tuple[Session, Choice]:
    """Open a variant in its fastest backend.

    Args:
        bundle: An opened bundle.
        role: The variant's role.
        variant: What to run.
        options: How to run it, the device settled.
        measure: Whether to measure where no choice is cached; otherwise the first candidate that
            is installed runs, and nothing is cached.

    Returns:
        The session, and which backend was taken for what reason.

    Raises:
        BackendError: If no backend can run it; the first one's reason.
        InputError: If no installed backend takes a layout of it.
        IntegrityError: If it has to be measured and the golden vectors are damaged.
    """
    known = candidates(variant, options.device)
    names = tuple(name for name in known if _is_prepared(bundle, variant, name, options))
    unprepared = tuple(
        name for name in known if name not in names and backend(name).available_devices()
    )
    if unprepared:
        _LOG.info("%s/%s: %s", role, variant.name, _without_engine(unprepared))
    if len(names) < 2:
        name = names[0] if names else leading_backend()  # opening it raises the reason
        try:
            session = open_in_time(bundle, role, variant, name, options)
        except BackendError as error:
            if not unprepared:
                raise
            raise type(error)(f"{error} Or {_without_engine(unprepared)}") from error
        return session, Choice(name, "the only installed backend that can run it")
    hashes = [bundle.manifest.files[path].sha256 for path in variant.files]
    choice = recall_choice(hashes, options)
    unknown = choice is None or choice.backend not in names
    if unknown and not measure:
        session = open_in_time(bundle, role, variant, names[0], options)
        return session, Choice(names[0], "the first installed backend; measuring is forbidden")
    if choice is None or choice.backend not in names:
        with _one_at_a_time():
            choice = recall_choice(hashes, options)  # another process may have measured meanwhile
            if choice is None or choice.backend not in names:
                measured, choice, sure = _measured(bundle, role, variant, options, names)
                if sure:
                    remember_choice(hashes, options, choice)
                if measured is not None:
                    return measured, choice
    return open_variant(bundle, variant, backend_name=choice.backend, options=options), choice


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Let one thread of one process measure at a time, since measurements disturb each other."""
    lock = cache_folder() / "backends" / "measuring.lock"
    with ExitStack() as stack:
        try:
            with storage_errors(lock):
                lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(key_lock(lock, _LOG.info, doing="is measuring backends"))
        except StorageError:  # caching fails too, with a warning
            stack.enter_context(_one_thread)
        yield


def _measured(
    bundle: Bundle, role: str, variant: Variant, options: SessionOptions, names: Sequence[str]
) -> tuple[Session | None, Choice, bool]:
    """Measure in a worker, excluding backends that time out or crash.

    Returns:
        As _measure; no session where a worker has measured.
    """
    limit_s = time_limit()
    if limit_s is None:
        return _measure(bundle, role, variant, options, names, {})
    out: dict[str, str] = {}
    result: dict[str, Any] = {}
    begun = [names[0]]

    def report(message: dict[str, Any]) -> None:
        if "begun" in message:
            begun.append(message["begun"])
        else:
            result.update(message)

    def label() -> str:
        return f"{bundle.path}: measuring {role}/{variant.name} in {begun[-1]}"

    request = {
        "bundle": str(bundle.path.absolute()),
        "role": role,
        "variant": variant.name,
        "options": options_to_json(options),
        "out": out,
    }
    while True:
        request["names"] = left = [name for name in names if name not in out]
        try:
            run_apart(Path(__file__), request, report, label=label, limit_s=limit_s)
        except BackendError as error:
            out[begun[-1]] = str(error)
            if len(left) == 1:
                raise
            continue
        return None, Choice(**result["choice"]), result["sure"]


def _work(request: dict[str, Any], report: Report) -> None:
    bundle = open_bundle(request["bundle"])
    session, choice, sure = _measure(
        bundle,
        request["role"],
        bundle.variant(request["role"], request["variant"]),
        options_from_json(request["options"]),
        request["names"],
        request["out"],
        begun=lambda name: report({"begun": name}),
    )
    session.close()
    report({"choice": asdict(choice), "sure": sure})


def _is_prepared(bundle: Bundle, variant: Variant, name: str, options: SessionOptions) -> bool:
    graph = graph_of(bundle, variant, name, options.device)
    return backend(name).is_prepared(graph, with_axes(bundle, variant, options))


def _without_engine(names: tuple[str, ...]) -> str:
    return (
        f"{' and '.join(names)} can run it once its engine is built: `mmedge build` does so, and "
        f"so does load(..., backend='{names[0]}')."
    )


def _measure(
    bundle: Bundle,
    role: str,
    variant: Variant,
    options: SessionOptions,
    names: Sequence[str],
    out: dict[str, str],
    begun: Callable[[str], object] = lambda _: None,
) -> tuple[Session, Choice, bool]:
    """Open, verify and benchmark the candidates.

    Args:
        bundle: An opened bundle.
        role: The variant's role.
        variant: What to run.
        options: How to run it.
        names: The candidates.
        out: Those that are out already, with the reason; more are added.
        begun: Called with the name of each before it is opened.

    Returns:
        The session, the choice, and whether it is worth remembering.
    """
    golden = bundle.golden()
    errors: list[BackendError] = []
    with ExitStack() as stack:
        opened: dict[str, Session] = {}
        agreeing: dict[str, Session] = {}
        for name in names:
            begun(name)
            try:
                session = open_variant(bundle, variant, backend_name=name, options=options)
                stack.callback(session.close)
                verified = replay(session, golden, role, variant, bundle.state_of(role))
            except BackendError as error:
                errors.append(error)
                out[name] = str(error)
                continue
            opened[name] = session
            if verified.passed:
                agreeing[name] = session
            else:
                out[name] = (
                    f"out of tolerance on the golden vectors, cosine {verified.cosine_min:.6f} and "
                    f"error {verified.max_abs_error:.1e}"
                )
        if not opened:
            raise errors[0]
        if agreeing:
            inputs = [entry.spec() for entry in bundle.role(role).inputs]
            choice, sure = _decide(agreeing, first_sample(inputs, golden.inputs[role]), out)
        else:
            sure = False
            name = next(iter(opened))
            choice = Choice(name, f"no backend agrees with the golden vectors: {_reasons(out)}")
            warnings.warn(
                f"{bundle.path}: {role}/{variant.name}: {choice.reason}. It runs in {name}; do not "
                "rely on its outputs: run `mmedge verify`.",
                RuntimeWarning,
                stacklevel=4,
            )
        kept = opened[choice.backend]
        for session in opened.values():
            if session is not kept:
                session.close()
        stack.pop_all()
    return kept, choice, sure


def _decide(
    sessions: Mapping[str, Session], feed: Mapping[str, Array], out: Mapping[str, str]
) -> tuple[Choice, bool]:
    """Benchmark the backends that match the golden vectors, interleaved; the first is the baseline.

    Returns:
        The choice, and whether it is worth remembering.
    """
    others = f"; out: {_reasons(out)}" if out else ""
    first, *rest = sessions
    if not rest:
        return Choice(first, f"the only backend left{others}"), True
    busy = os.getloadavg()[0] > _BUSY * (os.cpu_count() or 1)
    slack = _SLACK if busy else 1.0
    for longer in (1, 4):
        results = time_interleaved(
            {name: partial(session.run, feed) for name, session in sessions.items()},
            rounds=_ROUNDS * longer,
            seconds=_SECONDS * longer,
        )
        doubts = [name for name in rest if _is_in_doubt(results[name], slack)]
        if not doubts:
            break
    latencies_ms = {name: result.latency_p50_ms for name, result in results.items()}
    best = min(results, key=lambda name: results[name].ratio)
    gain = 1 - results[best].ratio
    if best != first and gain < _TIE:
        reason = f"measured: {best} is no more than {_TIE:.0%} faster than {first}"
        best = first
    elif best == first:
        reason = "measured: the fastest"
    else:
        reason = f"measured: {gain:.0%} less time than {first}"
    if doubts:
        one = results[doubts[0]]
        others = (
            f"; not remembered, since {doubts[0]} takes {one.ratio_low:.2f} to "
            f"{one.ratio_high:.2f} of {first}'s time{' on a busy machine' * busy}{others}"
        )
        _LOG.info("%s%s. Name a backend to measure no more.", reason, others)
    return Choice(best, reason + others, latencies_ms), not doubts


def _is_in_doubt(result: InterleavedTiming, slack: float) -> bool:
    """Return whether the interval of a ratio, widened by a factor, contains 1."""
    low, high = result.ratio_low / slack, result.ratio_high * slack
    return low < 1 - _TIE < high and high - low > _TIE


def _reasons(out: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in out.items())


if __name__ == "__main__":
    serve(_work)
