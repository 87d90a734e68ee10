"""No process that mmedge starts runs code that lies in the current folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmedge.bundle import Bundle
from mmedge.children import absolute_entries, child_command, child_environment
from mmedge.converters.graphs.worker import Worker
from mmedge.machine.host import Host
from mmedge.profiling.cold import ColdTask, measure_cold
from mmedge.runtimes.selection.preparing import prepare_apart
from mmedge.runtimes.session import SessionOptions

ROOT = Path(__file__).parents[1]
PLANTED = """\
import os
with open({mark!r}, "a") as file:
    file.write({name!r} + " ")
os._exit(77)
"""
NAMES = (
    "numpy", "json", "typing", "signal", "pydantic", "onnxruntime", "openvino", "mmedge",
    "sitecustomize", "usercustomize", "startup",
)  # fmt: skip
# What names the current folder in PYTHONPATH, however the variable was put together.
PYTHONPATHS = (None, "", ":", ".", "/nowhere:", "./", "below/..")
SCRIPT = "from mmedge.cli import main\nmain()\n"


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that planted code leaves when it runs."""
    return tmp_path / "planted code ran"


@pytest.fixture
def planted(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: somebody else's, full of modules of well-known names."""
    folder = tmp_path / "downloaded"
    (folder / "below").mkdir(parents=True)
    for name in NAMES:
        (folder / f"{name}.py").write_text(PLANTED.format(mark=str(mark), name=name))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONSTARTUP", "startup.py")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    return folder


def open_in_worker(bundle: Bundle) -> None:
    with Worker() as worker, worker.open(bundle.file("text_encoder/fp32.onnx"), "text"):
        pass


def start_cold(bundle: Bundle) -> None:
    frame = bundle.path / "none.jpg"
    measure_cold(ColdTask(bundle, "text_encoder", "fp32", "onnxruntime", "cpu", 1, frame), 1)


def probe(_: Bundle) -> None:
    assert "fault" not in Host().probe("onnxruntime")


def prepare(bundle: Bundle) -> None:
    prepare_apart("onnxruntime", bundle.file("text_encoder/fp32.onnx"), SessionOptions())


@pytest.mark.parametrize("start", [open_in_worker, start_cold, probe, prepare])
def test_children_leave_the_current_folder_out(
    tiny_bundle: Bundle,
    planted: Path,
    mark: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: Callable[[Bundle], None],
) -> None:
    monkeypatch.setenv("PYTHONPATH", ":")
    start(tiny_bundle)
    assert not mark.exists(), mark.read_text()
    assert Path.cwd() == planted


@pytest.mark.parametrize("pythonpath", PYTHONPATHS)
@pytest.mark.parametrize("safe", [True, False], ids=["3.11", "3.10"])
def test_the_command_alone_keeps_the_folder_out(
    planted: Path,
    mark: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pythonpath: str | None,
    safe: bool,
) -> None:
    """Python 3.10 knows no PYTHONSAFEPATH."""
    if pythonpath is not None:
        monkeypatch.setenv("PYTHONPATH", pythonpath)
    script = tmp_path / "script.py"
    script.write_text("import json, sys\nprint(__name__, *sys.argv[1:], *sys.path)\n")
    environment = child_environment()
    if not safe:
        del environment["PYTHONSAFEPATH"]
    command = child_command(script, "an argument")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    name, *words = done.stdout.split()
    assert (name, words[:2]) == ("__main__", ["an", "argument"])
    assert not {"", ".", str(planted), str(script.parent)} & set(words)
    assert not mark.exists(), mark.read_text()


def test_an_error_in_a_child_names_its_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("\n\nraise ValueError\n")
    done = subprocess.run(child_command(script), capture_output=True, text=True, check=False)
    assert f'File "{script}", line 3' in done.stderr


def test_installed_packages_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An absolute folder in PYTHONPATH stays, as ROS and Jetson images have it."""
    monkeypatch.setenv("PYTHONPATH", f":{tmp_path}:relative")
    assert child_environment()["PYTHONPATH"] == str(tmp_path)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [("", ""), (":", ""), (".", ""), ("bin", ""), ("/bin:", "/bin"), (":/a:./b:/c:", "/a:/c")],
)
def test_absolute_entries(paths: str, expected: str) -> None:
    assert absolute_entries(paths) == expected


@pytest.mark.parametrize("path", ["", ".", ":/usr/bin"])
def test_doctor_runs_no_command_of_the_current_folder(
    planted: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    command = planted / "nvidia-smi"
    command.write_text(f"#!/bin/sh\ntouch '{mark}'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", path)
    assert Host().run(["nvidia-smi"]) is None
    assert not mark.exists()


def run_mmedge(command: list[str], bundle: Bundle, pythonpath: str | None = None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if pythonpath is not None:
        environment["PYTHONPATH"] = pythonpath
    subprocess.run(
        [*command, "verify", str(bundle.path), "--precision", "fp32"],
        env=environment,
        capture_output=True,
        check=True,
        timeout=120,
    )


def test_the_command_itself_leaves_the_current_folder_out(
    tiny_bundle: Bundle, planted: Path, mark: Path, tmp_path: Path
) -> None:
    script = tmp_path / "bin" / "mmedge"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    assert (planted / "numpy.py").is_file()
    run_mmedge([sys.executable, str(script)], tiny_bundle)
    assert not mark.exists(), mark.read_text()


def test_python_m_mmedge_leaves_it_out_as_far_as_it_can(
    tiny_bundle: Bundle, planted: Path, mark: Path
) -> None:
    """Python itself imports `typing` and the package before the first line of ours runs."""
    for early in ("mmedge", "typing"):
        (planted / f"{early}.py").unlink()
    run_mmedge([sys.executable, "-m", "mmedge"], tiny_bundle)
    assert not mark.exists(), mark.read_text()


def test_an_isolated_python_leaves_it_out(tiny_bundle: Bundle, planted: Path, mark: Path) -> None:
    assert (planted / "mmedge.py").is_file()
    run_mmedge([sys.executable, "-I", "-m", "mmedge"], tiny_bundle)
    assert not mark.exists(), mark.read_text()


def test_the_command_removes_an_empty_entry_of_the_search_path(
    tiny_bundle: Bundle, planted: Path, mark: Path, tmp_path: Path
) -> None:
    """Python reads PYTHONPATH before the first line of ours runs; what it imports itself stays."""
    for early in ("mmedge", "typing", "signal", "sitecustomize", "usercustomize"):
        (planted / f"{early}.py").unlink()
    script = tmp_path / "mmedge"
    script.write_text(SCRIPT)
    run_mmedge([sys.executable, str(script)], tiny_bundle, pythonpath=os.pathsep)
    assert not mark.exists(), mark.read_text()


def test_every_child_is_started_in_one_way() -> None:
    """Only code that names this Python's executable builds its own command."""
    sources = {
        file.relative_to(ROOT).as_posix(): file.read_text("utf-8")
        for tree in ("mmedge", "converters", "runtimes")
        for file in (ROOT / tree).rglob("*.py")
    }
    own = [name for name, text in sources.items() if "sys.executable" in text]
    assert sorted(own) == ["mmedge/children.py", "mmedge/machine/host.py"]  # host: for the report
    assert not [name for name, text in sources.items() if "multiprocessing" in text]
    for name, text in sources.items():
        if name != "mmedge/children.py":
            assert text.count("child_command(") == text.count("child_environment("), name
