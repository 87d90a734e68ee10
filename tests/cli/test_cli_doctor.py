"""`mmedge doctor` as the owner of each machine sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import edit_manifest
from machines import BARE, DESKTOP, MACHINES, ORIN, THOR, Described

from mmedge.bundle import Bundle
from mmedge.cli import main
from mmedge.machine import report as machine_module
from mmedge.machine.report import look_at_machine

Stand = Callable[[Described], None]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stand:
    """Stand on a machine: a function that is given one."""

    def stand(described: Described) -> None:
        host = described.host(tmp_path / "root")
        monkeypatch.setattr(machine_module, "look_at_machine", lambda: look_at_machine(host))
        monkeypatch.setattr("mmedge.sessions.readiness._is_prepared", lambda *_: False)

    return stand


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as done:
        main(["doctor", *map(str, arguments)])
    captured = capsys.readouterr()
    return done.value.code, captured.out, captured.err


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_an_orin(on: Stand, capsys: pytest.CaptureFixture[str]) -> None:
    on(ORIN)
    code, out, errors = doctor(capsys)
    assert (code, errors) == (0, "")
    text = squeezed(out)
    for expected in (
        "board NVIDIA Jetson AGX Orin Developer Kit",
        "JetPack 6.2 (L4T 36.4.3)",
        "power mode 30W",
        "GPU 0 Orin, compute capability 8.7, shares the memory",
        "serves CUDA 12.6, toolkit 12.6.11, cuda-bindings 12.6.2",
        "tensorrt 10.3.0",
        "tensorrt-rtx not installed",
        "onnxruntime 1.23.2: CPU",
        "INA3221",
        "100 GB free",
        "sees the system's packages",
    ):
        assert expected in text, expected


def test_an_empty_machine_is_reported_plainly(
    on: Stand, capsys: pytest.CaptureFixture[str]
) -> None:
    on(BARE)
    _, out, _ = doctor(capsys)
    text = squeezed(out)
    assert "GPU no NVIDIA GPU: CUDA and TensorRT need one" in text
    assert text.count("not installed") == 3
    assert "energy no counter" in text
    assert "JetPack" not in text


@pytest.mark.parametrize("name", MACHINES)
def test_80_columns_are_enough(
    on: Stand,
    tiny_bundle: Bundle,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    on(MACHINES[name])
    code, out, _ = doctor(capsys, tiny_bundle.path)
    assert code == 0
    commands = [line for line in out.splitlines() if line.startswith("      ")]
    for line in out.splitlines():
        assert len(line) <= 80 or line in commands, line  # a command stays one line to be copied


def test_a_bundle_with_all_it_needs(
    on: Stand,
    tiny_bundle: Bundle,
    capsys: pytest.CaptureFixture[str],
) -> None:
    on(THOR)
    code, out, errors = doctor(capsys, tiny_bundle.path)
    assert (code, errors) == (0, "")
    lines = out.splitlines()
    (row,) = {squeezed(line) for line in lines if line.startswith("   fp32")}
    assert row == "fp32 ready needs (1) needs (2)"
    (command,) = [line for line in lines if "--system-site-packages" in line]
    assert lines[lines.index(command) - 1].startswith("(2) TensorRT 10.13.3.9 is on the system")
    assert "10.13.3.9 is on the system" in squeezed(out)


def test_commands_are_listed_once(
    on: Stand,
    tiny_bundle: Bundle,
    capsys: pytest.CaptureFixture[str],
) -> None:
    on(DESKTOP)
    _, out, _ = doctor(capsys, tiny_bundle.path)
    assert out.count("pip install tensorrt-cu13") == 1
    assert out.count("--target tensorrt-rtx") == 1


def test_a_bundle_that_cannot_run_here_exits_with_1(
    on: Stand,
    tiny_bundle: Bundle,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for index in (0, 1):
        steps = ("roles", "text_encoder", "variants", index, "precision")
        edit_manifest(tiny_bundle.path, *steps, value="bf16")
    on(BARE)
    code, out, errors = doctor(capsys, tiny_bundle.path)
    assert code == 1
    assert "nothing here can run text_encoder." in errors
    assert "no bfloat16 kernels for CPUs" in out


def test_json_holds_everything(
    on: Stand,
    tiny_bundle: Bundle,
    capsys: pytest.CaptureFixture[str],
) -> None:
    on(ORIN)
    code, out, _ = doctor(capsys, tiny_bundle.path, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["runs_here"] is True
    assert document["machine"]["jetson"]["jetpack"] == "6.2"
    assert document["machine"]["gpus"][0]["compute_capability"] == "8.7"
    assert {"role", "variant", "backend", "device", "state", "reason", "command"} == set(
        document["variants"][0]
    )
    assert doctor(capsys, "--json")[0] == 0


def test_notes_are_shown(on: Stand, capsys: pytest.CaptureFixture[str]) -> None:
    files = {k: v for k, v in DESKTOP.files.items() if "driver" not in k}
    on(replace(DESKTOP, commands={}, files=files))
    _, out, _ = doctor(capsys)
    assert "! An NVIDIA GPU is on the PCI bus without a working driver." in out


def test_a_bundle_that_is_none(
    on: Stand, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on(BARE)
    code, out, errors = doctor(capsys, tmp_path / "x.mmedge")
    assert (code, out) == (1, "")
    assert "Cannot open bundle" in errors
