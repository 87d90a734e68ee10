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
    build_until_go,
    builds,
    built,
    counted,
    key,
    store_and_die,
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
    """A process that runs a function of a folder, and its pipe; killed in the end."""
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
    with child(build_until_go, folder) as (process, pipe):
        assert pipe.recv() == "building"
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
        results = [pipe.recv() for _, pipe in children]
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


def test_different_engines_build_in_parallel(tmp_path: Path, cache: EngineCache) -> None:
    with builder(tmp_path):
        assert cache.get_or_build(key(model="b"), built).plan == PLAN


def test_a_waiting_caller_gets_the_engine_and_the_builders_process_id(
    tmp_path: Path, cache: EngineCache
) -> None:
    messages: list[str] = []

    def report(message: str) -> None:
        messages.append(message)
        (tmp_path / "go").touch()

    with builder(tmp_path) as process:
        engine = cache.get_or_build(key(), never, on_wait=report)
        assert messages == [f"process {process.pid} is building this engine: waiting for it"]
        assert ended(process) == 0
    assert (engine.plan, engine.miss) == (OTHER_PLAN, None)


def test_a_waiting_caller_builds_when_the_builder_is_killed(
    tmp_path: Path, cache: EngineCache
) -> None:
    with builder(tmp_path) as process:
        engine = cache.get_or_build(key(), built, on_wait=lambda _: process.kill())
        assert ended(process) == -signal.SIGKILL
    assert engine.plan == PLAN
    assert engine.miss is not None
    assert cache.load(key()).plan == PLAN
    assert {path.suffix for path in cache.folder.iterdir()} == {".json", ".plan"}


def test_a_killed_build_does_not_block_the_next(tmp_path: Path, cache: EngineCache) -> None:
    with builder(tmp_path) as process:
        (entry,) = cache.entries()
        assert entry.busy
        process.kill()
        assert ended(process) == -signal.SIGKILL
    (entry,) = cache.entries()
    assert not entry.busy
    assert entry.fault == "left behind by an unfinished build"
    assert isinstance(cache.find(key()), Miss)

    def fail(_: str) -> None:
        pytest.fail("there is no builder to wait for")

    assert cache.get_or_build(key(), built, on_wait=fail).plan == PLAN


def test_a_waiting_caller_can_be_interrupted(tmp_path: Path, cache: EngineCache) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with builder(tmp_path) as process:
        with pytest.raises(KeyboardInterrupt):
            cache.get_or_build(key(), never, on_wait=interrupt)
        (tmp_path / "go").touch()
        assert ended(process) == 0
    assert cache.load(key()).plan == OTHER_PLAN


# Where a process that stores an engine dies -> whether it has published it.
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
    # The next writer tidies up.
    third = cache.store(key(), built(b"a third plan"))
    assert sorted(cache.folder.iterdir()) == sorted(
        [third.path, cache.folder / f"{key_digest(key())}.json"]
    )


@pytest.mark.parametrize("death", DEATHS)
def test_prune_removes_leftovers_of_a_kill(tmp_path: Path, cache: EngineCache, death: str) -> None:
    with child(store_and_die, tmp_path, death) as (process, _):
        ended(process)
    assert len(cache.prune().removed) == (0 if DEATHS[death] else 1)
    left = {path.suffix for path in cache.folder.iterdir()} - {".lock"}
    assert left == ({".json", ".plan"} if DEATHS[death] else set())


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


def test_a_removed_lock_file_is_not_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_held_lock_can_be_skipped(tmp_path: Path) -> None:
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
