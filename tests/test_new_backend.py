"""A new backend is one class and one line of BACKENDS; everything else finds it there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from machines import BARE

import mmedge
from mmedge.bundle import Bundle
from mmedge.cli import main
from mmedge.errors import EngineBuildError
from mmedge.machine.report import look_at_machine
from mmedge.runtimes import BACKENDS, Session, SessionOptions, backend
from mmedge.runtimes.backends import Backend
from mmedge.runtimes.engines.spec import BuildHost, BuiltEngine, EngineKey
from mmedge.runtimes.engines.store import EngineCache, LoadedEngine
from mmedge.runtimes.onnx_file import read_onnx_file
from mmedge.runtimes.selection.remembered import Choice
from mmedge.runtimes.session import BuildProgress
from mmedge.sessions import choice
from mmedge.sessions.readiness import judge

HOST = BuildHost("2.0", compute_capability="toy")


class Toy(Backend):
    """Runs graphs in ONNX Runtime, and builds engines of a few bytes."""

    name, title, install, runs_on = "toy", "Toy", "pip install toy", "cpu"

    def __init__(self) -> None:
        self.builder = self
        self.opened: list[Path] = []

    def engine_version(self) -> str:
        return HOST.version

    def available_devices(self) -> tuple[str, ...]:
        return ("cpu",)

    def open_session(self, model: Path, options: SessionOptions) -> Session:
        self.opened.append(model)
        return backend("onnxruntime").open_session(model, options)

    def host(self, targets: Sequence[str] = (), device: int = 0) -> BuildHost:  # noqa: ARG002
        if targets:
            raise EngineBuildError(f"Toy builds for no {targets}.")
        return HOST

    def targets(self, named: Sequence[str], precision: str) -> tuple[str, ...]:  # noqa: ARG002
        return tuple(named)

    def build(
        self,
        model: Path,
        key: EngineKey,
        *,
        device: int = 0,  # noqa: ARG002
        progress: BuildProgress | None = None,  # noqa: ARG002
        on_wait: Callable[[str], None] | None = None,
    ) -> LoadedEngine:
        graph = read_onnx_file(model)
        built = BuiltEngine(b"toy", graph.inputs, graph.outputs, (), 0.1)
        return EngineCache().get_or_build(key, lambda: built, label="toy", on_wait=on_wait)


TOY = Toy()


@pytest.fixture(autouse=True)
def _registered(several_backends: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "toy", f"{__name__}:TOY")  # the one line
    monkeypatch.setattr(TOY, "opened", [])


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    return done.value.code, capsys.readouterr().out


def test_it_is_loaded_by_name(tiny_bundle: Bundle) -> None:
    with mmedge.load(tiny_bundle.path, backend="toy") as model:
        assert model.encode_text(["red"]).shape == (1, 4)
    assert {path.parent.name for path in TOY.opened} == {"image_encoder", "text_encoder"}


def test_it_takes_part_in_the_choice(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def decide(sessions: dict[str, Session], *_: object) -> tuple[Choice, bool]:
        seen.extend(sessions)
        return Choice("toy", "it is the fastest"), True

    monkeypatch.setattr(choice, "_decide", decide)
    with mmedge.load(tiny_bundle.path, roles=["image_encoder"]) as model:
        assert model.choices["image_encoder"].backend == "toy"
    assert seen == ["onnxruntime", "openvino", "toy"]


def test_doctor_knows_what_it_needs(tiny_bundle: Bundle, tmp_path: Path) -> None:
    engines = dict(BARE.engines)
    found = []
    for more, prepared in (({}, False), ({"toy": "2.0"}, False), ({"toy": "2.0"}, True)):
        described = replace(BARE, engines=engines | more)
        machine = look_at_machine(described.host(tmp_path / str(len(found))))
        options = judge(tiny_bundle, machine, is_prepared=lambda *_, known=prepared: known)
        (option, *_) = [option for option in options if option.backend == "toy"]
        found.append((option.device, option.state, option.command))
    assert found == [
        ("cpu", "needs", "pip install toy"),
        ("cpu", "build", f"mmedge build {tiny_bundle.path} --target toy"),
        ("cpu", "ready", ""),
    ]


def test_it_verifies_a_bundle(tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "verify", str(tiny_bundle.path), "--backend", "toy", "--json")
    assert (code, json.loads(out)["passed"]) == (0, True)


def test_its_engines_are_planned_built_and_listed(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tiny_bundle.path)
    _, out = run(capsys, "build", path, "--plan", "--json")
    (plan,) = [each for each in json.loads(out) if each["target"] == "toy"]
    assert {engine["state"] for engine in plan["engines"]} == {"build"}
    assert run(capsys, "build", path, "--target", "toy", "-q") == (0, "")
    _, out = run(capsys, "cache", "list", "--json")
    assert {entry["key"]["request"]["backend"] for entry in json.loads(out)["engines"]} == {"toy"}
    assert "4 engines kept" in run(capsys, "cache", "prune")[1]
    assert "toy 2.0" in run(capsys, "cache", "list")[1]
