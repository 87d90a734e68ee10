"""No library reports home: no file of its own appears, and no address is looked up."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmedge.bundle import Bundle
from mmedge.telemetry import disable_telemetry

ROOT = Path(__file__).parents[1]
OFF = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# A process that opens the bundle, another that it starts, and the workstation's libraries.
WORK = """
import sys
from pathlib import Path
import mmedge, mmedge.converters
from mmedge.converters.graphs.worker import Worker
from mmedge.machine.host import Host
from huggingface_hub import constants
bundle = mmedge.open_bundle(sys.argv[1])
with mmedge.load(bundle.path, backend="onnxruntime") as model:
    model.encode_text("red")
with Worker() as worker, worker.open(bundle.file("text_encoder/fp32.onnx"), "text"):
    Host().probe("onnxruntime"), Host().probe("openvino")
assert constants.HF_HUB_DISABLE_TELEMETRY
"""
LOOKED_UP = re.compile(r"AF_INET|resolv\.conf|nsswitch|/etc/hosts|nscd")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Empty folders in place of the user's, and nothing said about telemetry."""
    kept = {name: value for name, value in os.environ.items() if name not in OFF}
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        kept[name] = str(tmp_path / "user" / name)
        Path(kept[name]).mkdir(parents=True)
    return kept


def left(tmp_path: Path) -> list[Path]:
    """The files of a user's folders that are not mmedge's own."""
    files = [path for path in (tmp_path / "user").rglob("*") if path.is_file()]
    return [path for path in files if "mmedge" not in path.parts]


def test_no_file_appears_and_no_address_is_looked_up(
    tiny_bundle: Bundle, tmp_path: Path, environment: dict[str, str]
) -> None:
    strace = shutil.which("strace")
    log = tmp_path / "strace.txt"
    trace = [strace or "", "-f", "-o", str(log), "-e", "trace=connect,openat"]
    traced = strace is not None and not subprocess.run([*trace, "true"], check=False).returncode
    subprocess.run(
        [*(trace if traced else ()), sys.executable, "-c", WORK, str(tiny_bundle.path)],
        env=environment,
        check=True,
        timeout=240,
    )
    assert left(tmp_path) == []
    if not traced:
        pytest.skip("strace is missing or may not trace: only files were looked for")
    assert [line for line in log.read_text().splitlines() if LOOKED_UP.search(line)] == []


def test_a_set_environment_variable_wins(environment: dict[str, str], tiny_bundle: Bundle) -> None:
    """ORT_DISABLE_TELEMETRY=0 opts in, and a load leaves it so.

    Which files ONNX Runtime then writes is not asserted: a thread of its own writes them, and a
    short process may end first.
    """
    code = (
        "import os, sys, mmedge; mmedge.load(sys.argv[1], backend='onnxruntime').close(); "
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '0'"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tiny_bundle.path)],
        env={**environment, "ORT_DISABLE_TELEMETRY": "0"},
        check=True,
        timeout=120,
    )


@pytest.mark.parametrize("value", [None, "", "0", "1"])
def test_unset_and_empty_are_off(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    for name in OFF:
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    disable_telemetry()
    assert {name: os.environ[name] for name in OFF} == {name: value or OFF[name] for name in OFF}


def test_engines_are_imported_behind_one_door() -> None:
    """Each turns telemetry off first."""
    imports = re.compile(r"^\s*(import|from) (onnxruntime|openvino)\b(?!\.capi)", re.MULTILINE)
    found = {
        file.relative_to(ROOT).as_posix()
        for tree in ("mmedge", "converters", "runtimes")
        for file in (ROOT / tree).rglob("*.py")
        if imports.search(file.read_text("utf-8"))
    }
    assert found == {"runtimes/ort/engine.py"}  # openvino is imported by name: runtimes/openvino.py
