"""Progress and cancellation of a build."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from mmedge.runtimes.trt.watching import BuildWatch, in_background, new_monitor

LIBRARY: Any = SimpleNamespace(IProgressMonitor=type("Base", (), {"__init__": lambda _: None}))


def monitored(watch: BuildWatch, *, steps: int = 3) -> list[bool]:
    """Report a phase as the library does; return whether each step may continue."""
    monitor = new_monitor(LIBRARY, watch)
    monitor.phase_start("Timing", "Building", steps)
    continued = [monitor.step_complete("Timing", step) for step in range(steps)]
    monitor.phase_finish("Timing")
    return continued


def test_progress_is_passed_on_and_stays_within_its_total() -> None:
    steps: list[tuple[str, int, int]] = []
    watch = BuildWatch(lambda *step: steps.append(step))
    assert monitored(watch, steps=2) == [True, True]
    assert steps == [("Timing", 0, 2), ("Timing", 1, 2), ("Timing", 2, 2), ("Timing", 2, 2)]
    steps.clear()
    watch.start("Empty", 0)
    watch.step("Empty", 4)
    watch.finish("Unknown")
    assert steps == [("Empty", 0, 1), ("Empty", 1, 1), ("Unknown", 1, 1)]


def test_a_cancelled_build_stops_at_the_next_step() -> None:
    watch = BuildWatch(None)
    assert monitored(watch) == [True] * 3
    watch.cancel()
    assert monitored(watch) == [False] * 3


def test_an_error_of_the_callback_stops_the_build_and_never_reaches_the_library() -> None:
    error = KeyboardInterrupt()

    def fail(_phase: str, done: int, _total: int) -> None:
        if done == 2:
            raise error

    watch = BuildWatch(fail)
    assert monitored(watch) == [True, False, False]
    assert watch.raised is error


def test_work_runs_in_a_thread_and_its_error_keeps_nothing_alive() -> None:
    assert in_background(threading.current_thread, lambda: None) is not threading.main_thread()
    held = [threading.Event()]
    seen = weakref.ref(held[0])

    def work(held: list[threading.Event]) -> None:
        raise ValueError(len(held))

    gc.disable()
    try:
        with pytest.raises(ValueError, match="1"):
            in_background(partial(work, held), lambda: None)
        del held
        assert seen() is None
    finally:
        gc.enable()


def test_an_interrupt_cancels_the_work_and_waits_for_it() -> None:
    cancelled = threading.Event()
    ended: list[bool] = []

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        ended.append(cancelled.wait(20))

    with pytest.raises(KeyboardInterrupt):
        in_background(work, cancelled.set)
    assert ended == [True]
