"""Progress on stderr."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mmedge.cli import progress
from mmedge.cli.progress import Steps


def work(steps: Steps, *, candidates: int) -> None:
    for number in range(candidates):
        steps.step(f"Try image_encoder candidate-{number}")
        for reading in range(2):
            for done in range(1, 4):
                steps.part("Calibrate [image_encoder]", done + 3 * reading, 6)
        steps.part(f"Measure image_encoder candidate-{number}", 7, 500)


def test_a_pipe_gets_a_line_a_stage_and_nothing_that_moves(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Steps() as steps:
        work(steps, candidates=30)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rsplit("  ", 1)[0] for line in lines] == [
        f"\N{CHECK MARK} Try image_encoder candidate-{number}" for number in range(30)
    ]
    assert all(line.endswith(" s") for line in lines)


def test_failures_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        with Steps() as steps:
            work(steps, candidates=2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    done, failed = capsys.readouterr().err.splitlines()
    assert done.startswith("\N{CHECK MARK} Try image_encoder candidate-0 ")
    assert failed.startswith("\N{BALLOT X} Try image_encoder candidate-1 ")


def test_no_report_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="before any stage"), Steps():
        raise ValueError("before any stage")
    assert capsys.readouterr().err == ""


def test_a_small_terminal_shows_the_running_stage_with_its_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.StringIO()

    def console(*, stderr: bool, highlight: bool) -> Console:
        assert stderr
        return Console(
            file=written,
            force_terminal=True,
            width=80,
            height=10,
            highlight=highlight,
            color_system=None,
        )

    monkeypatch.setattr(progress, "Console", console)
    name = "image_encoder int8-static-mse-equalized-corrected"
    with Steps() as steps:
        work(steps, candidates=12)
        steps.step(f"Try {name}")
        steps.part(f"Measure {name}", 123, 500)
        steps._bar.refresh()
    shown = written.getvalue()
    assert f"Measure {name} 123/500 0:00:0" in shown
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert f"\N{CHECK MARK} Try {name}" in shown


def test_a_step_that_is_named_again_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with Steps() as steps:
        steps.step("Export")
        steps.step("Export")
        steps.say("a note \x1b[2J")
    note, done = capsys.readouterr().err.splitlines()
    assert note == "a note \\x1b[2J"
    assert done.startswith("\N{CHECK MARK} Export ")


@pytest.mark.parametrize("options", [{"shown": False}, {"live": False}])
def test_a_hidden_or_a_benchmark_leaves_no_line(
    capsys: pytest.CaptureFixture[str], options: dict[str, bool]
) -> None:
    with Steps(**options) as steps:
        work(steps, candidates=2)
    assert capsys.readouterr().err == ""
