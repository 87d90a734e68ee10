"""The benchmark for GPUs: it ends with a clear message where there is none, and runs where one is.

What it measures on the GPU that is not there means nothing; that it comes to an end does.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmedge.runtimes.cuda import runtime as cuda

ROOT = Path(__file__).parents[3]
KINDS = (
    "bare", "bare, CUDA graph", "mmedge", "mmedge, no graphs", "mmedge host", "mmedge host, bound",
)  # fmt: skip


def test_without_a_gpu_it_measures_nothing(tmp_path: Path) -> None:
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
