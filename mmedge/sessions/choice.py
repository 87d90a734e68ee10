"""Which backend runs a variant fastest here: measured once, then remembered.

Only where two or more installed backends can run a variant is there anything to measure. Each of
them opens it and answers the golden inputs; what lies outside the variant's tolerance is out. The
rest run in turns for about half a second on one golden input, with the caller's own options, and
the fastest stays open. ONNX Runtime, which the bundle was made with, keeps its place unless another
is at least 3 % faster.

A backend that would first have to build an engine, for minutes, does not take part until the engine
is there.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

from mmedge.bundle.golden import Golden
from mmedge.bundle.manifest import Variant
from mmedge.bundle.opening import Bundle
from mmedge.errors import BackendError
from mmedge.runtimes.selection.race import race
from mmedge.runtimes.selection.remembered import Choice, recall_choice, remember_choice
from mmedge.runtimes.session import BACKENDS, Session, SessionOptions, backend
from mmedge.runtimes.trt.engines import FLAVOURS
from mmedge.sessions.opening import (
    DEFAULT_BACKEND,
    graph_of,
    open_variant,
    takes,
    with_axes,
)
from mmedge.sessions.verification import replay
from mmedge.specs import Array

__all__ = ["candidates", "engine_backend", "leading_backend", "open_fastest"]

_LOG = logging.getLogger("mmedge.engines")
_TIE = 0.03
_ROUNDS = 30
_SECONDS = 0.5

_one_at_a_time = threading.Lock()  # two measurements at once would measure each other


def leading_backend() -> str:
    """Return the first installed backend, the one whose devices a load may have.

    One that builds engines leads only where there is a GPU for them.
    """
    return next(
        (
            name
            for name in BACKENDS
            if backend(name).engine_version()
            and (name not in FLAVOURS or backend(name).available_devices())
        ),
        DEFAULT_BACKEND,
    )


def engine_backend() -> str:
    """Return the backend that builds engines for GPUs here; where there is none, the usual one."""
    return next((name for name in FLAVOURS if backend(name).engine_version()), FLAVOURS[0])


def candidates(variant: Variant, device: str) -> tuple[str, ...]:
    """Return the installed backends that have a layout of a variant for a device, best known first.

    No engine is loaded to tell.
    """
    return tuple(
        name
        for name in BACKENDS
        if takes(variant, name, device) and backend(name).engine_version() is not None
    )


def open_fastest(
    bundle: Bundle, role: str, variant: Variant, options: SessionOptions
) -> tuple[Session, Choice]:
    """Open a variant in the backend that runs it fastest here.

    Args:
        bundle: An opened bundle.
        role: The variant's role.
        variant: What to run.
        options: How to run it, the device settled.

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
        name = names[0] if names else leading_backend()  # opening it says what is missing
        try:
            session = open_variant(bundle, variant, backend_name=name, options=options)
        except BackendError as error:
            if not unprepared:
                raise
            raise type(error)(f"{error} Or {_without_engine(unprepared)}") from error
        return session, Choice(name, "the only installed backend that can run it")
    hashes = [bundle.manifest.files[path].sha256 for path in variant.files]
    choice = recall_choice(hashes, options)
    if choice is None or choice.backend not in names:
        with _one_at_a_time:
            choice = recall_choice(hashes, options)  # another thread may have measured meanwhile
            if choice is None or choice.backend not in names:
                session, choice, sure = _measure(bundle, role, variant, options, names)
                if sure:
                    remember_choice(hashes, options, choice)
                return session, choice
    return open_variant(bundle, variant, backend_name=choice.backend, options=options), choice


def _is_prepared(bundle: Bundle, variant: Variant, name: str, options: SessionOptions) -> bool:
    graph = graph_of(bundle, variant, name, options.device)
    return backend(name).is_prepared(graph, with_axes(bundle, variant, options))


def _without_engine(names: tuple[str, ...]) -> str:
    return (
        f"{' and '.join(names)} can run it once its engine is built: `mmedge build` does so, and "
        f"so does load(..., backend='{names[0]}')."
    )


def _measure(
    bundle: Bundle, role: str, variant: Variant, options: SessionOptions, names: tuple[str, ...]
) -> tuple[Session, Choice, bool]:
    """Open, verify and race the candidates.

    Returns:
        The session, the choice, and whether it is worth remembering.
    """
    golden = bundle.golden()
    out: dict[str, str] = {}
    errors: list[BackendError] = []
    with ExitStack() as stack:
        opened: dict[str, Session] = {}
        agreeing: dict[str, Session] = {}
        for name in names:
            try:
                session = open_variant(bundle, variant, backend_name=name, options=options)
                stack.callback(session.close)
                verified = replay(session, golden, role, variant)
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
            choice = _decide(agreeing, _single(bundle, golden, role), out)
        else:
            name = next(iter(opened))
            choice = Choice(name, f"no backend agrees with the golden vectors: {_told(out)}")
            warnings.warn(
                f"{bundle.path}: {role}/{variant.name}: {choice.reason}. It runs in {name}; do not "
                "rely on its answers: run `mmedge verify`.",
                RuntimeWarning,
                stacklevel=4,
            )
        kept = opened[choice.backend]
        for session in opened.values():
            if session is not kept:
                session.close()
        stack.pop_all()
    return kept, choice, bool(agreeing)


def _decide(
    sessions: Mapping[str, Session], feed: Mapping[str, Array], out: Mapping[str, str]
) -> Choice:
    """Race what agrees with the golden vectors, the first being the one to beat."""
    others = f"; out: {_told(out)}" if out else ""
    first, *rest = sessions
    if not rest:
        return Choice(first, f"the only backend left{others}")
    results = race(
        {name: partial(session.run, feed) for name, session in sessions.items()},
        rounds=_ROUNDS,
        seconds=_SECONDS,
    )
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
    return Choice(best, reason + others, latencies_ms)


def _single(bundle: Bundle, golden: Golden, role: str) -> dict[str, Array]:
    """Return the first golden input; all of them where the batch is fixed."""
    return {
        entry.name: golden.inputs[role][entry.name][:1]
        if entry.shape and isinstance(entry.shape[0], str)
        else golden.inputs[role][entry.name]
        for entry in bundle.role(role).inputs
    }


def _told(out: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in out.items())
