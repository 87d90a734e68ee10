"""Background build: serving at once while an engine is built, then a hot swap.

Each role begins in a backend that opens in a second; meanwhile the engine is built in a process of
its own, opened, and run on the golden inputs. If its outputs are within the variant's tolerance it
takes over between two calls; where not, it is refused and the first one goes on. One role after
another: two builds at once would take the memory of both.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from mmedge.bundle.golden import Golden
from mmedge.bundle.manifest import Variant
from mmedge.bundle.opening import Bundle
from mmedge.errors import MmedgeError
from mmedge.runtimes.backends import backend
from mmedge.runtimes.selection.hot_swap import HotSwapSession
from mmedge.runtimes.selection.preparing import prepare_apart
from mmedge.runtimes.session import BuildProgress, Session, SessionOptions
from mmedge.sessions.opening import graph_of, open_variant, with_axes
from mmedge.sessions.verification import RoleVerification, open_in_time, replay
from mmedge.specs import State

__all__ = [
    "WarmingReport",
    "WarmingRole",
    "WarmingStage",
    "WarmingState",
    "WarmingUp",
    "open_meanwhile",
    "warm_up",
]

WarmingStage: TypeAlias = Literal[
    "waiting", "building", "checking", "ready", "refused", "failed", "stopped"
]
"""Where a role is: its turn has not come; its engine is being built or compared with the golden
vectors; the engine is in use; its outputs are out of tolerance; there is no engine; the model was
closed before."""

_log = logging.getLogger("mmedge.engines")


@dataclass(frozen=True, slots=True)
class WarmingState:
    """Progress of the background build of one role.

    Attributes:
        stage: See WarmingStage.
        detail: The phase of the build, or why the engine is not in use.
        done: Steps of the phase that are done.
        total: Steps of the phase; 0 where that is not known.
    """

    stage: WarmingStage
    detail: str = ""
    done: int = 0
    total: int = 0

    @property
    def settled(self) -> bool:
        """Whether the build has ended."""
        return self.stage in {"ready", "refused", "failed", "stopped"}


_STOPPED = WarmingState("stopped", "the model was closed")

WarmingReport: TypeAlias = Callable[[str, WarmingState], None]
"""Called on every change with a role's name and its progress."""


@dataclass(frozen=True)
class WarmingRole:
    """One role, and how to build its engine.

    Attributes:
        role: Its name.
        session: The session that serves meanwhile, and is swapped.
        prepare: Makes the engine; takes a callback for progress, and an event that ends it.
        open: Opens the engine, once it is made.
        check: Compares a session's outputs with the golden ones.
    """

    role: str
    session: HotSwapSession
    prepare: Callable[[BuildProgress, threading.Event], None]
    open: Callable[[], Session]
    check: Callable[[Session], RoleVerification]


class WarmingUp:
    """Background build of the engines of some roles, started at once.

    Args:
        roles: In the order in which they are made.
        report: Told of every change, from the background thread: a role's name and state. What it
            raises is logged and goes no further.
    """

    def __init__(
        self,
        roles: Sequence[WarmingRole],
        report: WarmingReport | None = None,
    ) -> None:
        self._roles = tuple(roles)
        self._report = report
        self._states = {each.role: WarmingState("waiting") for each in roles}
        self._stop = threading.Event()
        # A process that exits does not wait for an engine.
        self._thread = threading.Thread(target=self._run, name="mmedge-warming", daemon=True)
        self._thread.start()

    @property
    def states(self) -> Mapping[str, WarmingState]:
        """Current progress by role name."""
        return dict(self._states)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until every role is settled.

        Args:
            timeout_s: Seconds to wait at most; None waits as long as it takes.

        Returns:
            Whether every role runs its engine; False also after the timeout.
        """
        self._thread.join(timeout_s)
        return all(state.stage == "ready" for state in self._states.values())

    def stop(self) -> None:
        """Stop pending builds and wait for them; ready roles stay ready."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        for each in self._roles:
            if self._stop.is_set():
                self._tell(each.role, _STOPPED)
                continue
            try:
                state = self._warm(each)
            except MmedgeError as error:
                state = _STOPPED if self._stop.is_set() else WarmingState("failed", str(error))
            except Exception as error:  # noqa: BLE001, a thread has no caller to raise to
                _log.exception("%s: background build failed", each.role)
                state = WarmingState("failed", f"{type(error).__name__}: {error}")
            self._tell(each.role, state)

    def _warm(self, each: WarmingRole) -> WarmingState:
        """Build, open, check and swap in one engine; return the final state."""
        building = WarmingState("building")

        def progress(phase: str, done: int, total: int) -> None:
            self._tell(each.role, replace(building, detail=phase, done=done, total=total))

        self._tell(each.role, building)
        each.prepare(progress, self._stop)
        self._tell(each.role, WarmingState("checking"))
        engine = each.open()
        try:
            verified = each.check(engine)
        except BaseException:
            engine.close()
            raise
        if not verified.passed:
            engine.close()
            return WarmingState(
                "refused",
                f"out of tolerance on the golden vectors: cosine {verified.cosine_min:.6f}, "
                f"expected at least {verified.tolerance.cosine_min:g}; error "
                f"{verified.max_abs_error:.1e}, expected at most "
                f"{verified.tolerance.max_abs_error:g}",
            )
        if self._stop.is_set():
            engine.close()
            return _STOPPED
        each.session.swap(engine)
        placement = engine.placement
        return WarmingState("ready", f"{placement.engine} on {placement.device}")

    def _tell(self, role: str, state: WarmingState) -> None:
        previous = self._states[role]
        self._states[role] = state
        if state.stage != previous.stage:
            level = logging.WARNING if state.stage in {"refused", "failed"} else logging.INFO
            _log.log(
                level, "%s: %s%s", role, state.stage, f": {state.detail}" if state.detail else ""
            )
        if self._report is not None:
            try:
                self._report(role, state)
            except Exception:  # noqa: BLE001, a caller's mistake must not cost the engine
                _log.exception("%s: the progress callback failed", role)


def open_meanwhile(
    bundle: Bundle,
    variants: Mapping[str, Variant],
    backend_name: str,
    options: SessionOptions,
) -> dict[str, HotSwapSession]:
    """Open the session that serves until the engines are ready.

    Args:
        bundle: An opened bundle.
        variants: What to run, by role name; each engine is made of the same variant.
        backend_name: Serving backend. It runs on the device of `options` where it has that,
            and else on the CPU: this is what the caller asks for by naming it.
        options: How the engines will be run.

    Raises:
        BackendError, InputError: If one cannot be opened.
    """
    known = backend(backend_name).available_devices()
    kind = options.device.split(":")[0]
    first = replace(options, device=options.device if kind in known else "cpu")
    with ExitStack() as stack:
        sessions = {}
        for role, variant in variants.items():
            session = open_in_time(bundle, role, variant, backend_name, first)
            sessions[role] = HotSwapSession(session)
            stack.callback(sessions[role].close)
        stack.pop_all()
    return sessions


def warm_up(
    bundle: Bundle,
    variants: Mapping[str, Variant],
    sessions: Mapping[str, HotSwapSession],
    backend_name: str,
    options: SessionOptions,
    report: WarmingReport | None = None,
) -> WarmingUp:
    """Start the background build of engines.

    Args:
        bundle: An opened bundle.
        variants: What they run, by role name.
        sessions: The sessions that serve meanwhile, of `open_meanwhile`.
        backend_name: Whose engines.
        options: How they will be run.
        report: Told of every change, from the background thread.

    Raises:
        InputError: If a variant has no graph for the backend.
        IntegrityError: If the golden vectors are damaged.
    """
    golden = bundle.golden()
    roles = []
    for role, session in sessions.items():
        variant = variants[role]
        model = graph_of(bundle, variant, backend_name, options.device)
        settled = with_axes(bundle, variant, options)
        roles.append(
            WarmingRole(
                role=role,
                session=session,
                prepare=partial(_prepare, backend_name, model, settled),
                open=partial(
                    open_variant, bundle, variant, backend_name=backend_name, options=settled
                ),
                check=partial(_check, golden, role, variant, bundle.state_of(role)),
            )
        )
    return WarmingUp(roles, report)


def _prepare(
    backend_name: str,
    model: Path,
    options: SessionOptions,
    progress: BuildProgress,
    stop: threading.Event,
) -> None:
    prepare_apart(backend_name, model, options, progress=progress, stop=stop)


def _check(
    golden: Golden, role: str, variant: Variant, state: State | None, session: Session
) -> RoleVerification:
    return replay(session, golden, role, variant, state)
