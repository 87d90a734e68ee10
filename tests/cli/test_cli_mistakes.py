"""Cheap mistakes are found before anything heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Runs several commands in one process and reports of each its exit code, its message and which of
# the heavy libraries it has imported.
SCRIPT = """
import contextlib, io, json, sys
from mmedge.cli import main
HEAVY = ("torch", "transformers", "onnxruntime", "openvino", "optimum", "huggingface_hub")
found = {}
for name, arguments in json.load(sys.stdin).items():
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        try:
            main(arguments)
        except SystemExit as done:
            code = done.code
    heavy = [library for library in HEAVY if library in sys.modules]
    found[name] = [code, stderr.getvalue(), heavy]
print(json.dumps(found))
"""

EXPECTED = {
    "output exists": "it exists. Pass --overwrite",
    "output is no bundle": "it exists and is not a bundle",
    "wrong suffix": "its name must end in '.mmedge'",
    "no such source": "No such folder: ./nowhere",
    "source without config.json": "has no config.json",
    "no such calibration data": "No such folder or file: nowhere",
    "empty evaluation data": "holds no images",
    "precision int-8": "Did you mean int8?",
    "precision INT8": "Did you mean int8?",
    "precision fp-16": "Did you mean fp16?",
    "precision Int8_Dynamic": "Did you mean int8-dynamic?",
    "setting": "Did you mean equalized?",
    "objective": "Did you mean latency?",
    "metric": "Did you mean recall@1",
    "target": "of cpu, tensorrt",
    "template": "has no place for the label",
    "inspect: no bundle": "it does not exist",
    "verify: no bundle": "it does not exist",
    "profile: no bundle": "it does not exist",
    "doctor: no bundle": "it does not exist",
    "build: no bundle": "it does not exist",
    "profile: gate": "Not a gate: got 'nonsense'",
    "profile: batch": "--batch",
}


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, tiny_bundle_original: Path
) -> dict[str, tuple[int, str, list[str]]]:
    folder = tmp_path_factory.mktemp("mistakes")
    empty = folder / "empty"
    empty.mkdir()

    def convert(
        *options: str, source: str | Path = "a/hub-id", out: str | Path = "x.mmedge"
    ) -> Any:
        return ["convert", str(source), "-o", str(folder / out), *options]

    gone = str(folder / "gone.mmedge")
    commands = {
        "output exists": convert(out=tiny_bundle_original),
        "output is no bundle": convert(out=(empty / "taken.mmedge")),
        "wrong suffix": convert(out="x.onnx"),
        "no such source": convert(source="./nowhere"),
        "source without config.json": convert(source=empty),
        "no such calibration data": convert("--calibration", "nowhere"),
        "empty evaluation data": convert("--evaluate", str(empty)),
        "precision int-8": convert("--precision", "int-8"),
        "precision INT8": convert("--precision", "INT8"),
        "precision fp-16": convert("--precision", "fp32,fp-16"),
        "precision Int8_Dynamic": convert("--precision", "Int8_Dynamic"),
        "setting": convert("--precision", "int8-dynamic-equalised"),
        "objective": convert("--objective", "Latency"),
        "metric": convert("--metric", "recal@1"),
        "target": convert("--target", "gpu"),
        "template": convert("--template", "a photo"),
        "inspect: no bundle": ["inspect", gone],
        "verify: no bundle": ["verify", gone],
        "profile: no bundle": ["profile", gone],
        "doctor: no bundle": ["doctor", gone],
        "build: no bundle": ["build", gone],
        "profile: gate": ["profile", str(tiny_bundle_original), "--fail-if", "nonsense"],
        "profile: batch": ["profile", str(tiny_bundle_original), "--batch", "0"],
    }
    (empty / "taken.mmedge").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(commands),
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert commands.keys() == EXPECTED.keys()
    results: dict[str, tuple[int, str, list[str]]] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("mistake", EXPECTED)
def test_a_cheap_mistake_is_reported_before_heavy_imports(
    found: dict[str, tuple[int, str, list[str]]], mistake: str
) -> None:
    code, message, heavy = found[mistake]
    assert code in (1, 2)
    assert EXPECTED[mistake] in " ".join(message.replace("│", " ").split())
    assert "Traceback" not in message
    assert heavy == []


def test_the_module_is_the_command_and_runs_nothing_of_the_current_folder(tmp_path: Path) -> None:
    for name in ("typer", "numpy", "json", "pathlib", "rich"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
    done = subprocess.run(
        [sys.executable, "-m", "mmedge", "inspect", "gone.mmedge"],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "it does not exist" in done.stderr
