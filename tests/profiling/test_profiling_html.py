"""The HTML report: read as text, and looked at in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmedge.profiling import Profile
from mmedge.profiling.gates import evaluate, parse_gate
from mmedge.profiling.html_report import render_html
from mmedge.profiling.metrics import metrics

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
WIDTHS = (400, 1280)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

VOID = {"meta", "br", "link", "img", "input", "hr", "rect", "line", "circle", "polyline"}


class Reader(HTMLParser):
    """Collects tags and text, and finds tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID or tag in {"rect", "circle", "polyline"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


@pytest.fixture
def gated(sample_profile: Profile) -> Profile:
    gates = [parse_gate("image_encoder.p95_ms > 60")]
    return sample_profile.model_copy(update={"gates": evaluate(gates, metrics(sample_profile))})


def test_every_tag_is_closed_and_none_loads_or_runs_anything(gated: Profile) -> None:
    reader = read(render_html(gated))
    assert not {"script", "img", "link", "iframe", "object", "embed"} & set(reader.tags)
    names = {name for name, _ in reader.attributes}
    assert not {name for name in names if name.startswith("on")} | ({"src", "href"} & names)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in reader.attributes
    assert "@import" not in render_html(gated)
    assert "url(" not in render_html(gated)


def test_the_figures_are_on_the_page(gated: Profile) -> None:
    text = read(render_html(gated)).text
    cell = gated.cells[0]
    assert f"{cell.latency.percentiles['p50'].value_ms:.0f}" in text
    for words in (
        "clip-vit-base-patch32",
        "Example CPU @ 2.60GHz",
        "int8-dynamic",
        "214 nodes on CPUExecutionProvider",
        "onnxruntime 1.32.0",
        "1 of 3 failed.",
        "The machine was busy",
        "p99 500",
        "1280x720 JPEG of 186 kB",
        "0.99810",
    ):
        assert words in text, words


def test_a_percentile_without_support_is_a_dash_that_says_why(gated: Profile) -> None:
    page = render_html(gated)
    assert page.count('title="needs 500 runs, has 140"') == len(gated.cells)
    assert "needs 100 runs" not in page


def test_there_is_a_plot_of_everything(gated: Profile) -> None:
    titles = re.findall(r'<svg [^>]*aria-label="([^"]*?)\. "', render_html(gated))
    for start in (
        "Latency: image_encoder, batch 1",
        "Latency: text_encoder, batch 1, 77 tokens",
        "Distribution: text_encoder, batch 1, 9 tokens",
        "Throughput: image_encoder",
        "Size, latency, quality: image_encoder",
        "Stages: text_encoder, end to end",
        "Cold start",
        "Resident memory",
    ):
        assert start in titles


def test_whatever_comes_from_the_bundle_is_text(gated: Profile) -> None:
    document = json.loads(gated.model_dump_json())

    def poison(value: object) -> object:
        if isinstance(value, dict):
            return {
                key: HOSTILE
                if key in {"name", "path", "family", "source", "engine", "variant", "input",
                           "cpu_model", "platform", "created", "metric", "governor"}
                and isinstance(entry, str)
                else poison(entry)
                for key, entry in value.items()
            }  # fmt: skip
        if isinstance(value, list):
            return [poison(entry) for entry in value]
        return value

    document = poison(document)
    document["warnings"] = [HOSTILE]
    reader = read(render_html(Profile.model_validate(document)))
    assert not {"script", "img"} & set(reader.tags)
    assert reader.text.count("alert(1)") > 20


@pytest.mark.parametrize("left_out", ["stages", "cold starts", "gates and warnings", "quality"])
def test_what_was_not_measured_is_left_out(sample_profile: Profile, left_out: str) -> None:
    none: dict[str, object] = {"cold_start": None, "memory": None}
    if left_out == "quality":
        none = {"cosine_mean": None, "cosine_p1": None}
    variants = tuple(item.model_copy(update=none) for item in sample_profile.variants)
    update: dict[str, dict[str, object]] = {
        "stages": {"stages": ()},
        "cold starts": {"variants": variants},
        "gates and warnings": {"warnings": ()},
        "quality": {"variants": variants},
    }
    absent = {
        "stages": "End to end",
        "cold starts": "Resident memory",
        "gates and warnings": "Take with care",
        "quality": "Size, latency, quality",
    }
    page = render_html(sample_profile.model_copy(update=update[left_out]))
    assert absent[left_out] not in read(page).text
    assert absent[left_out] in render_html(sample_profile)


@dataclass(frozen=True)
class Seen:
    """What the browser made of a page.

    Attributes:
        measured: By width: what the script in the outer page read off the report.
        console: Lines that the pages wrote to the console.
        picture: The screenshot.
    """

    measured: dict[str, dict[str, float]]
    console: list[str]
    picture: Image.Image


# The report stands in frames as wide as a telephone and as a desk. It forbids scripts, so the page
# around it measures. Labels in a plot have to lie within it.
OUTER = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0"><pre id="found"></pre>
<script>
const found = {};
function look(frame) {
  const page = frame.contentDocument, root = page.documentElement;
  let outside = 0, empty = 0;
  for (const svg of page.querySelectorAll("svg")) {
    const box = svg.viewBox.baseVal;
    if (svg.getBoundingClientRect().width < 100) empty += 1;
    for (const text of svg.querySelectorAll("text")) {
      const b = text.getBBox();
      const right = b.x + b.width, bottom = b.y + b.height;
      if (b.x < -1 || right > box.width + 1 || bottom > box.height + 1) outside += 1;
    }
  }
  found[frame.width] = {width: root.scrollWidth, height: root.scrollHeight, outside, empty,
    svgs: page.querySelectorAll("svg").length, tables: page.querySelectorAll("table").length,
    smallest: Math.min(...[...page.querySelectorAll("body *")].map(
      e => parseFloat(page.defaultView.getComputedStyle(e).fontSize)))};
  document.getElementById("found").textContent = JSON.stringify(found);
}
</script>
"""


def browse(page: str, folder: Path) -> Seen:
    """Open a page in the browser, in frames of several widths."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} (Debian: apt install chromium)")
    frames = "".join(
        f'<iframe width="{width}" height="3000" style="border:0" onload="look(this)" '
        f'srcdoc="{html.escape(page)}"></iframe>'
        for width in WIDTHS
    )
    outer, picture = folder / "outer.html", folder / "picture.png"
    outer.write_text(OUTER + frames, encoding="utf-8")
    done = subprocess.run(
        [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--enable-logging=stderr", "--hide-scrollbars", "--disable-dev-shm-usage"),
            f"--user-data-dir={folder / 'browser'}",
            f"--window-size={sum(WIDTHS) + 20},3000",
            f"--screenshot={picture}",
            "--dump-dom",
            outer.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
    assert found is not None, done.stderr[-2000:]
    return Seen(
        measured=json.loads(html.unescape(found[1])),
        console=[line for line in done.stderr.splitlines() if "CONSOLE" in line],
        picture=Image.open(picture).convert("RGB"),
    )


@pytest.mark.timeout(300)
def test_the_page_as_a_browser_shows_it(gated: Profile, tmp_path: Path) -> None:
    page = render_html(gated)
    seen = browse(page, tmp_path)
    assert seen.console == []
    for width in WIDTHS:
        measured = seen.measured[str(width)]
        assert measured["svgs"] == page.count("<svg ")
        assert measured["tables"] == page.count("<table")
        assert measured["width"] <= width, "the page is wider than its frame"
        assert measured["outside"] == 0, "labels lie outside their plot"
        assert measured["empty"] == 0
        assert measured["height"] > 2000
        assert measured["smallest"] >= 11
    pixels = np.asarray(seen.picture)
    for left, right in ((0, WIDTHS[0]), (WIDTHS[0] + 10, sum(WIDTHS))):
        part = pixels[:, left:right]
        dark = (part.max(axis=-1) < 96).mean()  # ink
        coloured = (np.ptp(part.astype(np.int16), axis=-1) > 80).mean()  # plots
        assert 0.002 < dark < 0.2
        assert coloured > 0.001


@pytest.mark.timeout(300)
def test_the_browser_would_tell_of_a_page_that_loads_something(tmp_path: Path) -> None:
    head = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'">'
    seen = browse(f'{head}<svg></svg><img src="picture.png"><script>1</script>', tmp_path)
    assert any("Content Security Policy" in line for line in seen.console)
