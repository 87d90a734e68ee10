"""A search as a page: plots to scale, labels apart, every candidate with its reason."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from pages import WIDTHS, browse, read
from searches import candidate, figure, large_search, nothing_gained, search, small_search

from mmedge.bundle import Bundle, Manifest, NodeEntry, NodeTable
from mmedge.bundle.tuning import SearchRecord
from mmedge.profiling import Profile
from mmedge.reports.pareto import OUTCOMES, Mark, pareto_chart
from mmedge.reports.profile import render_profile
from mmedge.reports.tuning import render_search, search_sections

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
NODES = {
    "one": NodeTable(
        role="image_encoder",
        variant="int8-dynamic",
        nodes=(NodeEntry(name="proj", op_type="Gemm", precision="int8", shape=(2, 2)),),
    )
}


def with_records(bundle: Bundle, **records: SearchRecord) -> Manifest:
    """The bundle's manifest, with what was searched for each role."""
    manifest = bundle.manifest
    roles = {
        name: role.model_copy(update={"search": records.get(name)})
        for name, role in manifest.roles.items()
    }
    return manifest.model_copy(update={"roles": roles})


def mark(label: str, x: float, y: float, kind: str = "dropped", *, half: float = 0.0) -> Mark:
    assert kind in {"chosen", "front", "dropped"}
    return Mark(label, f"variant {label}", x, y, y - half, y + half, kind)  # type: ignore[arg-type]


def plot(*marks: Mark, budget: float = 0.01) -> ET.Element:
    svg = pareto_chart("Loss", marks, budget=budget, x_name="ms", y_name="lost")
    return ET.fromstring(svg)  # noqa: S314, written here


def of_class(root: ET.Element, tag: str, word: str) -> list[ET.Element]:
    return [each for each in root.iter(tag) if word in (each.get("class") or "").split()]


def labels(root: ET.Element) -> dict[str, tuple[float, float]]:
    """Positions of the marks' numbers: the left end of their baseline."""
    found = [
        each
        for each in root.iter("text")
        if each.get("class") in {"label", "value"} and each.text is not None
    ]
    return {str(each.text): (float(each.get("x", 0)), float(each.get("y", 0))) for each in found}


def test_marks_are_placed_by_their_figures() -> None:
    root = plot(mark("1", 100, 0.0, "front"), mark("2", 50, 0.01, "front"), mark("3", 50, 0.005))
    first, second = (
        (float(each.get("cx", 0)), float(each.get("cy", 0)))
        for each in of_class(root, "circle", "ring")
    )
    (third,) = of_class(root, "circle", "hollow")[:1]
    (budget,) = of_class(root, "line", "budget")
    left = float(budget.get("x1", 0))
    assert first[0] - left == pytest.approx(2 * (second[0] - left), abs=0.2)
    assert float(third.get("cy", 0)) == pytest.approx((first[1] + second[1]) / 2, abs=0.1)
    assert float(budget.get("y1", 0)) == pytest.approx(second[1], abs=0.1)
    assert first[1] > second[1]  # less loss lies lower


def test_the_front_is_a_staircase() -> None:
    root = plot(
        mark("1", 100, 0.0, "front"),
        mark("2", 60, 0.006, "front"),  # as dear as it is lossy: beaten by 3
        mark("3", 50, 0.004, "chosen"),
        mark("4", 40, 0.002),  # better still, but dropped
    )
    (front,) = of_class(root, "polyline", "front")
    points = [tuple(map(float, point.split(","))) for point in (front.get("points") or "").split()]
    assert len(points) == 4  # 3, the corner below 1, 1, the right edge
    (x3, y3), (corner_x, corner_y), (x1, y1), (edge, last) = points
    assert (corner_x, corner_y, last) == (x1, y3, y1)
    assert x3 < x1 < edge
    assert y1 > y3


def test_the_chosen_is_a_diamond_and_the_dropped_are_hollow() -> None:
    root = plot(mark("1", 9, 0.0, "front"), mark("2", 5, 0.002, "chosen"), mark("3", 7, 0.003))
    assert len(of_class(root, "polygon", "ring")) == 1
    assert of_class(root, "polygon", "ring")[0].findtext("title") == "2: variant 2"
    hollow = [each.findtext("title") for each in of_class(root, "circle", "hollow")]
    assert "3: variant 3" in hollow


def test_intervals_are_whiskers_and_end_with_the_axes() -> None:
    root = plot(mark("1", 9, 0.0, "chosen", half=0.004), mark("2", 5, 0.001, half=0.9))
    whiskers = [
        each for each in of_class(root, "line", "whisker") if each.get("x1") == each.get("x2")
    ]
    heights = [abs(float(e.get("y2", 0)) - float(e.get("y1", 0))) for e in whiskers]
    (shade,) = of_class(root, "rect", "over")
    (budget,) = of_class(root, "line", "budget")
    assert float(shade.get("y", 0)) + float(shade.get("height", 0)) == pytest.approx(
        float(budget.get("y1", 0)), abs=0.1
    )
    # Of the budget's height above zero, 0.004 each way is eight tenths.
    (zero,) = of_class(root, "line", "zero")
    unit = float(zero.get("y1", 0)) - float(budget.get("y1", 0))
    assert heights[1] == pytest.approx(0.8 * unit, abs=0.3)
    assert heights[0] <= 240


def test_the_interval_of_a_cost_is_a_whisker_too() -> None:
    one = Mark("1", "it", 0.5, 0.0, 0.0, 0.0, "chosen", x_low=0.4, x_high=1.0)
    root = plot(one, mark("2", 1.0, 0.0, "front"))
    (whisker,) = of_class(root, "line", "s2")
    (other,) = of_class(root, "circle", "ring")
    assert whisker.get("y1") == whisker.get("y2") == other.get("cy")
    assert whisker.get("x2") == other.get("cx")


def test_a_loss_far_beyond_the_budget_is_an_arrow_and_presses_nothing_flat() -> None:
    near = (mark("1", 100, 0.0, "front"), mark("2", 30, 0.008, "chosen"))
    without = plot(*near, mark("3", 31, 0.039))
    beyond = plot(*near, mark("3", 31, 0.8))
    for root in (without, beyond):
        (budget,) = of_class(root, "line", "budget")
        (zero,) = of_class(root, "line", "zero")
        assert float(zero.get("y1", 0)) - float(budget.get("y1", 0)) > 40
    arrows = [each.findtext("title") for each in of_class(beyond, "polygon", "s5")]
    assert arrows == ["3: variant 3"]
    assert not of_class(without, "polygon", "s5")


def test_a_cost_far_beyond_the_front_is_an_arrow() -> None:
    root = plot(mark("1", 100, 0.0, "chosen"), mark("2", 5000, 0.001))
    assert [each.findtext("title") for each in of_class(root, "polygon", "s5")] == ["2: variant 2"]
    (diamond,) = of_class(root, "polygon", "ring")
    assert min(float(p.split(",")[0]) for p in (diamond.get("points") or "").split()) > 200


def test_equal_marks_share_a_label() -> None:
    root = plot(mark("1", 100, 0.0, "chosen"), mark("2", 30, 0.004), mark("3", 30, 0.004))
    assert set(labels(root)) == {"1", "2, 3"}


@pytest.mark.parametrize("spread", [0.0, 0.4, 1.0])
def test_labels_of_a_crowd_do_not_overlap(spread: float) -> None:
    marks = [mark("1", 100, 0.0, "chosen")]
    marks += [
        mark(str(i), 50 + spread * 3 * (i % 5), 0.004 + spread * 0.0012 * (i // 5), half=0.002)
        for i in range(2, 16)
    ]
    boxes = [(x, y - 10, x + 8 * len(text), y) for text, (x, y) in labels(plot(*marks)).items()]
    for i, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[:i]:
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
            assert apart
    assert sum(len(text.split(", ")) for text in labels(plot(*marks))) == 15


@pytest.mark.parametrize("budget", [0.0, 0.01])
@pytest.mark.parametrize("y", [0.0, -0.02])
def test_a_single_mark_and_no_loss_at_all_can_be_drawn(budget: float, y: float) -> None:
    root = plot(mark("1", 3, y, "chosen"), budget=budget)
    numbers = [
        float(value)
        for each in root.iter()
        for name, value in each.attrib.items()
        if name in {"x", "y", "x1", "y1", "cx", "cy"}
    ]
    assert numbers
    assert all(-1 <= value <= 421 for value in numbers)
    assert labels(root).keys() == {"1"}


def test_every_candidate_is_in_the_table_with_its_reason(tiny_bundle: Bundle) -> None:
    record = large_search()
    page = render_search(with_records(tiny_bundle, image_encoder=record), NODES)
    text = re.sub(r"\s+", " ", read(page).text)
    for index, one in enumerate(record.candidates):
        assert f"{index + 1} {one.variant}{OUTCOMES[one.verdict]}{one.reason}" in text
    for words in (
        "Search: image_encoder",
        "Chosen: int8-static-mse-equalized-corrected-keep8",
        "objectivelatency",
        "0.01 of recall@1",
        "test: 300 images (n = 300)",
        "Example CPU @ 2.60GHz, 2 threads",
        "15, 11 dropped",
        "-0.002 (-0.011 to 0.008)",
        "0.000 (-0.012 to 0.012)",
        "Not measured: 1 of 15.",
        "Nodes of image_encoder, int8-dynamic",
    ):
        assert words in text, words
    assert "Search: text_encoder" not in text
    assert page.count("<svg ") == 2


def test_plots_have_accessible_descriptions(tiny_bundle: Bundle) -> None:
    page = render_search(with_records(tiny_bundle, image_encoder=large_search()), {})
    message = re.findall(r'<svg [^>]*role="img" aria-label="([^"]*)"', page)
    assert [text.split(". ")[0] for text in message] == [
        "Loss against latency: image_encoder",
        "Loss against size: image_encoder",
    ]
    assert (
        "14 candidates, 4 kept; recall@1 loss against fp32 over time relative to fp32 (104 ms)"
        in message[0]
    )


def test_energy_is_drawn_where_it_was_measured(tiny_bundle: Bundle) -> None:
    first = candidate("fp32", "chosen", "it is", drop=figure(0), ms=100, energy_mj=2345.0)
    record = search(first, objective="energy", energy_counter="RAPL: package-0")
    page = render_search(with_records(tiny_bundle, image_encoder=record), {})
    text = read(page).text
    assert "RAPL: package-0, including the idle machine" in text
    assert "Loss against energy: image_encoder" in text
    assert "objectiveenergy" in text
    assert "2,345 mJ" in text
    assert "Loss against size" not in text


def test_fp32_alone_is_reported(tiny_bundle: Bundle) -> None:
    text = read(render_search(with_records(tiny_bundle, text_encoder=nothing_gained()), {})).text
    assert "Chosen: fp32no candidate within the budget is faster or smaller" in text
    assert "size relative to fp32" not in text


def test_fp32_is_drawn_though_it_was_not_compared_with_itself(tiny_bundle: Bundle) -> None:
    first = candidate("fp32", "chosen", "it is", size_mb=10)
    page = render_search(with_records(tiny_bundle, text_encoder=search(first)), {})
    assert page.count("<svg ") == 1
    assert "1: fp32, chosen: it is" in page


def test_strings_of_the_bundle_are_escaped(tiny_bundle: Bundle) -> None:
    first = candidate("fp32", "chosen", HOSTILE, drop=figure(0), ms=10, backend=HOSTILE)
    fields = dict.fromkeys(("metric", "processor", "data"), HOSTILE)
    manifest = with_records(tiny_bundle, image_encoder=search(first, **fields))
    roles = {HOSTILE: manifest.roles["image_encoder"]}
    provenance = manifest.provenance.model_copy(
        update={"source": HOSTILE, "command": HOSTILE, "created": HOSTILE}
    )
    hostile = {"name": HOSTILE, "family": HOSTILE, "roles": roles, "provenance": provenance}
    page = render_search(manifest.model_copy(update=hostile), {})
    reader = read(page)
    assert not {"script", "img"} & set(reader.tags)
    names = {name for name, _ in reader.attributes}
    assert not {name for name in names if name.startswith("on")} | ({"src", "href"} & names)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in reader.attributes
    assert reader.text.count("alert(1)") > 10


def test_without_a_search_the_page_is_on_nodes(tiny_bundle: Bundle) -> None:
    made = tiny_bundle.manifest.provenance.model_copy(update={"created": "2026-01-31T12:00:00Z"})
    manifest = tiny_bundle.manifest.model_copy(update={"provenance": made})
    text = read(render_search(manifest, NODES)).text
    assert "mmedge nodes" in text
    assert "mmedge search" not in text
    assert "2026-01-31 12:00:00 UTC" in text


def test_the_profile_has_the_search_too(sample_profile: Profile, tiny_bundle: Bundle) -> None:
    roles = with_records(tiny_bundle, image_encoder=small_search()).roles
    page = render_profile(sample_profile, roles=roles)
    assert "Search: image_encoder" in read(page).text
    assert "no backend here runs it" in page
    assert "Search: " not in read(render_profile(sample_profile)).text
    assert not search_sections(tiny_bundle.manifest.roles)


@pytest.mark.timeout(300)
def test_the_page_as_a_browser_shows_it(tiny_bundle: Bundle, tmp_path: Path) -> None:
    manifest = with_records(
        tiny_bundle, image_encoder=large_search(), text_encoder=nothing_gained()
    )
    page = render_search(manifest, NODES)
    seen = browse(page, tmp_path)
    assert seen.console == []
    for width in WIDTHS:
        measured = seen.measured[str(width)]
        assert measured["svgs"] == page.count("<svg ") == 4
        assert measured["width"] <= width, "the page is wider than its frame"
        assert measured["outside"] == 0, "labels lie outside their plot"
        assert measured["overlaps"] == 0, "labels lie on each other"
        assert measured["empty"] == 0
        assert measured["smallest"] >= 11
