"""Telling how far a build is, and ending it."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from mmedge.runtimes.trt.watching import BuildWatch, in_background, new_monitor

Told = list[tuple[str, int, int]]
LIBRARY: Any = SimpleNamespace(IProgressMonitor=type("Base", (), {"__init__": lambda _: None}))


def monitored(watch: BuildWatch, *, steps: int = 3) -> list[bool]:
    """Go through a phase as the library does; return what it was told at each step."""
    monitor = new_monitor(LIBRARY, watch)
    monitor.phase_start("Timing", "Building", steps)
    answers = [monitor.step_complete("Timing", step) for step in range(steps)]
    monitor.phase_finish("Timing")
    return answers


def test_phases_and_steps_are_passed_on() -> None:
    told: Told = []
    assert monitored(BuildWatch(lambda *step: told.append(step)), steps=2) == [True, True]
    assert told == [("Timing", 0, 2), ("Timing", 1, 2), ("Timing", 2, 2), ("Timing", 2, 2)]


def test_a_phase_of_no_steps_or_more_than_it_said_stays_within_its_total() -> None:
    told: Told = []
    watch = BuildWatch(lambda *step: told.append(step))
    watch.start("Empty", 0)
    watch.step("Empty", 4)
    watch.finish("Unknown")
    assert told == [("Empty", 0, 1), ("Empty", 1, 1), ("Unknown", 1, 1)]


def test_nobody_need_listen() -> None:
    assert monitored(BuildWatch(None)) == [True] * 3


def test_cancelling_stops_at_the_next_step() -> None:
    watch = BuildWatch(None)
    assert watch.step("Timing", 0)
    watch.cancel()
    assert not watch.step("Timing", 1)


def test_what_the_listener_raises_stops_the_build_and_never_reaches_the_library() -> None:
    error = KeyboardInterrupt()

    def listen(_phase: str, done: int, _total: int) -> None:
        if done == 2:
            raise error

    watch = BuildWatch(listen)
    assert monitored(watch) == [True, False, False]
    assert watch.raised is error


def test_work_is_done_in_a_thread_and_its_result_returned() -> None:
    assert in_background(threading.current_thread, lambda: None) is not threading.main_thread()


def test_what_work_raises_is_raised_and_keeps_nothing_alive() -> None:
    class Kept:
        pass

    kept = Kept()
    seen = weakref.ref(kept)

    def work(held: list[Kept]) -> None:
        raise ValueError(len(held))

    gc.disable()
    try:
        with pytest.raises(ValueError, match="1"):
            in_background(partial(work, [kept]), lambda: None)
        del kept
        assert seen() is None
    finally:
        gc.enable()


def test_an_interrupt_is_heard_at_once_and_the_work_is_waited_for() -> None:
    told_to_stop = threading.Event()
    ended: list[bool] = []

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        ended.append(told_to_stop.wait(20))
        time.sleep(0.05)  # a library takes a moment to stop
        ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        in_background(work, told_to_stop.set)
    assert ended == [True, True]
