"""`inspect` on a search: in a terminal, in a pipe, as a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from bundles import add_nodes, edit_manifest
from inspecting import printed, run
from searches import candidate, figure, large_search, nothing_gained, search, small_search

from mmedge.bundle import Bundle, NodeEntry, NodeTable
from mmedge.bundle.tuning import SearchRecord
from mmedge.cli.tables import search_lines
from mmedge.reports.pareto import OUTCOMES

TO = "\N{EN DASH}"
WHY = "within the budget, 0.31 of fp32's time, 0.25 of its size"
JOINT = (
    "Chosen: int8-dynamic. 1 of 3 dropped, in 25 s. With every role as chosen, the loss of "
    f"recall@1 is 0.004 -.003{TO}.011."
)
LONGEST = "int8-static-mse-equalized-corrected-keep8"


def report(bundle: Bundle, record: SearchRecord, role: str = "image_encoder") -> Bundle:
    value = record.model_dump(mode="json")
    edit_manifest(bundle.path, "roles", role, "search", value=value)
    return bundle


def squeezed(lines: Sequence[str]) -> list[str]:
    return [re.sub(r"\s+", " ", line).strip() for line in lines]


def lines_at(width: int, record: SearchRecord) -> list[str]:
    return [line for line, _ in search_lines(record, width)]


def test_in_a_pipe_a_candidate_is_one_line_with_its_reason(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, str(report(tiny_bundle, small_search()).path))
    lines = squeezed(text.splitlines())
    for expected in (
        "Search: image_encoder",
        "objective: latency; accuracy budget: 0.01 of recall@1",
        "quality data: test: 300 images (n = 300)",
        "measured on: Example CPU @ 2.60GHz, 2 threads",
        "variant result loss size ms time/fp32 backend reason",
        f"int8-dynamic chosen 0.002 -.004{TO}.009 89 MB 32.2 0.31 .30{TO}.32 openvino {WHY}",
        "float8 dropped - - - - - no backend here runs it",
        JOINT,
    ):
        assert expected in lines, expected
    assert "Search: text_encoder" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [40, 60, 80, 100, 132, 200])
@pytest.mark.parametrize("record", [large_search(), small_search(), nothing_gained()])
def test_every_width_holds_all_of_it(width: int, record: SearchRecord) -> None:
    lines = lines_at(width, record)
    assert max(map(len, lines)) <= width
    message = "".join("".join(lines).split())
    for one in record.candidates:
        assert one.reason.replace(" ", "") in message
        assert f"{one.variant}{OUTCOMES[one.verdict]}".replace(" ", "") in message
        if one.speed is not None:
            assert f"{one.speed.ratio.value:.2f}" in message
    assert "…" not in message


def test_eighty_columns_keep_the_figures_of_a_candidate_on_a_line() -> None:
    lines = lines_at(80, large_search())
    at = lines.index(LONGEST)
    figures = f"chosen -0.002 -.011{TO}.008 104 MB 33.4 0.32 .31{TO}.33 openvino"
    assert squeezed(lines)[at + 1] == figures
    assert lines[at + 2] == "      within the budget, 0.32 of fp32's time, 0.30 of its size"


def test_chosen_rows_stand_out_and_dropped_rows_are_dimmed() -> None:
    styles = {line.split()[0]: style for line, style in search_lines(small_search(), 200)}
    assert (styles["int8-dynamic"], styles["float8"], styles["fp32"]) == ("bold", "dim", "")


def test_energy_has_a_column_where_it_was_measured() -> None:
    assert not any("mJ" in line for line in lines_at(200, small_search()))
    first = candidate("fp32", "chosen", "fastest", ms=100, energy_mj=2345.6)
    other = candidate("int8", ms=30)
    record = search(first, other, objective="energy", energy_counter="RAPL: package-0")
    lines = squeezed(lines_at(200, record))
    assert "energy counter: RAPL: package-0, including the idle machine" in lines
    assert "objective: energy; accuracy budget: 0.01 of recall@1" in lines
    # Nor is there a column for what no candidate has.
    assert "variant result ms time/fp32 mJ backend reason" in lines
    assert any("100 1.00" not in line and " 2346 " in line for line in lines)


@pytest.mark.parametrize(
    ("max_drop", "shown"),
    [(0.0, "0.0001"), (0.01, "0.000"), (0.0005, "0.00012"), (1e-9, "0.000123")],
)
def test_a_loss_has_as_many_decimals_as_the_budget_asks_for(max_drop: float, shown: str) -> None:
    first = candidate("fp32", "chosen", "it is", drop=figure(0.000123))
    message = lines_at(200, search(first, max_drop=max_drop))
    assert any(re.search(rf"chosen\s+{re.escape(shown)}", line) for line in message)


def test_names_and_reasons_cannot_steer_the_terminal_or_the_markup(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = "\x1b]0;owned\x07[red]x[/red]\nforged line"
    first = candidate("fp32", "chosen", evil, ms=10, backend=evil)
    report(tiny_bundle, search(first, processor=evil, data=evil, metric=evil))
    for columns in (None, "60"):
        if columns is not None:
            monkeypatch.setenv("COLUMNS", columns)
        text = printed(capsys, str(tiny_bundle.path))
        assert "\x1b" not in text
        assert "\x07" not in text
        assert not any(line.startswith("forged") for line in text.splitlines())
        safe = "\\x1b]0;owned\\x07[red]x[/red]\\nforgedline"
        assert re.sub(r"\s+", "", text).count(safe) >= 4


def test_the_default_of_a_role_is_shown(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ("roles", "image_encoder", "default")
    edit_manifest(tiny_bundle.path, *steps, value="int8-dynamic")
    assert printed(capsys, str(tiny_bundle.path)).count("; default int8-dynamic") == 1


def test_a_page_of_it(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    node = NodeEntry(name="proj", op_type="Gemm", precision="int8", shape=(2, 2))
    table = NodeTable(role="image_encoder", variant="int8-dynamic", nodes=(node,))
    report(add_nodes(tiny_bundle, table), small_search())
    file = tmp_path / "search.html"
    text = printed(capsys, str(tiny_bundle.path), "--html", str(file))
    assert "Search: image_encoder" in text
    page = file.read_text(encoding="utf-8")
    assert "no backend here runs it" in page
    assert "Nodes of image_encoder, int8-dynamic" in page


def test_a_page_of_nothing_is_refused(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "search.html"
    code, out, err = run(capsys, str(tiny_bundle.path), "--html", str(file))
    assert (code, out) == (1, "")
    assert "--precision auto" in re.sub(r"\s+", " ", err)
    assert not file.exists()
