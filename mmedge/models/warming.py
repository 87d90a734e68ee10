"""Answering at once while a better engine is made in the background.

Each role begins in a backend that opens in a second; meanwhile the engine is built in a process of
its own, opened, and shown the golden inputs. Where it answers within the variant's tolerance it
takes over between two calls; where not, it is refused and the first one goes on. One role after
another: two builds at once would take the memory of both.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from mmedge.errors import MmedgeError
from mmedge.models.verification import RoleVerification
from mmedge.runtimes.session import BuildProgress, Session
from mmedge.runtimes.swapping import SwappingSession

__all__ = ["WarmingRole", "WarmingStage", "WarmingState", "WarmingUp"]

WarmingStage: TypeAlias = Literal[
    "waiting", "building", "checking", "ready", "refused", "failed", "stopped"
]
"""Where a role is: its turn has not come; its engine is being built or compared with the golden
vectors; it answers with the engine; the engine answers wrongly; there is no engine; the model was
closed before."""

_log = logging.getLogger("mmedge.engines")


@dataclass(frozen=True, slots=True)
class WarmingState:
    """How far the engine of one role is.

    Attributes:
        stage: See WarmingStage.
        told: In words: the phase of the build, or why the engine does not answer.
        done: Steps of the phase that are done.
        total: Steps of the phase; 0 where that is not known.
    """

    stage: WarmingStage
    told: str = ""
    done: int = 0
    total: int = 0

    @property
    def settled(self) -> bool:
        """Whether nothing more will come of it."""
        return self.stage in {"ready", "refused", "failed", "stopped"}


@dataclass(frozen=True)
class WarmingRole:
    """One role, and how to come by its engine.

    Attributes:
        role: Its name.
        session: What answers meanwhile, and is swapped.
        prepare: Makes the engine; takes a callback for progress, and an event that ends it.
        open: Opens the engine, once it is made.
        check: Compares a session's answers with the golden ones.
    """

    role: str
    session: SwappingSession
    prepare: Callable[[BuildProgress, threading.Event], None]
    open: Callable[[], Session]
    check: Callable[[Session], RoleVerification]


class WarmingUp:
    """Makes the engines of some roles in the background. Starts at once.

    Args:
        roles: In the order in which they are made.
        report: Told of every change, from the background thread: a role's name and state. What it
            raises is logged and goes no further.
    """

    def __init__(
        self,
        roles: Sequence[WarmingRole],
        report: Callable[[str, WarmingState], None] | None = None,
    ) -> None:
        self._roles = tuple(roles)
        self._report = report
        self._states = {each.role: WarmingState("waiting") for each in roles}
        self._stop = threading.Event()
        # A process that ends does not wait for an engine.
        self._thread = threading.Thread(target=self._run, name="mmedge-warming", daemon=True)
        self._thread.start()

    @property
    def states(self) -> Mapping[str, WarmingState]:
        """How far each role is, by its name, as of now."""
        return dict(self._states)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until every role is settled.

        Args:
            timeout_s: Seconds to wait at most; None waits as long as it takes.

        Returns:
            Whether every role answers with its engine; False also where the time was up.
        """
        self._thread.join(timeout_s)
        return all(state.stage == "ready" for state in self._states.values())

    def stop(self) -> None:
        """End what is being built, and wait for its end; roles that are ready stay so."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        for each in self._roles:
            if self._stop.is_set():
                self._tell(each.role, WarmingState("stopped", "the model was closed"))
                continue
            try:
                state = self._warm(each)
            except MmedgeError as error:
                stopped = self._stop.is_set()
                state = (
                    WarmingState("stopped", "the model was closed")
                    if stopped
                    else WarmingState("failed", str(error))
                )
            except Exception as error:  # noqa: BLE001, a thread has nobody to raise to
                _log.exception("%s: making its engine failed", each.role)
                state = WarmingState("failed", f"{type(error).__name__}: {error}")
            self._tell(each.role, state)

    def _warm(self, each: WarmingRole) -> WarmingState:
        """Make, open, check and swap in one engine; return how it ended."""
        building = WarmingState("building")

        def progress(phase: str, done: int, total: int) -> None:
            self._tell(each.role, replace(building, told=phase, done=done, total=total))

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
            return WarmingState("stopped", "the model was closed")
        each.session.swap(engine)
        placement = engine.placement
        return WarmingState("ready", f"{placement.engine} on {placement.device}")

    def _tell(self, role: str, state: WarmingState) -> None:
        previous = self._states[role]
        self._states[role] = state
        if state.stage != previous.stage:
            level = logging.WARNING if state.stage in {"refused", "failed"} else logging.INFO
            _log.log(level, "%s: %s%s", role, state.stage, f": {state.told}" if state.told else "")
        if self._report is not None:
            try:
                self._report(role, state)
            except Exception:  # noqa: BLE001, a caller's mistake must not cost the engine
                _log.exception("%s: the caller's report of warming failed", role)
