"""Relevant images of queries, and the contact sheet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from generate import captioned
from PIL import Image
from world import Scene, Thing

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))

from contact_sheet import Hit, Row, draw_contact_sheet  # noqa: E402
from demo import judge  # noqa: E402
from queries import Query, queries_about  # noqa: E402


def thing(words: str, x: float, y: float) -> Thing:
    size, colour, shape = words.split()
    return Thing(colour, shape, size, x, y, 0.1, 0.0, (0, 0, 0))


def scene(*things: Thing) -> Scene:
    return Scene(things, (128, 128, 128), (128, 128, 128))


GALLERY = [
    scene(thing("small red star", 0.2, 0.5), thing("large blue ring", 0.8, 0.5)),
    scene(thing("small blue ring", 0.2, 0.5), thing("large red star", 0.8, 0.5)),
    scene(
        thing("small green heart", 0.2, 0.2),
        thing("small red star", 0.8, 0.2),
        thing("large white cross", 0.5, 0.8),
    ),
    scene(*(thing("small black cross", x, 0.5) for x in (0.2, 0.5, 0.8))),
    scene(*(thing("small black cross", x, 0.5) for x in (0.2, 0.8))),
    scene(thing("large green heart", 0.2, 0.2)),
]


def test_a_query_lists_exactly_the_matching_images() -> None:
    gallery = [(found, f"caption {index}") for index, found in enumerate(GALLERY)]
    relevant = {query.text: sorted(query.relevant) for query in queries_about(gallery)}
    assert relevant == {
        "a black cross": [3, 4],
        "a small green heart at the top left": [2],
        "a red star to the left of a blue ring": [0],
        "a blue ring and a red star": [0, 1],
        "three small black crosses": [3],
        "caption 2": [2],
    }


def test_every_demo_query_has_a_match() -> None:
    queries = queries_about(captioned("test", 300))
    assert len({query.kind for query in queries}) == len(queries) == 6
    assert all(query.relevant for query in queries)


def test_a_gallery_too_small_to_ask_is_refused() -> None:
    with pytest.raises(ValueError, match="too small"):
        queries_about([(GALLERY[0], "one")])


def test_a_miss_is_wrong_only_while_there_is_something_left_to_find() -> None:
    images = [Path(f"{index}.png") for index in range(6)]
    scores = np.array([0.1, 0.9, 0.8, 0.7, 0.6, 0.2], np.float32)
    row = judge(Query("q", "relation", frozenset([1, 3])), scores, images, list("abcdef"))
    assert [(hit.caption, hit.result) for hit in row.hits] == [
        ("b", "right"),
        ("c", "wrong"),
        ("d", "right"),
        ("e", "none left"),
        ("f", "none left"),
    ]
    assert [round(hit.score, 1) for hit in row.hits] == [0.9, 0.8, 0.7, 0.6, 0.2]
    assert "2 right images" in row.note


def test_the_contact_sheet_shows_each_image_in_the_colour_of_its_result(tmp_path: Path) -> None:
    for name, colour in (("a", "#0000ff"), ("b", "#ffff00")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
    hits = [
        Hit(tmp_path / "a.png", "a", 0.5, "right"),
        Hit(tmp_path / "b.png", "b", 0.4, "wrong"),
    ]
    sheet = draw_contact_sheet("title", "below", [Row("query", "note", hits)])
    colours = {colour: count for count, colour in sheet.getcolors(1 << 24) or []}
    # Each image fills its tile but for the frame's inner edge.
    assert 168 * 168 >= colours[0, 0, 255] > 160 * 160
    assert 168 * 168 >= colours[255, 255, 0] > 160 * 160
    assert colours[22, 140, 60] > 4 * 160  # the frame of what is right
    assert colours[200, 40, 40] > 4 * 160


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_runs_and_finds_the_queried_images(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "examples/demo.py", "--output", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    for name in ["search.png", "profile.html", "profile.json", "shapes-clip.mmedge/manifest.json"]:
        assert (tmp_path / "out" / name).is_file()
    results = [line.split()[1] for line in done.stdout.splitlines() if ".png  " in line]
    assert len(results) == 30
    assert results.count("right") >= 6
