"""Calls made ahead: order, bounds, errors in their place, threads that end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from mmedge import ahead
from mmedge.ahead import run_ahead, worker_threads
from mmedge.errors import ImageError


def prepare_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mmedge-prepare")]


def test_results_keep_their_order_whichever_call_ends_first() -> None:
    later = threading.Event()

    def first() -> int:
        assert later.wait(60)
        return 0

    def second() -> int:
        later.set()
        return 1

    calls: list[Callable[[], int]] = [first, second, lambda: 2]
    assert list(run_ahead(calls, threads=2, ahead=2)) == [0, 1, 2]
    assert prepare_threads() == []


@pytest.mark.parametrize(("threads", "bound"), [(0, 1), (1, 3), (3, 3), (4, 4)])
def test_calls_are_read_no_further_than_ahead(threads: int, bound: int) -> None:
    read = 0

    def calls() -> Iterator[Callable[[], int]]:
        nonlocal read
        for number in range(20):
            read += 1
            yield partial(int, number)

    for used, result in enumerate(run_ahead(calls(), threads=threads, ahead=3)):
        assert result == used
        assert read - used <= bound
    assert read == 20


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_is_raised_in_its_place(threads: int) -> None:
    def fail() -> int:
        raise ImageError("damaged")

    results = run_ahead([lambda: 0, fail, lambda: 2], threads=threads, ahead=3)
    assert next(results) == 0
    with pytest.raises(ImageError, match="damaged"):
        next(results)
    assert prepare_threads() == []


def test_closing_early_drops_the_queue_and_ends_the_threads() -> None:
    made = []

    def call(number: int) -> int:
        made.append(number)
        return number

    calls = (partial(call, number) for number in range(100))
    results = run_ahead(calls, threads=2, ahead=4)
    assert next(results) == 0
    results.close()
    assert prepare_threads() == []
    assert len(made) <= 4


def test_without_threads_each_call_waits_until_it_is_needed() -> None:
    made: list[int] = []
    results = run_ahead([partial(made.append, n) for n in range(3)], threads=0, ahead=8)
    next(results)
    assert made == [0]


@pytest.mark.parametrize(
    ("cpus", "items", "threads"),
    [
        (1, [0] * 9, 0),
        (4, [0], 0),
        (4, [], 0),
        (4, [0] * 3, 3),
        (4, iter([]), 4),
        (128, [0] * 99, 16),
    ],
)
def test_threads_by_cpus_and_items(
    cpus: int, items: list[int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "allowed_processors", lambda: tuple(range(cpus)))
    assert worker_threads(items) == threads
