"""The HTML report: read as text, and looked at in a real browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from pages import WIDTHS, browse, read

from mmedge.profiling import Profile
from mmedge.profiling.gates import evaluate, parse_gate
from mmedge.profiling.metrics import metrics
from mmedge.reports.profile import render_profile

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


@pytest.fixture
def gated(sample_profile: Profile) -> Profile:
    gates = [parse_gate("image_encoder.p95_ms > 60")]
    return sample_profile.model_copy(update={"gates": evaluate(gates, metrics(sample_profile))})


def test_every_tag_is_closed_and_none_loads_or_runs_anything(gated: Profile) -> None:
    reader = read(render_profile(gated))
    assert not {"script", "img", "link", "iframe", "object", "embed"} & set(reader.tags)
    names = {name for name, _ in reader.attributes}
    assert not {name for name in names if name.startswith("on")} | ({"src", "href"} & names)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in reader.attributes
    assert "@import" not in render_profile(gated)
    assert "url(" not in render_profile(gated)


def test_the_figures_are_on_the_page(gated: Profile) -> None:
    text = read(render_profile(gated)).text
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


def test_a_percentile_without_support_is_a_dash_with_a_reason(gated: Profile) -> None:
    page = render_profile(gated)
    assert page.count('title="needs 500 runs, has 140"') == len(gated.cells)
    assert "needs 100 runs" not in page


def test_there_is_a_plot_of_everything(gated: Profile) -> None:
    titles = re.findall(r'<svg [^>]*aria-label="([^"]*?)\. "', render_profile(gated))
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


def test_strings_of_the_bundle_are_escaped(gated: Profile) -> None:
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
    reader = read(render_profile(Profile.model_validate(document)))
    assert not {"script", "img"} & set(reader.tags)
    assert reader.text.count("alert(1)") > 20


@pytest.mark.parametrize("left_out", ["stages", "cold starts", "gates and warnings", "quality"])
def test_unmeasured_figures_are_left_out(sample_profile: Profile, left_out: str) -> None:
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
        "stages": "Stages of an end-to-end call",
        "cold starts": "Resident memory",
        "gates and warnings": "Warnings",
        "quality": "Size, latency, quality",
    }
    page = render_profile(sample_profile.model_copy(update=update[left_out]))
    assert absent[left_out] not in read(page).text
    assert absent[left_out] in render_profile(sample_profile)


@pytest.mark.timeout(300)
def test_the_page_as_a_browser_shows_it(gated: Profile, tmp_path: Path) -> None:
    page = render_profile(gated)
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
    pixels = np.asarray(seen.image)
    for left, right in ((0, WIDTHS[0]), (WIDTHS[0] + 10, sum(WIDTHS))):
        part = pixels[:, left:right]
        dark = (part.max(axis=-1) < 96).mean()  # ink
        coloured = (np.ptp(part.astype(np.int16), axis=-1) > 80).mean()  # plots
        assert 0.002 < dark < 0.2
        assert coloured > 0.001


@pytest.mark.timeout(300)
def test_the_browser_reports_a_page_that_loads_something(tmp_path: Path) -> None:
    head = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'">'
    seen = browse(f'{head}<svg></svg><img src="image.png"><script>1</script>', tmp_path)
    assert any("Content Security Policy" in line for line in seen.console)
