"""The engine cache under several processes and threads, and under kills at any moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from cached import (
    OTHER_PLAN,
    PLAN,
    build_together,
    build_until_told,
    builds,
    built,
    counted,
    key,
    store_and_die,
    store_for_ever,
)

from mmedge.files import locks as locking
from mmedge.files.locks import is_locked, key_lock, key_lock_if_free
from mmedge.runtimes.engines.record import key_digest
from mmedge.runtimes.engines.spec import BuiltEngine
from mmedge.runtimes.engines.store import EngineCache, LoadedEngine, Miss, PruneRule

# Processes are forked off a server that has imported what they need, not off this one, which has
# threads, and not started anew, which takes a second each.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["mmedge.runtimes.engines.store"])


@contextmanager
def child(
    target: Callable[..., None], *arguments: object
) -> Iterator[tuple[BaseProcess, Connection]]:
    """A process that runs a function of a folder, and what it says; killed in the end."""
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=target, args=(arguments[0], there, *arguments[1:]))
    process.start()
    there.close()
    try:
        yield process, here
    finally:
        process.kill()
        process.join()
        process.close()
        here.close()


@contextmanager
def builder(folder: Path) -> Iterator[BaseProcess]:
    """A process that is building the engine of key() until there is a file `go`."""
    with child(build_until_told, folder) as (process, said):
        assert said.recv() == "building"
        yield process


def ended(process: BaseProcess) -> int | None:
    process.join(60)
    return process.exitcode


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def never() -> BuiltEngine:
    pytest.fail("there is nothing to build")


def test_processes_that_need_the_same_engine_build_it_once(tmp_path: Path) -> None:
    start = time.time() + 2  # by when all of them have come up, more or less
    with ExitStack() as stack:
        children = [stack.enter_context(child(build_together, tmp_path, start)) for _ in range(3)]
        results = [said.recv() for _, said in children]
    assert builds(tmp_path) == 1
    assert len({sha256 for sha256, _ in results}) == 1
    assert sum(built_here for _, built_here in results) == 1


def test_threads_that_need_the_same_engine_build_it_once(
    tmp_path: Path, cache: EngineCache
) -> None:
    results: list[LoadedEngine] = []
    together = threading.Barrier(6)

    def ask() -> None:
        together.wait()
        results.append(cache.get_or_build(key(), counted(tmp_path, 0.2)))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builds(tmp_path) == 1
    assert len(results) == 6
    assert len({engine.plan for engine in results}) == 1
    assert sum(engine.miss is not None for engine in results) == 1


def test_different_engines_are_built_side_by_side(tmp_path: Path, cache: EngineCache) -> None:
    with builder(tmp_path):
        assert cache.get_or_build(key(model="b"), built).plan == PLAN


def test_who_waits_is_told_for_whom_and_takes_what_was_built(
    tmp_path: Path, cache: EngineCache
) -> None:
    told: list[str] = []

    def hear(message: str) -> None:
        told.append(message)
        (tmp_path / "go").touch()

    with builder(tmp_path) as process:
        engine = cache.get_or_build(key(), never, on_wait=hear)
        assert told == [f"process {process.pid} is building this engine: waiting for it"]
        assert ended(process) == 0
    assert (engine.plan, engine.miss) == (OTHER_PLAN, None)


def test_who_waits_for_a_builder_that_is_killed_builds_in_its_place(
    tmp_path: Path, cache: EngineCache
) -> None:
    with builder(tmp_path) as process:
        engine = cache.get_or_build(key(), built, on_wait=lambda _: process.kill())
        assert ended(process) == -signal.SIGKILL
    assert engine.plan == PLAN
    assert engine.miss is not None
    assert cache.load(key()).plan == PLAN
    assert {path.suffix for path in cache.folder.iterdir()} == {".json", ".plan"}


def test_after_a_kill_during_a_build_the_next_one_goes_ahead(
    tmp_path: Path, cache: EngineCache
) -> None:
    with builder(tmp_path) as process:
        (entry,) = cache.entries()
        assert entry.busy
        process.kill()
        assert ended(process) == -signal.SIGKILL
    (entry,) = cache.entries()
    assert not entry.busy
    assert entry.fault == "left behind by an unfinished build"
    assert isinstance(cache.find(key()), Miss)

    def not_told(_: str) -> None:
        pytest.fail("there is nobody to wait for")

    assert cache.get_or_build(key(), built, on_wait=not_told).plan == PLAN


def test_a_waiting_caller_can_be_interrupted(tmp_path: Path, cache: EngineCache) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with builder(tmp_path) as process:
        with pytest.raises(KeyboardInterrupt):
            cache.get_or_build(key(), never, on_wait=interrupt)
        (tmp_path / "go").touch()
        assert ended(process) == 0
    assert cache.load(key()).plan == OTHER_PLAN


# Where a process that stores an engine dies, and whether it has published it by then.
DEATHS = {
    "writing the plan": False,
    "between plan and record": False,
    "writing the record": False,
    "removing the old plan": True,
}


@pytest.mark.parametrize("older", [True, False], ids=["over an older one", "the first"])
@pytest.mark.parametrize("death", DEATHS)
def test_a_kill_while_writing_leaves_the_old_engine_or_the_new(
    tmp_path: Path, cache: EngineCache, death: str, older: bool
) -> None:
    if older:
        cache.store(key(), built())
    with child(store_and_die, tmp_path, death) as (process, _):
        assert ended(process) == -signal.SIGKILL
    published = DEATHS[death]
    if published or older:
        assert cache.load(key()).plan == (OTHER_PLAN if published else PLAN)
    else:
        miss = cache.find(key())
        assert isinstance(miss, Miss)
        assert miss.kind == "absent"
    # Whoever writes next tidies up.
    third = cache.store(key(), built(b"a third plan"))
    assert sorted(cache.folder.iterdir()) == sorted(
        [third.path, cache.folder / f"{key_digest(key())}.json"]
    )


@pytest.mark.parametrize("death", DEATHS)
def test_prune_removes_what_a_kill_left(tmp_path: Path, cache: EngineCache, death: str) -> None:
    with child(store_and_die, tmp_path, death) as (process, _):
        ended(process)
    assert len(cache.prune().removed) == (0 if DEATHS[death] else 1)
    left = {path.suffix for path in cache.folder.iterdir()} - {".lock"}
    assert left == ({".json", ".plan"} if DEATHS[death] else set())


@pytest.mark.parametrize("delay_ms", [0, 1, 2, 3, 5, 8, 13, 21])
def test_a_kill_at_any_moment(tmp_path: Path, cache: EngineCache, delay_ms: int) -> None:
    with child(store_for_ever, tmp_path) as (process, said):
        assert said.recv() == "stored"
        time.sleep(delay_ms / 1000)
        process.kill()
        assert ended(process) == -signal.SIGKILL
    assert cache.load(key()).plan in (PLAN, OTHER_PLAN)


def test_a_reader_always_finds_a_whole_engine(tmp_path: Path, cache: EngineCache) -> None:
    cache.store(key(), built())
    done = threading.Event()
    seen: list[object] = []

    def read() -> None:
        while not done.is_set():
            try:
                seen.append(cache.load(key()).plan)
            except Exception as error:  # noqa: BLE001, PERF203, handed to the test's own thread
                seen.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(15):
        cache.store(key(), built(OTHER_PLAN if number % 2 else PLAN))
    done.set()
    reader.join()
    assert set(seen) <= {PLAN, OTHER_PLAN}
    assert len(seen) > 5


def test_an_engine_that_is_being_built_is_not_pruned(tmp_path: Path, cache: EngineCache) -> None:
    with builder(tmp_path) as process:
        for dry_run in (True, False):
            assert cache.prune(PruneRule(everything=True), dry_run=dry_run).removed == ()
        (tmp_path / "go").touch()
        assert ended(process) == 0
    assert cache.load(key()).plan == OTHER_PLAN


def test_nobody_gets_hold_of_a_lock_file_that_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder may remove it, and another make its own, between its opening and its locking."""
    path = tmp_path / "x.lock"
    try_lock = locking._try_lock
    with ExitStack() as stack:

        def removed_meanwhile(descriptor: int, place: Path) -> bool:
            monkeypatch.setattr(locking, "_try_lock", try_lock)
            place.unlink()
            stack.enter_context(key_lock(place, lambda _: None))
            return try_lock(descriptor, place)

        monkeypatch.setattr(locking, "_try_lock", removed_meanwhile)
        with key_lock_if_free(path) as held:
            assert not held


def test_many_short_holders_are_never_two_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    inside: list[int] = []
    failures: list[str] = []

    def hold() -> None:
        for _ in range(20):
            with key_lock(path, lambda _: None):
                inside.append(1)
                if len(inside) > 1:
                    failures.append("two at once")
                inside.pop()

    threads = [threading.Thread(target=hold) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not path.exists()


def test_a_lock_that_is_held_is_not_waited_for_if_it_need_not_be(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    assert not is_locked(path)
    with key_lock(path, lambda _: None):
        assert is_locked(path)
        assert path.read_text() == str(os.getpid())
        with key_lock_if_free(path) as held:
            assert not held
    with key_lock_if_free(path) as held:
        assert held
    assert not is_locked(path)
