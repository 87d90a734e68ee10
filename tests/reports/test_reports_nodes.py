"""Nodes in the HTML report: bars in proportion, reasons, and nothing from a bundle that runs."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from mmedge.bundle import NodeEntry, NodeTable
from mmedge.profiling import Profile
from mmedge.reports.nodes import render_nodes
from mmedge.reports.profile import render_profile


def entry(name: str, error: float | None, **fields: object) -> NodeEntry:
    known: dict[str, object] = {
        "name": name,
        "op_type": "MatMul",
        "precision": "int8",
        "shape": (32, 64),
        "low": -1.5,
        "high": 2.5,
        "weight_error": 0.0065,
        "output_error": error,
    }
    return NodeEntry.model_validate(known | fields)


def table(*nodes: NodeEntry, variant: str = "int8-static") -> NodeTable:
    return NodeTable(role="image_encoder", variant=variant, nodes=nodes, samples=8)


class Page(HTMLParser):
    """Collects tags, checks that they nest, and keeps the text of each cell of each row."""

    VOID = frozenset({"meta", "wbr", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data


def test_each_node_has_its_figures_and_a_bar_in_proportion() -> None:
    html = render_nodes(
        table(
            entry("tower.layers.0.mlp.fc1", 0.04, precision="float32", reason="most sensitive"),
            entry("tower.layers.0.mlp.fc2", 0.01),
            entry("projection", None, low=None, high=None, weight_error=None, op_type="Gemm"),
        )
    )
    rows = Page(html).rows
    assert rows[1] == ["tower.layers.0"]
    assert [cell.strip() for cell in rows[2]] == [
        "mlp.fc1",
        "4.0e-02",
        "float32most sensitive",
        "6.5e-03",
        "-1.5 to 2.5",
        "32 \u00d7 64",
        "MatMul",
    ]
    assert rows[3][0] == "mlp.fc2"
    assert rows[4][:2] == ["projection", "\u2013"]
    assert re.findall(r"width:([0-9.]+)%", html) == ["100.0", "25.0"]
    assert "1 in float32, 2 in int8." in html
    assert "on 8 calibration samples" in html


def test_formats_differ_in_colour_and_in_words() -> None:
    html = render_nodes(
        table(*(entry(f"of {name}", 0.1, precision=name) for name in ("int8", "float32", "int4")))
    )
    colours = re.findall(r'class="chip (s\d)">(\w+)<', html)
    assert [what for _, what in colours] == ["int8", "float32", "int4"]
    assert len({colour for colour, _ in colours}) == 3


@pytest.mark.parametrize("errors", [(None, None), (0.0, 0.0), (None, 0.0)], ids=str)
def test_missing_or_zero_figures_are_not_drawn(
    errors: tuple[float | None, ...],
) -> None:
    html = render_nodes(table(*(entry(f"n{i}", e) for i, e in enumerate(errors))))
    Page(html)
    assert "nan" not in html.lower().replace("nowrap", "")
    assert ("convert with --explain" in html) == (errors == (None, None))


@pytest.mark.parametrize("narrow", ["float16", "bfloat16"])
def test_a_graph_narrowed_as_a_whole_needs_no_explain(narrow: str) -> None:
    island = entry("b", None, precision="float32")
    html = render_nodes(table(entry("a", None, precision=narrow), island))
    assert "--explain" not in html
    assert "whole graph was converted" in html


def test_a_table_without_nodes_is_no_error() -> None:
    assert len(Page(render_nodes(table())).rows) == 1


def test_strings_of_a_bundle_stay_strings(sample_profile: Profile) -> None:
    evil = "</td><script>alert(1)</script>\"'&<img src=x onerror=y>"
    made = table(entry(evil, 0.1, op_type=evil, reason=evil), variant=evil)
    page = Page(render_profile(sample_profile, [made]))
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not any(name.startswith("on") or name in {"src", "href"} for name, _ in page.attributes)
    assert any(evil in cell for row in page.rows for cell in row)


def test_the_report_has_a_section_for_each_table(sample_profile: Profile) -> None:
    nodes = [table(entry("n", 0.1), variant=name) for name in ("int8-static", "int8-dynamic")]
    with_nodes = render_profile(sample_profile, nodes)
    assert "Nodes of image_encoder, int8-static" in with_nodes
    assert "Nodes of image_encoder, int8-dynamic" in with_nodes
    assert "Nodes of" not in render_profile(sample_profile)
