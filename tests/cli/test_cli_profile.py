"""`mmedge profile`: the options, the reports, and exit codes to build gates on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import edit_manifest
from searches import small_search

from mmedge.bundle import Bundle
from mmedge.cli import main
from mmedge.errors import ProfileError
from mmedge.profiling import Profile

QUICK = ("--seconds", "0", "--warmup", "0", "--min-runs", "12", "--threads", "1")
BARE = (*QUICK, "--cold-starts", "0", "--no-stages")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as done:
        main(["profile", *arguments])
    captured = capsys.readouterr()
    return done.value.code, captured.out, captured.err


def test_the_table_fits_80_columns(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tiny_bundle.path.parent)
    code, out, err = run(
        capsys, "tiny.mmedge", *QUICK, "--cold-starts", "1", "--batch", "1,8",
        "--baseline", ":fp32", "--fail-if", "image_encoder.p95_ms > 1e9",
    )  # fmt: skip
    assert code == 0
    assert err.startswith("Plan: 12 measurements, 4 end-to-end calls with their stages, 4 cold st")
    assert max(map(len, out.splitlines())) <= 80
    lines = [line.replace(" ~", "").split() for line in out.splitlines()]
    row = next(line for line in lines if line[:3] == ["fp32", "1", "1"])
    assert row[3] == "100"  # n is printed
    assert row.count("-") == 1  # p99 is not: it needs 500
    for words in (
        "image_encoder", "text_encoder", "int8-dynamic", "95 % interval", "decode", "tokenize",
        "4 nodes on CPUExecutionProvider", "ok     image_encoder.int8-dynamic.b1.t1.p95_ms: got",
    ):  # fmt: skip
        assert words in out, words


@pytest.mark.parametrize(("load", "warned"), [(0.2, False), (7.5, True)])
def test_plan_and_load_are_reported_before_the_measurement(
    tiny_bundle: Bundle,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    load: float,
    warned: bool,
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise ProfileError("measuring begins")

    monkeypatch.setattr("mmedge.profiling.profiler.measure_cell", stop)
    monkeypatch.setattr("mmedge.profiling.machine.allowed_processors", lambda: (0, 1))
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    path = str(tiny_bundle.path)
    code, out, err = run(capsys, path, "--quick", "--warmup", "0.5", "--cold-starts", "3")
    assert (code, out) == (1, "")
    plan, *warnings, stopped = err.splitlines()
    # 2 roles of 2 variants: cells and calls of 0.5 s and as much warm-up, 3 processes each.
    assert plan.startswith(
        "Plan: 4 measurements, 4 end-to-end calls with their stages, 12 cold starts. "
        "Expected time: 32 s; longer for runs over 50 ms"
    )
    assert stopped == "Error: measuring begins"
    assert [line.split(":")[0] for line in warnings] == ["Warning"] * warned
    assert ("load average 7.50 on 2 CPUs" in err) is warned


def test_json_to_stdout_is_json_and_nothing_else(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(
        capsys, str(tiny_bundle.path), *BARE, "--role", "text_encoder", "--precision", "int8",
        "--sequence", "5,max", "--batch", "2", "--json", "-",
    )  # fmt: skip
    assert code == 0
    assert err.startswith("Plan: 2 measurements. Expected time: ")
    made = Profile.model_validate_json(out)
    assert [(c.variant, c.batch, c.threads, c.sequence) for c in made.cells] == [
        ("int8-dynamic", 2, 1, 5),
        ("int8-dynamic", 2, 1, 6),
    ]


def test_the_page_has_the_bundles_figures_of_the_measured_roles(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for role in ("image_encoder", "text_encoder"):
        steps = ("roles", role, "search")
        edit_manifest(tiny_bundle.path, *steps, value=small_search().model_dump(mode="json"))
    page = tmp_path / "p.html"
    done = run(
        capsys, str(tiny_bundle.path), *BARE, "--quiet", "--role", "text_encoder",
        "--html", str(page),
    )  # fmt: skip
    assert done == (0, "", "")
    text = page.read_text()
    assert "Search: text_encoder" in text
    assert "no backend here runs it" in text
    assert "Search: image_encoder" not in text


def test_quiet_writes_the_files_and_prints_nothing(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_json, page = tmp_path / "new" / "p.json", tmp_path / "p.html"
    done = run(
        capsys, str(tiny_bundle.path), *BARE, "--quiet", "--json", str(as_json),
        "--html", str(page),
    )  # fmt: skip
    assert done == (0, "", "")
    made = Profile.model_validate(json.loads(as_json.read_text()))
    assert made.bundle.name == "tiny"
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "p.html", "tiny.mmedge"]


def test_a_failed_gate_exits_with_1_and_names_figure_and_limit(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "p.json"
    code, _, err = run(
        capsys, str(tiny_bundle.path), *BARE, "--quiet", "--role", "image_encoder",
        "--json", str(report),
        "--fail-if", "image_encoder.int8-dynamic.p50_ms > 1e-9",
        "--fail-if", "image_encoder.p50_ms > 1e9",
    )  # fmt: skip
    assert code == 1
    made = Profile.model_validate_json(report.read_text())  # written all the same
    failed = [gate for gate in made.gates if gate.failed]
    assert [gate.metric for gate in failed] == ["image_encoder.int8-dynamic.b1.t1.p50_ms"]
    assert err == (
        "Error: Gate 'image_encoder.int8-dynamic.p50_ms > 1e-9' failed: "
        f"image_encoder.int8-dynamic.b1.t1.p50_ms is {failed[0].got:.6g}, which is > 1e-09.\n"
    )


def test_a_gate_on_a_percentile_gets_the_runs_that_it_needs(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(
        capsys, str(tiny_bundle.path), *BARE, "--role", "image_encoder", "--json", "-",
        "--fail-if", "image_encoder.p95_ms > 1e9",
    )  # fmt: skip
    assert code == 0
    assert {cell["latency"]["n"] for cell in json.loads(out)["cells"]} == {100}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--batch", "0"), 2, "--batch: got '0'"),
        (("--batch", "1,x"), 2, "--batch: got 'x'"),
        (("--batch", "1,,2"), 2, "--batch: got '1,,2'"),
        (("--threads", "0"), 2, "--threads: got '0'"),
        (("--sequence", "0"), 2, "--sequence: got '0'"),
        (("--sequence", "long"), 2, "--sequence: got 'long'"),
        (("--seconds", "-1"), 2, "--seconds: got -1.0"),
        (("--seconds", "nan"), 2, "--seconds: got nan"),
        (("--min-runs", "0"), 2, "--min-runs: got 0"),
        (("--cold-starts", "-1"), 2, "--cold-starts: got -1"),
        (("--precision", "int3"), 1, "no variant 'int3'"),
        (("--role", "unet"), 1, "no role 'unet'"),
        (("--device", "cuda"), 1, "cuda"),
        (("--backend", "abacus"), 1, "Unknown backend: got 'abacus'"),
        (("--sequence", "999"), 1, "at most 6 tokens"),
        (("--fail-if", "image_encoder.p95_ms"), 1, "Not a gate"),
        (("--fail-if", "image_encoder.p42_ms > 1"), 1, "no figure 'image_encoder.p42_ms'"),
        (("--fail-if", "image_encoder.ratio > 1"), 1, "no figure 'image_encoder.ratio'"),
        (("--baseline", "nowhere.onnx"), 1, "nowhere.onnx does not exist"),
    ],
)
def test_an_unmeasurable_metric_names_the_option(
    tiny_bundle: Bundle,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    got, out, err = run(capsys, str(tiny_bundle.path), *BARE, *arguments)
    assert (got, out) == (code, "")
    assert message in err


def test_a_folder_that_is_no_bundle_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, str(tmp_path / "none.mmedge"))
    assert (code, out) == (1, "")
    assert "none.mmedge: it does not exist" in err


@pytest.mark.parametrize("option", ["--json", "--html"])
@pytest.mark.parametrize("place", ["a folder", "below a file"])
def test_an_unwritable_report_is_an_error_before_the_measurement(
    tiny_bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    place: str,
) -> None:
    monkeypatch.setattr(
        "mmedge.profiling.profile", lambda *_, **__: pytest.fail("something was measured")
    )
    file = tmp_path / "file"
    file.touch()
    path = tmp_path if place == "a folder" else file / "p.html"
    code, out, err = run(capsys, str(tiny_bundle.path), *BARE, option, str(path))
    assert (code, out) == (1, "")
    assert f"Cannot write {path}" in err


def test_it_loads_nothing_heavy_for_its_help() -> None:
    code = (
        "import sys; sys.argv = ['mmedge', 'profile', '--help']\n"
        "from mmedge.cli import main\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        "heavy = ('numpy', 'onnxruntime', 'PIL', 'mmedge.profiling')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--fail-if" in done.stdout
