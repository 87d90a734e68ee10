"""Graphs that never end: verify, load and profile end, with an error that names the graph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bundles import replace_model, write_tiny_bundle
from endless import endless_encoder

import mmedge
from mmedge.bundle import Bundle
from mmedge.errors import BackendError, InputError, TimeLimitError
from mmedge.models import verify_bundle
from mmedge.profiling import ProfileConfig, profile
from mmedge.runtimes.selection.interleaved import InterleavedTiming
from mmedge.runtimes.selection.limits import time_limit
from mmedge.runtimes.selection.remembered import choice_files
from mmedge.sessions import choice as choosing


@pytest.fixture
def endless(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle whose image encoder never ends, and a limit of one second."""
    monkeypatch.setenv("MMEDGE_TIME_LIMIT_S", "1")
    return replace_model(tiny_bundle, endless_encoder(constant=True))


def test_verify_ends(endless: Bundle) -> None:
    with pytest.raises(
        TimeLimitError,
        match=r"replaying image_encoder/fp32 in onnxruntime did not end within 1 s.*TIME_LIMIT_S",
    ):
        verify_bundle(endless)


def test_load_ends(endless: Bundle, several_backends: Path) -> None:
    # ONNX Runtime never ends a run of it, OpenVINO never opens it.
    with pytest.raises(TimeLimitError, match=r"measuring image_encoder/fp32 in \w+ did not end"):
        mmedge.load(endless.path, roles=["image_encoder"])
    assert choice_files() == ()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_load_ends_in_a_backend_that_is_named(backend: str, endless: Bundle) -> None:
    with pytest.raises(TimeLimitError, match=f"replaying image_encoder/fp32 in {backend}"):
        mmedge.load(endless.path, backend=backend, precision="fp32")
    with mmedge.load(endless.path, backend=backend, precision="int8") as model:
        assert model.encode_text("red").shape == (1, 4)  # no loop: opened at once


def test_profile_ends(endless: Bundle) -> None:
    with pytest.raises(TimeLimitError, match=r"replaying image_encoder/fp32 in onnxruntime"):
        profile(endless, ProfileConfig(roles=("image_encoder",), precisions=("fp32",)))


def test_a_profile_tries_the_baseline_too(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_tiny_bundle(tmp_path / "other.mmedge")
    tried: list[tuple[str, str]] = []

    def replay(bundle: Bundle, variants: Any, *_: object) -> None:
        tried.extend((bundle.path.name, variant.name) for _, variant in variants)
        if bundle.path == other.path:
            raise TimeLimitError("too long")

    monkeypatch.setenv("MMEDGE_TIME_LIMIT_S", "7")
    monkeypatch.setattr("mmedge.profiling.profiler.replay_variants", replay)
    config = ProfileConfig(
        roles=("image_encoder",), precisions=("fp32",), baseline=f"{other.path}:int8-dynamic"
    )
    with pytest.raises(TimeLimitError, match="too long"):
        profile(tiny_bundle, config)
    assert tried == [("tiny.mmedge", "fp32"), ("other.mmedge", "int8-dynamic")]


def test_a_limit_changes_no_result(tiny_bundle: Bundle) -> None:
    assert verify_bundle(tiny_bundle, time_limit_s=600) == verify_bundle(tiny_bundle)


def test_an_error_of_the_worker_is_raised_here(tiny_bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=r"no device 'cuda:99'|without CUDA|sees \d GPU"):
        verify_bundle(tiny_bundle, device="cuda:99", time_limit_s=600)


def test_backends_are_measured_within_a_limit(
    tiny_bundle: Bundle, several_backends: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMEDGE_TIME_LIMIT_S", "600")
    with mmedge.load(tiny_bundle.path, roles=["text_encoder"]) as model:
        choice = model.choices["text_encoder"]
        assert set(choice.latencies_ms) == {"onnxruntime", "openvino"}
        assert model.sessions["text_encoder"].placement.backend == choice.backend
        assert model.encode_text("red").shape == (1, 4)


def test_a_backend_that_never_ends_is_excluded(
    tiny_bundle: Bundle, several_backends: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMEDGE_TIME_LIMIT_S", "7")
    asked: list[list[str]] = []

    def run_apart(_: Path, request: dict[str, Any], report: Any, **__: object) -> None:
        asked.append(request["names"])
        if len(asked) == 1:
            report({"begun": "onnxruntime"})
            report({"begun": "openvino"})
            raise TimeLimitError("too long")
        assert request["out"] == {"openvino": "too long"}
        report({"choice": {"backend": "onnxruntime", "reason": "the only one"}, "sure": True})

    monkeypatch.setattr(choosing, "run_apart", run_apart)
    with mmedge.load(tiny_bundle.path, roles=["text_encoder"]) as model:
        assert model.choices["text_encoder"].backend == "onnxruntime"
    assert asked == [["onnxruntime", "openvino"], ["onnxruntime"]]
    assert len(choice_files()) == 1


@pytest.mark.parametrize(
    ("low", "high", "busy", "races", "remembered"),
    [
        (0.5, 0.6, 1e9, 1, True),  # clearly faster
        (0.9, 1.1, 1e9, 2, False),  # in doubt, also after a longer race
        (0.96, 0.98, 1e9, 1, True),  # in doubt, and too little to matter
        (0.85, 0.9, -1.0, 2, False),  # faster, and the machine is busy
        (0.5, 0.6, -1.0, 1, True),  # so much faster that it does not matter
    ],
)
def test_uncertain_choices_are_not_remembered(
    low: float, high: float, busy: float, races: int, remembered: bool,
    tiny_bundle: Bundle, several_backends: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run: list[float] = []

    def time_interleaved(
        calls: Any, *, rounds: int, seconds: float
    ) -> dict[str, InterleavedTiming]:
        run.append(seconds)
        return {
            name: InterleavedTiming(10 * r, 10 * r, r, lowest, highest, (10 * r,))
            for name, r, lowest, highest in zip(
                calls, (1, (low + high) / 2), (1, low), (1, high), strict=True
            )
        }

    monkeypatch.setattr(choosing, "time_interleaved", time_interleaved)
    monkeypatch.setattr(choosing, "_BUSY", busy)
    with mmedge.load(tiny_bundle.path, roles=["text_encoder"]) as model:
        reason = model.choices["text_encoder"].reason
    assert len(run) == races
    assert sorted(run) == run
    assert bool(choice_files()) is remembered
    assert ("not remembered, since" in reason) is not remembered


_LOADER = """
import sys, time
import mmedge
from mmedge.sessions import choice
measure = choice._measured
def measured(*arguments):
    print("measures", flush=True)
    time.sleep(0.5)
    return measure(*arguments)
choice._measured, choice._BUSY, choice._TIE = measured, 1e9, 1.0
print(mmedge.load(sys.argv[1], roles=["text_encoder"]).choices["text_encoder"].backend)
"""


def test_of_several_processes_one_measures_and_all_take_its_result(
    tiny_bundle: Bundle, several_backends: Path
) -> None:
    command = [sys.executable, "-c", _LOADER, str(tiny_bundle.path)]
    loaders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    lines = [line for loader in loaders for line in loader.communicate()[0].splitlines()]
    assert [loader.returncode for loader in loaders] == [0, 0, 0]
    assert lines.count("measures") == 1
    assert len(set(lines)) == 2  # and all three the same backend


@pytest.mark.parametrize(
    ("argument", "variable", "limit_s"),
    [(None, None, 300), (5, "7", 5), (None, "7.5", 7.5), (0, "7", None), (None, "0", None)],
)
def test_the_limit_comes_from_argument_variable_or_default(
    argument: float | None, variable: str | None, limit_s: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("MMEDGE_TIME_LIMIT_S")
    if variable is not None:
        monkeypatch.setenv("MMEDGE_TIME_LIMIT_S", variable)
    assert time_limit(argument) == limit_s


@pytest.mark.parametrize("stated", ["-1", "nan", "inf", "soon", ""])
def test_a_limit_that_is_none_is_refused(stated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMEDGE_TIME_LIMIT_S", stated)
    with pytest.raises(InputError, match=f"got '{stated}', expected seconds"):
        time_limit()
