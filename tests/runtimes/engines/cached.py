"""Keys, engines and processes for tests of the engine cache; the plans are synthetic bytes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import numpy as np

from mmedge.files import atomic
from mmedge.runtimes.engines import files as engine_files
from mmedge.runtimes.engines.spec import (
    BuiltEngine,
    EngineKey,
    EngineLayer,
    EngineRequest,
    ShapeProfile,
    ShapeRange,
)
from mmedge.runtimes.engines.store import EngineCache
from mmedge.specs import TensorSpec

PLAN = b"a plan " * 1000
OTHER_PLAN = b"another plan " * 2000


def profile(most: int = 8) -> ShapeProfile:
    return ShapeProfile({"x": ShapeRange((1, 3), (1, 3), (most, 3))})


def key(
    *,
    model: str = "a",
    backend: str = "tensorrt",
    version: str = "10.3.0.26",
    capability: str = "8.7",
    targets: tuple[str, ...] = (),
) -> EngineKey:
    """What an engine depends on; `targets` make it a portable one, without CUDA and driver."""
    request = EngineRequest(backend, targets, (profile(),))
    return EngineKey(
        model_sha256=model * 64,
        request=request,
        version=version,
        cuda="" if targets else "12.6",
        driver="" if targets else "540.4",
        compute_capability="+".join(targets) or capability,
    )


def built(plan: bytes = PLAN) -> BuiltEngine:
    return BuiltEngine(
        plan=plan,
        inputs=(TensorSpec("x", np.dtype(np.float32), ("batch", 3)),),
        outputs=(TensorSpec("y", np.dtype(np.float16), ("batch", 5)),),
        layers=(EngineLayer("conv + relu", "Convolution", ("int8",), ("fp16",)),),
        duration_s=1.5,
        warnings=("weights lie outside the range of fp16",),
    )


def counted(folder: Path, seconds: float = 0.0) -> Callable[[], BuiltEngine]:
    """Return a build that adds a line to `builds` in a folder, and takes its time."""

    def build() -> BuiltEngine:
        with (folder / "builds").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        return built(os.urandom(4096))  # no two builds give the same

    return build


def builds(folder: Path) -> int:
    return len((folder / "builds").read_text().splitlines())


# What follows runs in processes of their own.


def build_together(folder: Path, pipe: Connection, start: float) -> None:
    """Ask for the engine of key() at an agreed time; say its hash, and whether it was built."""
    cache = EngineCache(folder / "engines")
    time.sleep(max(0.0, start - time.time()))
    engine = cache.get_or_build(key(), counted(folder, 0.3))
    pipe.send((engine.record.plan_sha256, engine.miss is not None))


def build_until_go(folder: Path, pipe: Connection) -> None:
    """Build the engine of key() out of OTHER_PLAN until there is a file `go`."""

    def build() -> BuiltEngine:
        pipe.send("building")
        while not (folder / "go").exists():
            time.sleep(0.01)
        return built(OTHER_PLAN)

    EngineCache(folder / "engines").get_or_build(key(), build)


def store_and_die(folder: Path, pipe: Connection, death: str) -> None:
    """Store OTHER_PLAN as the engine of key(), and die at one of DEATHS."""
    sync, write = atomic._sync, engine_files.write_atomic

    def sync_plan_alone(path: Path) -> None:
        if ".json." in path.name:
            die()
        sync(path)

    def write_and_die(path: Path, data: bytes, *, private: bool) -> None:
        write(path, data, private=private)
        die()

    places = {
        "writing the plan": (atomic, "_sync", die),
        "between plan and record": (engine_files, "write_atomic", write_and_die),
        "writing the record": (atomic, "_sync", sync_plan_alone),
        "removing the old plan": (engine_files, "grouped_files", die),
    }
    module, name, replaced = places[death]
    setattr(module, name, replaced)
    EngineCache(folder / "engines").store(key(), built(OTHER_PLAN))


def die(*_: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
