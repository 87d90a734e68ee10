"""Plots: well-formed, escaped, to scale."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable

import pytest

from mmedge.reports.charts import (
    WIDTH,
    Bar,
    Point,
    Range,
    Series,
    line_chart,
    nice_ticks,
    number,
    range_chart,
    scatter_chart,
    stacked_bars,
)

HOSTILE = '<script>alert("x")</script>&\'"'


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.01234, "0.0123"),
        (0.1, "0.100"),
        (1.0, "1.00"),
        (9.999, "10.00"),
        (35.06, "35.1"),
        (104.4, "104"),
        (85174.1, "85,174"),
        (-2.757, "-2.76"),
        (float("nan"), "n/a"),
        (float("inf"), "n/a"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 100, (0, 25, 50, 75, 100)),
        (0, 1, (0, 0.25, 0.5, 0.75, 1)),
        (0, 7, (0, 2, 4, 6)),
        (3, 3, (3,)),
        (0.9962, 1.0, (0.997, 0.998, 0.999, 1.0)),
        (0, 0.00931, (0, 0.0025, 0.005, 0.0075)),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, ticks: tuple[float, ...]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


PLOTS: dict[str, Callable[[str], str]] = {
    "bars": lambda name: stacked_bars(name, [Bar(name, {name: 1.0}, name, 2.0)], unit=name),
    "ranges": lambda name: range_chart(name, [Range(name, 1, 3, 2, {name: 3}, name)], unit=name),
    "lines": lambda name: line_chart(
        name, [Series(name, [(0, 1), (1, 2)], dots=True)], x_name=name, y_name=name
    ),
    "scatter": lambda name: scatter_chart(
        name, [Point(name, 1, 2, 3, name)], x_name=name, y_name=name
    ),
}


@pytest.mark.parametrize("plot", PLOTS)
def test_a_plot_is_xml_with_an_accessible_name(plot: str) -> None:
    root = ET.fromstring(PLOTS[plot]("Latency"))  # noqa: S314, our own
    assert root.get("role") == "img"
    assert (root.get("aria-label") or "").startswith("Latency")
    assert root.findtext("title") == "Latency"
    assert root.get("viewBox", "").startswith(f"0 0 {WIDTH} ")


@pytest.mark.parametrize("plot", PLOTS)
def test_names_are_escaped(plot: str) -> None:
    drawn = PLOTS[plot](HOSTILE)
    assert "<script" not in drawn
    root = ET.fromstring(drawn)  # noqa: S314, our own
    assert root.findtext("title") == HOSTILE
    assert {element.tag for element in root.iter()} <= {
        "svg", "title", "text", "rect", "circle", "line", "polyline",
    }  # fmt: skip


@pytest.mark.parametrize("plot", PLOTS)
def test_figures_of_nothing_are_drawn_too(plot: str) -> None:
    zero: dict[str, Callable[[], str]] = {
        "bars": lambda: stacked_bars("t", [Bar("a", {"x": 0.0})], unit="ms"),
        "ranges": lambda: range_chart("t", [Range("a", 0, 0, 0, {})], unit="ms"),
        "lines": lambda: line_chart("t", [Series("a", [(0, 0)])], x_name="x", y_name="y"),
        "scatter": lambda: scatter_chart("t", [Point("a", 0, 0, 0)], x_name="x", y_name="y"),
    }
    assert "nan" not in zero[plot]().lower()


def rects(drawn: str) -> list[ET.Element]:
    return [e for e in ET.fromstring(drawn).iter("rect") if e.find("title") is not None]  # noqa: S314


def test_bars_are_to_scale_and_side_by_side() -> None:
    drawn = stacked_bars("t", [Bar("a", {"x": 1.0, "y": 3.0}), Bar("b", {"y": 2.0})], unit="ms")
    x, y, other = rects(drawn)
    assert float(y.get("width", 0)) == pytest.approx(3 * float(x.get("width", 0)), abs=0.2)
    assert float(other.get("width", 0)) == pytest.approx(2 * float(x.get("width", 0)), abs=0.2)
    end_of_x = float(x.get("x", 0)) + float(x.get("width", 0))
    assert float(y.get("x", 0)) == pytest.approx(end_of_x, abs=0.11)
    assert y.get("class") == other.get("class") != x.get("class")


def test_plots_that_share_an_order_agree_on_the_colours() -> None:
    order = ("inference", "decode")
    (alone,) = rects(stacked_bars("t", [Bar("a", {"inference": 1.0})], unit="ms", order=order))
    second = rects(
        stacked_bars("t", [Bar("a", {"decode": 1.0, "inference": 1.0})], unit="ms", order=order)
    )[1]
    assert alone.get("class") == second.get("class")


def test_a_line_rises_with_its_figures() -> None:
    drawn = line_chart("t", [Series("a", [(0, 1), (1, 2), (2, 4)])], x_name="x", y_name="y")
    points = ET.fromstring(drawn).find("polyline").get("points")  # type: ignore[union-attr]  # noqa: S314
    places = [tuple(map(float, pair.split(","))) for pair in points.split()]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    heights = [places[0][1] - y for _, y in places]
    assert heights[2] == pytest.approx(3 * heights[1], abs=0.3)


def test_the_area_of_a_disc_grows_with_the_size() -> None:
    drawn = scatter_chart(
        "t", [Point("a", 1, 1, 100), Point("b", 2, 2, 25)], x_name="x", y_name="y"
    )
    large, small = (float(c.get("r", 0)) for c in ET.fromstring(drawn).iter("circle"))  # noqa: S314
    assert large > small > 5
