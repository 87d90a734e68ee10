"""Progress and cancellation of a build."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

from mmedge.runtimes.session import BuildProgress

__all__ = ["BuildWatch", "in_background", "new_monitor"]

_Made = TypeVar("_Made")


class BuildWatch:
    """Forwards the library's build progress, and stops the build on request.

    Args:
        progress: Called on each phase and step, from the build thread, or None. An exception in it
            ends the build.

    Attributes:
        cancelled: Whether the build was cancelled.
        raised: The exception of `progress`.
    """

    def __init__(self, progress: BuildProgress | None) -> None:
        self._progress = progress
        self._totals: dict[str, int] = {}
        self.cancelled = False
        self.raised: BaseException | None = None

    def cancel(self) -> None:
        """Stop the build at its next step."""
        self.cancelled = True

    def start(self, phase: str, steps: int) -> None:
        """Record the start of a phase and its number of steps."""
        self._totals[phase] = max(steps, 1)
        self._report(phase, 0)

    def step(self, phase: str, step: int) -> bool:
        """Record a step, counted from 0; return whether to continue."""
        self._report(phase, step + 1)
        return not self.cancelled

    def finish(self, phase: str) -> None:
        """Record the end of a phase."""
        self._report(phase, self._totals.get(phase, 1))

    def _report(self, phase: str, done: int) -> None:
        if self._progress is None or self.cancelled:
            return
        total = self._totals.get(phase, 1)
        try:
            self._progress(phase, min(done, total), total)
        # An exception that passes through the library would end the process.
        except BaseException as error:  # noqa: BLE001
            self.raised = error
            self.cancelled = True


def new_monitor(module: ModuleType, watch: BuildWatch) -> Any:  # noqa: ANN401, the library's type
    """Return a progress monitor that reports to a watch; it must outlive the build."""
    base: Any = module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # the binding takes no super()

        def phase_start(self, phase_name: str, _parent_phase: str | None, num_steps: int) -> None:
            watch.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return watch.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            watch.finish(phase_name)

    return Monitor()


def in_background(work: Callable[[], _Made], cancel: Callable[[], None]) -> _Made:
    """Run work in a thread and wait for it, so that Ctrl-C works while a library computes.

    Args:
        work: The work.
        cancel: Stops it; called when the wait is interrupted.

    Returns:
        What `work` returns.

    Raises:
        KeyboardInterrupt: Once the work has stopped. A second one does not wait for it.
        Exceptions of `work`.
    """
    made: list[_Made] = []
    raised: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            made.append(work())
        except BaseException as error:  # noqa: BLE001, raised in the waiting thread
            raised.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=run, name="engine build", daemon=True)
    try:
        thread.start()  # interruptible wait
        ended.wait()
    finally:
        if not ended.is_set():
            cancel()
            while thread.is_alive():
                ended.wait(0.1)
    if raised:
        raise raised.pop()  # a reference would keep all of its frames alive
    return made.pop()
