"""What a Python prompt and a notebook show: short, and nothing of it runs."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

import mmedge
from mmedge.bundle import Bundle
from mmedge.notebook import html_table
from mmedge.profiling import Profile
from mmedge.runtimes.session import Placement


class Cells(HTMLParser):
    """Collects tags and the text of each cell."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def test_everything_in_a_table_is_text() -> None:
    evil = '<script>alert("x")</script>'
    page = Cells(html_table(evil, [evil], [[evil]]))
    assert page.tags == {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert page.cells == [evil] * 3


def test_a_bundle_and_its_manifest_are_a_line(tiny_bundle: Bundle) -> None:
    assert repr(tiny_bundle) == (
        f"<Bundle {tiny_bundle.path}: dual_encoder tiny: image_encoder (fp32, int8-dynamic), "
        "text_encoder (fp32, int8-dynamic)>"
    )
    assert repr(tiny_bundle.manifest).startswith("<Manifest 2.0 of dual_encoder tiny: image_enc")
    cells = Cells(tiny_bundle._repr_html_()).cells
    first = cells.index("image_encoder")
    assert cells[first : first + 4] == ["image_encoder", "fp32", "0.00037", "yes"]
    assert cells.count("yes") == len(tiny_bundle.manifest.roles)


def test_a_model_shows_where_its_roles_run(tiny_bundle: Bundle) -> None:
    with mmedge.load(tiny_bundle.path, backend="onnxruntime") as model:
        assert len(repr(model)) < 200
        placement = model.sessions["image_encoder"].placement
        assert repr(placement).startswith("<Placement onnxruntime (onnxruntime ")
        cells = Cells(model._repr_html_()).cells
    assert cells[-5:-1] == ["text_encoder", "fp32", "onnxruntime", "cpu"]


def test_a_placement_counts_its_exceptions() -> None:
    exceptions = {f"node {number}": "cpu" for number in range(500)}
    placement = Placement("onnxruntime", "cuda", "onnxruntime 1.32", {"CUDA": 9}, exceptions)
    assert repr(placement) == (
        "<Placement onnxruntime (onnxruntime 1.32) on cuda: 9 nodes on CUDA, 500 elsewhere>"
    )


@pytest.mark.parametrize("shown", [repr, str])
def test_a_profile_is_a_line_and_a_table(sample_profile: Profile, shown: type[str]) -> None:
    assert shown(sample_profile) == (
        "<Profile clip-vit-base-patch32: 18 measurements of 6 variants, 0 gates, 0 failed, "
        "1 warnings>"
    )
    assert len(Cells(sample_profile._repr_html_()).cells) > 100
