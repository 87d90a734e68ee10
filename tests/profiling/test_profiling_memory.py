"""Memory as processes report it, and cold starts in fresh ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmedge.bundle import Bundle
from mmedge.errors import ProfileError
from mmedge.profiling.cold import ColdTask, measure_cold
from mmedge.profiling.inputs import frame_jpeg
from mmedge.profiling.memory import parse_memory

STATUS = (
    "Name:\tpython\nVmHWM:\t   2048 kB\nVmRSS:\t   1024 kB\nRssAnon:\t    512 kB\nThreads:\t3\n"
)


def test_status_is_read_in_bytes() -> None:
    reading = parse_memory(STATUS)
    assert reading.peak_bytes == 2048 * 1024
    assert reading.resident_bytes == 1024 * 1024
    assert reading.anonymous_bytes == 512 * 1024
    assert reading.source == "/proc/self/status"


def test_old_kernels_do_not_report_anonymous_memory() -> None:
    assert parse_memory(STATUS.replace("RssAnon", "Other")).anonymous_bytes is None


def test_without_proc_the_peak_is_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert parse_memory("ru_maxrss: 3").peak_bytes == 3 * 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    reading = parse_memory("ru_maxrss: 3")
    assert (reading.peak_bytes, reading.anonymous_bytes) == (3, None)
    assert "peak only" in reading.source


@pytest.mark.parametrize("text", ["", "VmRSS: 3 kB", "VmRSS: 3 MB\nVmHWM: 4 MB", "ru_maxrss: x"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ProfileError, match="--cold-starts 0"):
        parse_memory(text)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc (Linux)")
def test_a_process_reports_its_allocated_memory() -> None:
    code = (
        "held = bytearray(b'x') * 100_000_000; del held; kept = bytearray(b'x') * 50_000_000;"
        "print(open('/proc/self/status').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reading = parse_memory(done.stdout)
    assert 100e6 < reading.peak_bytes < 200e6
    assert 50e6 < reading.resident_bytes < 100e6


def cold_task(bundle: Bundle, role: str, frame: Path) -> ColdTask:
    frame.write_bytes(frame_jpeg())
    return ColdTask(
        bundle=bundle,
        role=role,
        variant="int8-dynamic",
        backend="onnxruntime",
        device="cpu",
        threads=1,
        frame=frame,
    )


@pytest.mark.parametrize("role", ["image_encoder", "text_encoder"])
def test_a_cold_start_is_made_of_its_parts(tiny_bundle: Bundle, tmp_path: Path, role: str) -> None:
    cold, memory = measure_cold(cold_task(tiny_bundle, role, tmp_path / "frame.jpg"), 1)
    assert cold.runs == 1
    parts = cold.import_ms.median + cold.load_ms.median + cold.first_run_ms.median
    assert cold.cpu_ms.median > 0
    # The interpreter's own start is the rest.
    assert 0 < parts < cold.first_embedding_ms.median
    assert 0 < memory.before_load_bytes <= memory.steady_bytes <= memory.peak_bytes


def test_a_process_holds_one_role_and_nothing_of_the_profiler(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    task = cold_task(tiny_bundle, "text_encoder", tmp_path / "frame.jpg")
    code = Path(sys.modules[measure_cold.__module__].__file__ or "").with_name("cold_child.py")
    probe = f"exec(compile({code.read_text()!r}, 'child', 'exec')); print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", probe, task.to_json()], capture_output=True, text=True, check=True
    )
    modules = done.stdout.splitlines()[-1]
    assert "'mmedge.models.load'" in modules
    assert "mmedge.profiling" not in modules
    assert "torch" not in modules


def test_a_failed_process_gives_its_reason(tiny_bundle: Bundle, tmp_path: Path) -> None:
    task = cold_task(tiny_bundle, "image_encoder", tmp_path / "frame.jpg")
    (tiny_bundle.path / "image_encoder" / "int8-dynamic.onnx").write_bytes(b"")
    with pytest.raises(ProfileError, match=r"exit code 1: .*IntegrityError.*int8-dynamic\.onnx"):
        measure_cold(task, 1)
