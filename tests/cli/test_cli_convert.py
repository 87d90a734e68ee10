"""`mmedge convert` as a user meets it."""

from __future__ import annotations

import importlib.util
import json
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.machinery import ModuleSpec
from io import StringIO
from pathlib import Path

import pytest

from mmedge.bundle import open_bundle
from mmedge.bundle.quality import Figure
from mmedge.bundle.tuning import Speed
from mmedge.cli import main
from mmedge.cli.convert import verdict_line
from mmedge.converters import request
from mmedge.converters.config import ConvertConfig
from mmedge.converters.progress import Progress, ProgressEvent
from mmedge.converters.report import ConversionReport, RoleDefault, VariantReport


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    assert isinstance(done.value.code, int)
    return done.value.code


@pytest.fixture(scope="module")
def converted(
    tmp_path_factory: pytest.TempPathFactory, siglip_folder: Path, evaluation_folder: Path
) -> tuple[Path, str]:
    """A converted bundle, and what the command printed."""
    out = tmp_path_factory.mktemp("cli") / "siglip.mmedge"
    options = ("--precision", "int8", "--evaluate", evaluation_folder, "--json")
    with redirect_stdout(StringIO()) as stdout:
        assert run("convert", siglip_folder, "-o", out, *options) == 0
    return out, stdout.getvalue()


@pytest.fixture
def configs(converted: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> list[ConvertConfig]:
    """Make the command report the converted bundle without converting; the calls it made."""
    manifest = open_bundle(converted[0]).manifest
    calls: list[ConvertConfig] = []

    def convert(config: ConvertConfig, progress: Progress | None = None) -> ConversionReport:
        calls.append(config)
        if progress is not None:
            progress(ProgressEvent("Export image_encoder", 0, 1))
            progress(ProgressEvent("Calibrate image_encoder", 7, 40))
        return ConversionReport(
            path=config.out,
            family="clip",
            variants=tuple(
                VariantReport(name, v.name, v.size_bytes, v.parity, v.quality, 1.5)
                for name, role in manifest.roles.items()
                for v in role.variants
            ),
            defaults={
                "image_encoder": RoleDefault(
                    variant="int8-dynamic",
                    size_bytes=89_400_000,
                    fp32_size_bytes=352_000_000,
                    speed=Speed(
                        backend="onnxruntime",
                        latency_ms=32.0,
                        ratio=Figure(value=0.32, low=0.31, high=0.33),
                    ),
                    metric="recall@1",
                    drop=Figure(value=0.002, low=-0.004, high=0.009),
                    within=True,
                ),
                "text_encoder": RoleDefault(
                    variant="fp32",
                    size_bytes=254_000_000,
                    fp32_size_bytes=254_000_000,
                    speed=None,
                    metric="recall@1",
                    drop=Figure(value=0.0, low=0.0, high=0.0),
                    within=True,
                ),
            },
            notes=("a note [with] brackets",),
            calibration_samples=0,
            duration_s=12.0,
            skipped=tuple(f"image {index}" for index in range(12)),
        )

    monkeypatch.setattr(request, "convert", convert)
    return calls


def test_quiet_prints_nothing(
    configs: list[ConvertConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", "a/b", "-o", "x.mmedge", "-q", "--skip-bad", "--seed", "3") == 0
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    (config,) = configs
    assert config == ConvertConfig("a/b", Path("x.mmedge"), ("fp32", "int8"), skip_bad=True, seed=3)


VERDICT = (
    "Default: image_encoder int8-dynamic (89.4 MB, fp32 352 MB; 3.12x as fast as fp32; recall@1 "
    "loss 0.002 -.004\N{EN DASH}.009), text_encoder fp32 (254 MB)."
)


def test_the_summary_is_a_line_a_variant_and_a_verdict(
    configs: list[ConvertConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", "a/b", "-o", "x.mmedge", "--precision", "int8, fp16") == 0
    assert configs[0].precisions == ("int8", "fp16")
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    (head,) = [line.split() for line in lines if line.startswith(" variant ")]
    assert head == ["variant", "size", "parity", "cosine", "time", "s", "recall@1", "loss"]
    rows = [line.split() for line in lines if line.startswith("   ") and line.strip()]
    assert [row[:2] for row in rows] == [["int8-dynamic", "*"], ["int8-dynamic", rows[1][1]]]
    (legend,) = [line for line in lines if line.startswith("*: loaded by default.")]
    assert max(len(line.rstrip()) for line in lines[: lines.index(legend)]) <= 80
    assert "cosine: mean with fp32, on held-out: 24 images, held-out: 24 captions." in legend
    assert "cosine-p1" not in captured.out
    assert "Note: a note [with] brackets" in lines
    assert "Skipped: image 9" in lines
    assert "... and 2 more." in lines
    assert lines[-2:] == ["x.mmedge written in 12 s.", VERDICT]
    assert captured.err.startswith("\N{CHECK MARK} Export image_encoder  ")


def test_a_timing_that_other_work_disturbed_shows_its_interval(
    configs: list[ConvertConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    report = request.convert(ConvertConfig("a/b", Path("x.mmedge")))
    chosen = report.defaults["image_encoder"]
    assert chosen.speed is not None
    wide = chosen.speed.model_copy(update={"ratio": Figure(value=0.04, low=0.02, high=0.8)})
    noisy = replace(report, defaults={"image_encoder": replace(chosen, speed=wide)})
    assert "25.00x as fast as fp32, but busy machine: 1.25 to 50.00;" in verdict_line(noisy)


def test_verbose_prints_every_metric(
    configs: list[ConvertConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", "a/b", "-o", "x.mmedge", "--verbose") == 0
    lines = capsys.readouterr().out.splitlines()
    for role, data in (("image_encoder", "images"), ("text_encoder", "captions")):
        assert any(line.endswith(f"measured on held-out: 24 {data}") for line in lines)
        start = next(
            i for i, line in enumerate(lines) if line.split()[:2] == [role, "int8-dynamic"]
        )
        labels = [line.split()[0] for line in lines[start:] if line.strip()]
        assert labels.index("cosine-p1") < labels.index("recall@1") < labels.index("zero-shot")
    assert lines[-1] == VERDICT


@pytest.mark.parametrize(
    ("options", "precisions"),
    [
        ((), ("fp32", "int8")),
        (("--max-drop", "0.01"), ("auto",)),
        (("--metric", "recall@1"), ("auto",)),
        (("--objective", "latency"), ("auto",)),
        (("--precision", "fp32, text_encoder:fp16"), ("fp32", "text_encoder:fp16")),
    ],
)
def test_a_budget_asks_for_a_search(
    configs: list[ConvertConfig], options: tuple[str, ...], precisions: tuple[str, ...]
) -> None:
    assert run("convert", "a/b", "-o", "x.mmedge", "-q", *options) == 0
    assert configs[0].precisions == precisions
    assert (configs[0].max_drop, configs[0].objective) == (0.01, "latency")


def test_the_jpeg_draft_is_passed_on(configs: list[ConvertConfig]) -> None:
    assert run("convert", "a/b", "-o", "x.mmedge", "-q", "--jpeg-draft", "auto") == 0
    assert configs[0].jpeg_draft == "auto"


def test_the_default_and_the_targets_are_passed_on(configs: list[ConvertConfig]) -> None:
    options = ("--precision", "fp32", "--default", "fp32", "--target", "cpu, tensorrt")
    assert run("convert", "a/b", "-o", "x.mmedge", "-q", *options) == 0
    assert (configs[0].default, configs[0].targets) == ("fp32", ("cpu", "tensorrt"))


def test_a_budget_beside_named_precisions_is_refused_and_not_forgotten(
    configs: list[ConvertConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--precision", "int8", "--max-drop", "0.01", "--objective", "latency")
    assert run("convert", "a/b", "-o", "x.mmedge", *options) == 1
    assert capsys.readouterr().err.startswith("Error: --max-drop, --objective: for --precision")
    assert configs == []


def test_a_page_that_would_be_empty_is_refused_before_any_work(
    configs: list[ConvertConfig], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--precision", "fp32", "--html", tmp_path / "x.html")
    assert run("convert", "a/b", "-o", "x.mmedge", *options) == 1
    assert "fp32 alone has neither" in capsys.readouterr().err
    assert configs == []


def test_json_is_json_and_nothing_else(converted: tuple[Path, str]) -> None:
    out, printed = converted
    report = json.loads(printed)
    assert report["bundle"] == str(out)
    assert [line["role"] for line in report["variants"]] == ["image_encoder", "text_encoder"]
    for line in report["variants"]:
        assert line["variant"] == "int8-dynamic"
        figures, drops = line["quality"]["figures"], line["quality"]["drops"]
        mean = figures["cosine_mean"]
        assert 0.9 < mean["low"] <= mean["value"] <= mean["high"] < 1
        assert {"text_to_image_recall@1", "recall@1", "zero_shot_accuracy"} < set(drops)
        assert set(drops) < set(figures)
        assert line["parity"]["samples"] > 1


def test_an_existing_bundle_is_left_alone(
    converted: tuple[Path, str], siglip_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", siglip_folder, "-o", converted[0], "--json") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--overwrite" in captured.err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("nowhere/at/all",), "No such folder: nowhere/at/all"),
        (("SOURCE", "--precision", "int3"), "Unknown precision: got 'int3'"),
        (("SOURCE", "--precision", "int8-static"), "needs calibration data"),
        (("SOURCE", "--target", "tensorrt"), "needs calibration data"),
        (("SOURCE", "--calibration", "nowhere"), "No such folder or file: nowhere"),
        (("SOURCE", "--evaluate", "nowhere"), "No such folder or file: nowhere"),
    ],
)
def test_a_wrong_call_is_one_line_and_writes_nothing(
    options: tuple[str, ...],
    reason: str,
    clip_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(clip_folder) if word == "SOURCE" else word for word in options]
    assert run("convert", *words, "-o", tmp_path / "out" / "x.mmedge", "-q") == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert reason in error
    assert error.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_name_without_the_suffix_is_refused(
    clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ((), ("-q",)):
        assert run("convert", clip_folder, "-o", tmp_path / "clip", *options) == 1
        error = capsys.readouterr().err
        assert error.startswith("Error: ")
        assert "must end in '.mmedge'" in error


def test_without_the_extra_one_command_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec

    def without_torch(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in {"torch", "optimum"} else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_torch)
    assert run("convert", "anything", "-o", tmp_path / "x.mmedge") == 1
    error = capsys.readouterr().err
    assert "torch, optimum" in error
    assert 'pip install "mmedge[convert,cpu]"' in error
    assert error.count("\n") == 1
