"""The benchmark for GPUs: it ends with a clear message where there is none, and runs where one is.

What it measures on the GPU that is not there means nothing; that it comes to an end does.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_graphs import feed_of, save_embedder

from mmedge.runtimes.cuda import runtime as cuda
from mmedge.specs import Axis

ROOT = Path(__file__).parents[3]
KINDS = (
    "bare", "bare, CUDA graph", "mmedge", "mmedge, no graphs", "mmedge host", "mmedge host, bound",
)  # fmt: skip


def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path: Path) -> None:
    if Path("/proc/driver/nvidia").exists() or not cuda.bindings_installed():
        pytest.skip("there is a driver, or no cuda-bindings")
    output = tmp_path / "gpu.json"
    for more, code in ((), 0), (("--require",), 1):
        done = subprocess.run(
            [sys.executable, ROOT / "benchmarks" / "gpu.py", "--output", output, *more],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code
        assert "no GPU can be used here, so nothing is measured. There is no NVIDIA" in done.stdout
        assert done.stderr == ""
    assert not output.exists()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, with few calls; torch refuses, as where it has no CUDA."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("gpu")
    for name, value in {"_WARMUP_S": 0, "_LEAST_CALLS": 3, "_ROUNDS": 4}.items():
        monkeypatch.setattr(module, name, value)

    def refuse() -> None:
        raise RuntimeError("the installed torch has no CUDA")

    monkeypatch.setattr(module, "torch_calls", lambda _: [("torch fp16 eager", refuse)])
    return module


def _subject(gpu: ModuleType, folder: Path) -> Any:
    model = save_embedder(folder / "m.onnx")
    models = {"fp32": model, "fp16": model}
    return gpu.Subject("image_encoder", folder, models, feed_of(2), {"batch": Axis(1, 2, 64)})


@pytest.mark.usefixtures("fake_gpu")
def test_every_contestant_ends_with_figures_or_a_reason(gpu: ModuleType, tmp_path: Path) -> None:
    found: dict[str, Any] = gpu._measure(_subject(gpu, tmp_path), 2, gpu.Clock(0.0))

    latency = found["latency"]
    for backend in ("tensorrt", "tensorrt-rtx"):
        for precision in ("fp32", "fp16"):
            for kind in KINDS:
                assert latency[f"{backend} {precision} {kind}"]["calls"] == 3
        assert found[f"{backend}_overhead"]["with_graphs"]["mmedge"]["median"] > 0
        assert found[f"{backend}_overhead"]["without_graphs"]["mmedge"]["median"] > 0
        assert found[f"{backend}_against_fp16"]["fp32"]["median"] > 0
    assert latency["torch fp16 eager"] == {
        "outcome": "RuntimeError: the installed torch has no CUDA"
    }
    assert "without CUDA" in latency["onnxruntime fp32 mmedge host"]["outcome"]
