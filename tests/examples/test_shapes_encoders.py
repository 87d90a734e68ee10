"""evaluate_encoders.py: what a row must show, and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import evaluate_encoders
import pytest
from encoder_rows import Row, caught

from mmedge.bundle.quality import Figure, Quality
from mmedge.converters.report import ConversionReport, RoleDefault, VariantReport


def row(fp32: float, int8: float, **more: Any) -> Row:
    return Row("model", "map", "int8-static", 8, fp32, int8, **{"goal": 0.8, **more})


@pytest.mark.parametrize(
    ("made", "passed"),
    [
        (row(0.9, 0.895), True),
        (row(0.9, 0.92), True),
        (row(0.9, 0.88), False),  # loses too much
        (row(0.79, 0.81), False),  # fp32 misses the goal
        (row(0.804, 0.796), False),  # int8 misses it
        (row(0.1, 0.0, goal=None), None),
        (row(0.9, 0.3, control=True, caught=True), True),
        (row(0.9, 0.3, control=True), False),  # went unnoticed
        (row(0.9, 0.899, control=True, caught=True), False),  # no negative control at all
    ],
)
def test_a_row_passes(made: Row, passed: bool | None) -> None:
    assert made.passed is passed
    assert made.to_json()["passed"] is passed


def report(**roles: tuple[float, str]) -> ConversionReport:
    """Of each role, what int8-static loses there, and the default."""
    lines, defaults = [], {}
    for role, (loss, default) in roles.items():
        for variant, lost in (("fp32", 0.0), ("int8-static", loss)):
            figure = Figure(value=lost, low=lost, high=lost)
            quality = Quality(figures={"map": figure}, drops={"map": figure}, samples=1, data="x")
            lines.append(VariantReport(role, variant, 1, None, quality, 0.0))
        defaults[role] = RoleDefault(default, 1, 1, None, "map", figure, within=True)
    return ConversionReport(Path(), "owlvit", tuple(lines), defaults, (), 0, 0.0)


def test_a_loss_is_caught_if_found_and_not_the_default_there() -> None:
    assert caught(report(image_encoder=(0.3, "fp32")), "int8-static")
    assert not caught(report(image_encoder=(0.3, "int8-static")), "int8-static")
    assert not caught(report(image_encoder=(0.005, "fp32")), "int8-static")
    good = (0.0, "int8-static")
    assert caught(report(text_encoder=good, image_encoder=(0.3, "fp32")), "int8-static")
    assert not caught(report(text_encoder=good, image_encoder=(0.3, "int8-static")), "int8-static")


@pytest.mark.parametrize(("int8", "code"), [(0.9, 0), (0.5, 1)])
def test_the_command_line(
    int8: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def rows(seed: int, count: int, work: Path) -> list[Row]:
        seen.append((seed, count, work.name))
        return [row(0.9, int8), row(0.1, 0.1, goal=None)]

    monkeypatch.setattr(evaluate_encoders, "MODELS", {"one": rows, "two": rows})
    assert evaluate_encoders.main(["--seed", "3", "--count", "8", "--json"]) == code
    printed = json.loads(capsys.readouterr().out)
    assert (printed["split"], printed["seed"]) == ("test", 3)
    assert [each["int8"] for each in printed["rows"]] == [int8, 0.1] * 2
    assert seen == [(3, 8, "one"), (3, 8, "two")]
    assert evaluate_encoders.main(["--models", "two"]) == code
    assert "int8-static" in capsys.readouterr().out
    assert seen[2:] == [(0, 500, "two")]
