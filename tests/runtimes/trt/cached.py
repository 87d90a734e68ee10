"""Keys, engines and processes for tests of the engine cache; the plans are made-up bytes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mmedge.runtimes.trt.cache import EngineCache
from mmedge.runtimes.trt.engines import (
    BuiltEngine,
    EngineKey,
    EngineLayer,
    EngineRequest,
    ShapeProfile,
    ShapeRange,
)
from mmedge.specs import TensorSpec

PLAN = b"a plan " * 1000
OTHER_PLAN = b"another plan " * 2000


def profile(most: int = 8) -> ShapeProfile:
    return ShapeProfile({"x": ShapeRange((1, 3), (1, 3), (most, 3))})


def key(
    *,
    model: str = "a",
    flavour: str = "tensorrt",
    version: str = "10.3.0.26",
    capability: str = "8.7",
    targets: tuple[str, ...] = (),
) -> EngineKey:
    """What an engine depends on; `targets` make it a portable one, without CUDA and driver."""
    assert flavour in ("tensorrt", "tensorrt-rtx")
    request = EngineRequest(flavour, targets, (profile(),))  # type: ignore[arg-type]
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


def build_in_a_process(folder: str, start: float) -> tuple[str, bool]:
    """Build at an agreed time; return the plan's hash, and whether it was built here."""
    cache = EngineCache(Path(folder) / "engines")
    time.sleep(max(0.0, start - time.time()))
    engine = cache.get_or_build(key(), counted(Path(folder), 0.3))
    return engine.record.plan_sha256, engine.miss is not None
