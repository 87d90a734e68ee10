"""Pages as the tests look at them: read as text, and opened in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

WIDTHS = (400, 1280)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

VOID = {"meta", "br", "link", "img", "input", "hr", "rect", "line", "circle", "polyline", "wbr"}


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


@dataclass(frozen=True)
class Seen:
    """What the browser made of a page.

    Attributes:
        measured: By width: what the script in the outer page read off the report.
        console: Lines that the pages wrote to the console.
        image: The screenshot.
    """

    measured: dict[str, dict[str, float]]
    console: list[str]
    image: Image.Image


# The report is shown in frames as wide as a phone and a desktop. It forbids scripts, so the page
# around it measures. Labels in a plot have to lie within it.
OUTER = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0"><pre id="found"></pre>
<script>
const found = {};
function look(frame) {
  const page = frame.contentDocument, root = page.documentElement;
  let outside = 0, empty = 0, overlaps = 0;
  for (const svg of page.querySelectorAll("svg")) {
    const box = svg.viewBox.baseVal;
    if (svg.getBoundingClientRect().width < 100) empty += 1;
    const boxes = [];
    for (const text of svg.querySelectorAll("text")) {
      const b = text.getBBox();
      const right = b.x + b.width, bottom = b.y + b.height;
      if (b.x < -1 || right > box.width + 1 || bottom > box.height + 1) outside += 1;
      // The frame around a text is as high as its line; letters leave a fifth of it empty.
      const air = b.height * 0.2;
      const here = [b.x + 1, b.y + air, right - 1, bottom - air];
      for (const o of boxes)
        if (here[0] < o[2] && o[0] < here[2] && here[1] < o[3] && o[1] < here[3]) overlaps += 1;
      boxes.push(here);
    }
  }
  found[frame.width] = {width: root.scrollWidth, height: root.scrollHeight,
    outside, empty, overlaps,
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
    outer, image = folder / "outer.html", folder / "image.png"
    outer.write_text(OUTER + frames, encoding="utf-8")
    done = subprocess.run(
        [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--enable-logging=stderr", "--hide-scrollbars", "--disable-dev-shm-usage"),
            f"--user-data-dir={folder / 'browser'}",
            f"--window-size={sum(WIDTHS) + 20},3000",
            f"--screenshot={image}",
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
        image=Image.open(image).convert("RGB"),
    )
