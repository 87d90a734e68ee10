"""A search from source to bundle with tiny models: what it leaves, and what it survives."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from converted import write_images
from crashes import crash_on

import mmedge
from mmedge.bundle import load_nodes, open_bundle, verify_files
from mmedge.bundle.quality import Quality
from mmedge.bundle.tuning import SearchRecord
from mmedge.cli import main
from mmedge.converters.config import ConvertConfig
from mmedge.converters.data.checks import load_data
from mmedge.converters.evaluation.base import Evaluation
from mmedge.converters.methods.recipes import Recipe
from mmedge.converters.report import ConversionReport
from mmedge.converters.request import convert, read_data
from mmedge.converters.tuning.role import RoleSearch
from mmedge.converters.variants.builder import BuiltVariant, VariantBuilder
from mmedge.converters.variants.describe import BuiltRole, judge
from mmedge.errors import CalibrationError, ConversionError, StorageError

LADDER = ("fp16", "int8-dynamic", "int8-static")
ROLES = ("image_encoder", "text_encoder")


@pytest.fixture(scope="module")
def asked(clip_folder: Path, photo_folder: Path, evaluation_folder: Path) -> ConvertConfig:
    """By size, whose figures do not depend on the machine's load; to nowhere."""
    return ConvertConfig(
        str(clip_folder),
        Path("nowhere"),
        ("auto",),
        calibration=photo_folder,
        evaluate=evaluation_folder,
        metric="cosine-mean",
        objective="size",
        max_drop=0.02,
    )


@pytest.fixture
def config(asked: ConvertConfig, tmp_path: Path) -> ConvertConfig:
    return replace(asked, out=tmp_path / "out" / "clip.mmedge")


@pytest.fixture(autouse=True, scope="module")
def _short_ladder() -> Iterator[None]:
    """Three candidates a role, whatever comes of them: the other steps are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoleSearch, "_ladder", lambda self, _: self._known(LADDER))
        yield


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The variants that were built, as they are."""
    names: list[str] = []
    build = VariantBuilder.build

    def noted(self: VariantBuilder, recipe: Recipe) -> BuiltVariant:
        names.append(f"{self._role}/{recipe.variant}")
        return build(self, recipe)

    monkeypatch.setattr(VariantBuilder, "build", noted)
    return names


def work_folder(config: ConvertConfig) -> Path:
    return config.out.with_name(f".{config.out.name}.search")


@dataclass(frozen=True)
class Searched:
    report: ConversionReport
    path: Path
    judged: list[str]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, asked: ConvertConfig) -> Searched:
    """A search with --explain that ends well."""
    out = tmp_path_factory.mktemp("auto") / "clip.mmedge"
    judged: list[str] = []

    def noted(
        name: str,
        variant: BuiltVariant,
        roles: Mapping[str, BuiltRole],
        evaluation: Evaluation,
    ) -> Quality | None:
        judged.append(variant.recipe.variant)
        return judge(name, variant, roles, evaluation)

    with pytest.MonkeyPatch.context() as patch:
        for place in ("tuning.joint", "pipeline"):
            patch.setattr(f"mmedge.converters.{place}.judge", noted)
        return Searched(convert(replace(asked, out=out, explain=True)), out, judged)


def test_the_bundle_holds_the_front_and_the_record_of_all(searched: Searched) -> None:
    bundle = open_bundle(searched.path)
    verify_files(bundle)
    assert set(searched.report.searched) == set(bundle.manifest.roles) == set(ROLES)
    for role in bundle.manifest.roles.values():
        record = role.search
        assert record is not None
        assert [one.variant for one in record.candidates] == ["fp32", *LADDER]
        assert (record.metric, record.max_drop, record.objective) == ("cosine-mean", 0.02, "size")
        assert record.data.startswith("held-out: 24")
        kept = {one.variant for one in record.candidates if one.verdict != "dropped"}
        assert {variant.name for variant in role.variants} == kept
        (chosen,) = [one.variant for one in record.candidates if one.verdict == "chosen"]
        assert role.default == chosen != "fp32"
        smallest = min(role.variants, key=lambda variant: variant.size_bytes)
        assert role.variants[0].size_bytes > smallest.size_bytes


def test_the_manifest_holds_what_the_search_measured_once(searched: Searched) -> None:
    assert sorted(searched.judged) == sorted(("fp32", *LADDER) * len(ROLES))
    for role in open_bundle(searched.path).manifest.roles.values():
        assert role.search is not None
        measured = {one.variant: one.cosine_mean for one in role.search.candidates}
        for variant in role.variants[1:]:
            assert variant.quality is not None
            assert variant.quality.value("cosine_mean") == measured[variant.name]


def test_only_the_bundle_is_left(searched: Searched) -> None:
    assert [path.name for path in searched.path.parent.iterdir()] == ["clip.mmedge"]
    files = [path for path in searched.path.rglob("*") if path.is_file()]
    assert {path.stat().st_nlink for path in files} == {1}
    assert not [path for path in files if ".trial." in path.name or path.name.startswith(".")]


def test_load_takes_what_was_chosen(searched: Searched) -> None:
    roles = open_bundle(searched.path).manifest.roles
    with mmedge.load(searched.path) as clip:
        assert {n: v.name for n, v in clip.variants.items()} == {
            name: role.default for name, role in roles.items()
        }
        assert clip.encode_text(["a red circle"]).shape == (1, 16)


def test_explain_measures_every_quantized_layer(searched: Searched) -> None:
    bundle = open_bundle(searched.path)
    seen = 0
    for role in bundle.manifest.roles.values():
        for variant in role.variants:
            if variant.nodes is None or variant.precision.value != "int8":
                continue
            table = load_nodes(searched.path / variant.nodes)
            assert table.samples > 0
            for node in table.nodes:
                assert (node.output_error is not None) is not node.reason, node
                seen += 1
            left = {node.op_type: node.reason for node in table.nodes if node.reason}
            assert left
            assert all(left.values())
    assert seen


def test_few_samples_are_reported(searched: Searched) -> None:
    assert any("measured on 24 samples" in note for note in searched.report.notes)


def test_an_unreachable_budget_names_the_closest_and_keeps_the_trials(
    config: ConvertConfig, made: list[str]
) -> None:
    strict = replace(config, max_drop=0.0)
    with pytest.raises(ConversionError) as refused:
        convert(strict)
    message = str(refused.value)
    assert message.count("\n") == 0
    for role in ROLES:
        assert re.search(rf"{role}: fp16 loses \d\.\de-0\d", message)
    assert "--max-drop" in message
    assert made == [*(f"{r}/fp32" for r in ROLES), *(f"{r}/{n}" for r in ROLES for n in LADDER)]
    assert [path.name for path in config.out.parent.iterdir()] == [work_folder(config).name]
    made.clear()
    report = convert(config)  # nothing but the choice is left to do
    assert made == []
    assert {line.variant for line in report.variants} > {"fp32"}
    assert [path.name for path in config.out.parent.iterdir()] == ["clip.mmedge"]


_AS_HERE = """
from mmedge.converters.tuning.role import RoleSearch
RoleSearch._ladder = lambda self, _: self._known({ladder!r})
from mmedge.runtimes.openvino import BACKEND as openvino
openvino.engine_version = lambda: None
from mmedge.cli import main
main()
"""


def start(config: ConvertConfig, *options: str) -> subprocess.Popen[bytes]:
    """Start the command on the same short ladder."""
    command = ["convert", config.source, "-o", str(config.out), "--precision", "auto", "-q"]
    command += ["--calibration", str(config.calibration), "--evaluate", str(config.evaluate)]
    command += ["--metric", str(config.metric), "--objective", config.objective]
    command += ["--max-drop", str(config.max_drop), *options]
    return subprocess.Popen(
        [sys.executable, "-c", _AS_HERE.format(ladder=LADDER), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(os.environ),
    )


def finished(config: ConvertConfig) -> set[str]:
    names = work_folder(config).glob("*/*.trial.json")
    return {f"{p.parent.name}/{p.name.removesuffix('.trial.json')}" for p in names}


def wait_for(config: ConvertConfig, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while len(finished(config)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_end_in_the_middle_keeps_finished_candidates_and_the_older_bundle(
    config: ConvertConfig, searched: Searched, made: list[str], tmp_path: Path
) -> None:
    # Both at once: most of their time goes into starting up.
    ends = {
        how: replace(config, out=tmp_path / how.name / "clip.mmedge")
        for how in (signal.SIGKILL, signal.SIGINT)
    }
    for one in ends.values():
        shutil.copytree(searched.path, one.out)
    before = content(searched.path)
    processes = {how: start(one, "--overwrite") for how, one in ends.items()}
    for how, process in processes.items():
        wait_for(ends[how], 3, process)
        process.send_signal(how)
    for how, process in processes.items():
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == (-9 if how is signal.SIGKILL else 130), stderr.decode()
        assert b"Traceback" not in stderr
        assert content(ends[how].out) == before
        if how is signal.SIGINT:
            assert b"Finished candidates are stored in " in stderr
            assert b"run the same command to resume." in stderr
    killed = ends[signal.SIGKILL]
    done = {signal.SIGKILL: finished(killed), signal.SIGINT: finished(ends[signal.SIGINT])}
    assert all(len(names) >= 3 for names in done.values())
    convert(replace(killed, overwrite=True))
    # fp32 of the second role is made at the start and is a candidate only when its turn comes.
    assert {name for name in made if not name.endswith("/fp32")}.isdisjoint(done[signal.SIGKILL])
    every = {f"{role}/{name}" for role in ROLES for name in ("fp32", *LADDER)}
    assert set(made) | done[signal.SIGKILL] == every
    assert [path.name for path in killed.out.parent.iterdir()] == ["clip.mmedge"]
    verify_files(open_bundle(killed.out))


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_disk_that_is_full_when_the_bundle_is_written_costs_no_candidate(
    config: ConvertConfig, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mmedge.converters.tuning.joint._link", write)
        with pytest.raises(StorageError, match="disk is full"):
            convert(config)
    assert [path.name for path in config.out.parent.iterdir()] == [work_folder(config).name]
    made.clear()
    convert(config)
    assert made == []


def test_a_disk_that_is_full_while_candidates_are_made_is_one_error(
    config: ConvertConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mmedge.converters.variants.builder.quantize", write)
        with pytest.raises(StorageError, match="disk is full"):
            convert(config)
    assert not config.out.exists()
    assert finished(config) == {"image_encoder/fp32"}


def test_a_crash_of_the_engine_costs_a_candidate_and_not_the_search(
    config: ConvertConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder = (*LADDER, "int8-dynamic-keep2")
    monkeypatch.setattr(RoleSearch, "_ladder", lambda self, _: self._known(ladder))
    # Written only to be measured: fp16 emulated, and one layer at a time for keep2.
    crash_on(".graph.*", tmp_path, monkeypatch)
    report = convert(config)
    verify_files(open_bundle(config.out))
    for role in report.searched.values():
        assert role.search is not None
        reasons = {one.variant: one.reason for one in role.search.candidates}
        assert list(reasons) == ["fp32", *ladder]
        crashed = {name for name, why in reasons.items() if "crashed (SIGSEGV)" in why}
        assert crashed == {"fp16", "int8-dynamic-keep2"}
        assert role.default in LADDER


def test_without_data_the_search_reports_skipped_methods(
    config: ConvertConfig, tmp_path: Path
) -> None:
    alone = replace(config, calibration=None, evaluate=None, metric=None)
    report = convert(alone)
    notes = "\n".join(report.notes)
    assert "measured on synthetic" in notes
    assert "static int8, were not tried. Pass --calibration FOLDER." in notes
    record = report.searched["image_encoder"].search
    assert isinstance(record, SearchRecord)
    assert record.metric == "cosine-p1"
    assert "int8-static" not in {one.variant for one in record.candidates}


def test_images_without_captions_calibrate_one_role(config: ConvertConfig, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 33, 9)
    report = convert(replace(config, calibration=images, explain=True))
    (note,) = [one for one in report.notes if one.startswith("text_encoder: their")]
    assert note.endswith("images has no captions.")
    tried = {
        name: {one.variant for one in role.search.candidates}
        for name, role in report.searched.items()
        if role.search is not None
    }
    assert "int8-static" in tried["image_encoder"]
    assert "int8-static" not in tried["text_encoder"]


@pytest.mark.parametrize("metric", ["recall@1", "zero-shot"])
def test_a_metric_that_the_data_lacks_is_refused_before_any_work(
    metric: str, config: ConvertConfig, tmp_path: Path, made: list[str]
) -> None:
    images = write_images(tmp_path / "images", 3, 9)
    with pytest.raises(CalibrationError, match=f"'{metric}' cannot be measured on images"):
        convert(replace(config, evaluate=images, metric=metric))
    assert made == []
    assert list(config.out.parent.iterdir()) == []


def test_energy_without_a_counter_is_refused_before_any_work(
    config: ConvertConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmedge.converters.request.unavailable_reason", lambda: "No counter here.")
    nowhere = replace(config, source="nowhere/at/all", objective="energy")
    with pytest.raises(ConversionError, match=r"Objective energy: No counter here\."):
        convert(nowhere)
    assert not config.out.parent.exists()


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    assert isinstance(done.value.code, int)
    return done.value.code


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--precision", "auto,fp16"), "auto cannot be combined: got 'auto,fp16'"),
        (("--precision", "auto", "--max-drop", "1.5"), "--max-drop: got 1.5"),
        (("--precision", "auto", "--max-drop", "-0.1"), "--max-drop: got -0.1"),
        (("--precision", "auto", "--max-drop", "nan"), "--max-drop: got nan"),
        (("--precision", "auto", "--metric", "recal@1"), "Did you mean recall@1"),
        (("--precision", "auto", "--objective", "latncy"), "Did you mean latency"),
        (("--precision", "auto", "--target", "tensorrt"), "runs no TensorRT graphs"),
        (("--precision", "auto", "--explain"), "--explain measures each layer on calibration"),
        (("--precision", "int8-static-mse-entropy"), "exclude each other"),
        (("--precision", "int4-g33"), "group_size: got 33"),
        (("--precision", "int8-static-mse"), "needs calibration data"),
        (("--precision", "auto", "--calibration", "EMPTY"), "holds no images, sounds or videos"),
        (("--precision", "auto", "--calibration", "SOUNDS"), "not a WAV file"),
        (("--precision", "auto", "--calibration", "CORRUPT"), "Remove the file"),
        (("--precision", "auto", "--calibration", "ALIKE"), "all 3 samples are the same"),
        (("--precision", "auto", "--calibration", "CAPTIONS"), "expected an object"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    options: tuple[str, ...],
    fault: str,
    clip_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = {name: tmp_path / name.lower() for name in ("EMPTY", "SOUNDS", "ALIKE", "CORRUPT")}
    data["CAPTIONS"] = tmp_path / "captions"
    for folder in data.values():
        folder.mkdir()
    (data["SOUNDS"] / "a.wav").write_bytes(b"RIFF....WAVEfmt ")
    (data["SOUNDS"] / "b.txt").write_text("a red circle")
    (data["CORRUPT"] / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n, and then nothing")
    one = write_images(tmp_path / "one", 1, 3) / "000.png"
    for index in range(3):
        shutil.copy(one, data["ALIKE"] / f"{index}.png")
    (data["CAPTIONS"] / "captions.jsonl").write_text(json.dumps({"text": "a red circle"}))
    words = [str(data.get(word, word)) for word in options]
    out = tmp_path / "out" / "x.mmedge"
    assert run("convert", clip_folder, "-o", out, "-q", *words) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert fault in error
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def test_few_calibration_images_are_reported_with_their_number(tmp_path: Path) -> None:
    few = write_images(tmp_path / "few", 5, 9, captions=True)
    asked = ConvertConfig("m", tmp_path / "x.mmedge", ("auto",), calibration=few)
    (note,) = load_data(asked, read_data(asked), lambda _: None).notes
    assert note.startswith("Only 5 different calibration samples: 32 or more")


def test_recipes_by_name_from_the_command_line(
    clip_folder: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("int8-static-minmax-keep2", "int4-g16-hqq", "int8-dynamic-equalized", "bf16")
    options = ("--precision", ",".join(names), "--calibration", photo_folder, "--json")
    out = tmp_path / "x.mmedge"
    assert run("convert", clip_folder, "-o", out, *options) == 0
    lines = json.loads(capsys.readouterr().out)["variants"]
    expected = {"int8-static-keep2", "int4-g16-hqq", "int8-dynamic-equalized", "bf16"}
    assert {line["variant"] for line in lines} == expected
    bundle = open_bundle(out)
    for role in bundle.manifest.roles.values():
        kept = next(v for v in role.variants if v.name == "int8-static-keep2")
        names_kept = kept.recipe["keep"]
        assert isinstance(names_kept, list)
        assert len(names_kept) == 2
        assert kept.nodes is not None
        nodes = {node.name: node for node in load_nodes(out / kept.nodes).nodes}
        for name in names_kept:
            assert nodes[name].precision == "float32"
            assert nodes[name].reason == "among the most sensitive layers"
