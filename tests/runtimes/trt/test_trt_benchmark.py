"""The benchmark for GPUs: it ends with a clear message where there is none, and runs where one is.

What it measures on the GPU that is not there means nothing; that it comes to an end does.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fake_gpu import FakeGpu
from tiny_graphs import feed_of, save_embedder

from mmedge.bundle import Bundle
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


@pytest.mark.usefixtures("fake_gpu")
def test_a_contestant_that_refuses_keeps_no_other_away(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = gpu.tensorrt_calls

    def refuse() -> None:
        raise RuntimeError("no kernel for fp32")

    def some_refuse(subject: object, name: str, precision: str, stack: object) -> Iterator[Any]:
        for call, make in calls(subject, name, precision, stack):
            yield call, refuse if precision == "fp32" else make

    monkeypatch.setattr(gpu, "tensorrt_calls", some_refuse)
    found = gpu._measure(_subject(gpu, tmp_path), 2, gpu.Clock(0.0))
    refused = {"outcome": "RuntimeError: no kernel for fp32"}
    assert found["latency"]["tensorrt fp32 bare"] == refused
    assert found["latency"]["tensorrt fp16 bare"]["calls"] == 3
    assert found["tensorrt_against_fp16"] == {"fp32": refused}
    monkeypatch.setattr(gpu, "tensorrt_calls", lambda *_: [("tensorrt fp16 mmedge", refuse)])
    found = gpu._against_fp16(_subject(gpu, tmp_path), "tensorrt")
    assert found == refused


def test_after_its_time_nothing_is_begun(
    gpu: ModuleType, fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    found = gpu._measure(_subject(gpu, tmp_path), 2, gpu.Clock(0.0, until=0.0))
    assert fake_gpu.built == []
    none = {"outcome": "no time was left"}
    assert found.pop("latency") == {
        "tensorrt fp32": none,
        "tensorrt fp16": none,
        "tensorrt-rtx fp32": none,
        "tensorrt-rtx fp16": none,
        **{
            f"onnxruntime {precision} {kind}": none
            for precision in ("fp32", "fp16")
            for kind in ("mmedge host", "IO binding", "IO binding, CUDA graph")
        },
        "torch fp16 eager": none,
    }
    assert len(found) == 4
    assert all(outcome == none for outcome in found.values())


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("stopped", [False, True])
def test_what_was_measured_is_recorded_batch_by_batch(
    gpu: ModuleType,
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped: bool,
) -> None:
    measure = gpu._measure

    def until_stopped(subject: Any, batch: int, clock: Any) -> Any:
        if stopped and batch == 3:
            raise KeyboardInterrupt
        return measure(subject, batch, clock)

    full_size = ModuleType("full_size")
    vars(full_size).update(bundle=lambda **_: tiny_bundle.path, source=lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "full_size", full_size)
    monkeypatch.setattr(gpu, "_measure", until_stopped)
    output = tmp_path / "gpu.json"
    given = ["gpu.py", "--seconds", "0", "--batches", "2", "3", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(KeyboardInterrupt) if stopped else nullcontext():
        gpu.main()

    results = json.loads(output.read_text())["results"]
    assert results["complete"] is not stopped
    assert results["gpu"]["compute_capability"] == "8.9"
    first = ["image_encoder_batch_2", "text_encoder_batch_2"]
    second = ["image_encoder_batch_3", "text_encoder_batch_3"]
    assert [name for name in results if "_batch_" in name] == first + ([] if stopped else second)
    for name in first:
        assert results[name]["latency"]["tensorrt fp32 mmedge"]["calls"] == 3
    seen = {(row["backend"], row["precision"]): row for row in results["parity"]}
    assert seen["tensorrt", "fp32"]["passed"]
    assert "fp8" in seen["tensorrt-rtx", "fp8"]["outcome"]
