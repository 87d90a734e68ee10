"""The command's manners: exit codes, one line for an error, nothing heavy for a help text."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from mmedge import cli
from mmedge.bundle import Bundle
from mmedge.cli import app, output

MAIN = "import sys; from mmedge.cli import main; main(sys.argv[1:])"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", MAIN, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from mmedge.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=120
    )
    loaded = set(json.loads(done.stderr.replace("'", '"')))
    heavy = {"numpy", "pydantic", "onnxruntime", "torch", "PIL", "tokenizers", "transformers"}
    assert "typer" in loaded
    assert loaded & heavy == set()
    for name in app._COMMANDS:
        assert f" {name} " in done.stdout


@pytest.mark.parametrize("name", app._COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0
    assert f"Usage: mmedge {name}" in done.stdout


def test_help_fills_its_lines() -> None:
    done = run("cache", "prune", "--help", COLUMNS="400")
    paragraph = (
        "Unusable engines are damaged, left by a build that was killed, or built for another"
    )
    assert f"{paragraph} version of their library" in done.stdout


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout == f"mmedge {version('mmedge')}\n"


@pytest.mark.parametrize(
    "arguments", [["inspekt"], ["inspect"], ["inspect", "a", "b"], ["inspect", "a", "--jason"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Usage: mmedge" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_is_one_line_on_stderr(tmp_path: Path) -> None:
    done = run("inspect", str(tmp_path / ("deep" * 40) / "missing [v1].mmedge"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: Cannot open bundle /")
    assert "missing [v1].mmedge: it does not exist." in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "\x1b" not in done.stderr


def test_an_error_is_red_in_a_terminal(tmp_path: Path) -> None:
    done = run("inspect", str(tmp_path / "x.mmedge"), FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b[1;31mError: \x1b[0m\x1b[31m" in done.stderr


def test_the_traceback_is_shown_on_request(tmp_path: Path) -> None:
    done = run("inspect", str(tmp_path / "x.mmedge"), MMEDGE_TRACEBACK="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "mmedge.errors.BundleError: Cannot open bundle" in done.stderr


def test_a_warning_is_one_line_without_code() -> None:
    script = (
        "import warnings; from mmedge.cli import app, main\n"
        "def warned(_):\n"
        "    for category in (RuntimeWarning, UserWarning):\n"
        "        warnings.warn_explicit(category.__name__, category, 'there.py', 3)\n"
        "app.run = warned\n"
        "main([])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", script],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    # Other warnings of a library are for developers.
    assert done.stderr == "Warning: RuntimeWarning\nthere.py:3: UserWarning: UserWarning\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(app, "run", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main([])


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_one_line_and_the_exit_code(tmp_path: Path, sent: signal.Signals) -> None:
    """A real signal to a command at work."""
    if signal.getsignal(sent) == signal.SIG_IGN:
        pytest.skip("ignored in this process and so in its children, as under nohup")
    bundle = tmp_path / "x.mmedge"
    bundle.mkdir()
    script = (
        "import sys, time; from mmedge.bundle import opening; from mmedge import bundle\n"
        "def wait(_): print('waiting', flush=True); time.sleep(60)\n"
        "bundle.open_bundle = wait\n"
        "from mmedge.cli import main; main(['inspect', sys.argv[1]])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(bundle)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + sent
    assert errors == "Error: Interrupted. No partial output is left behind.\n"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_neither_files_nor_a_worker(tmp_path: Path, sent: signal.Signals) -> None:
    script = (
        "import sys, time\n"
        "from mmedge.bundle import create_bundle\n"
        "from mmedge.cli import app, main\n"
        "from mmedge.converters.graphs import worker\n"
        "def convert(_):\n"
        "    with create_bundle(sys.argv[1]) as folder, worker.Worker() as graphs:\n"
        "        (folder / 'half.onnx').write_bytes(b'half')\n"
        "        graphs._process = worker._Process()\n"
        "        print(graphs.pid, flush=True)\n"
        "        time.sleep(60)\n"
        "app.run = convert\n"
        "main([])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out.mmedge")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(sent)
        process.communicate(timeout=60)
    assert process.returncode == 128 + sent
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_a_reader_that_leaves_early_is_no_error_to_speak_of(
    tiny_bundle: Bundle, arguments: list[str]
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, "inspect", str(tiny_bundle.path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_a_path_that_is_not_utf8_and_a_terminal_that_is_not_either(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9-\xc3\xa9.mmedge")
    done = run("inspect", str(tmp_path / name), PYTHONIOENCODING="ascii")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert r"caf\udce9-\xe9.mmedge" in done.stderr


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1536, "1.54 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (351_000_000, "351 MB"),
        (12_345_000_000, "12.3 GB"),
        (7_000_000_000_000, "7000 GB"),
    ],
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    assert output.human_bytes(size_bytes) == text


def test_json_is_json_whatever_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": ("é", None)})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"a": None, "b": [None, 1.5], "c": ["é", None]}


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert output.plain("a\x1b[2Jb\r\u202e\nc é") == "a\\x1b[2Jb\\r\\u202e\nc é"
