"""Contact sheets of hits: images, and frames of videos and recordings."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from media.test_media_recordings import write_bag
from media.test_media_video import scene, write_video
from PIL import Image

from mmedge.bundle import Bundle
from mmedge.cli.sheet import draw_sheet
from mmedge.media.recordings import Recording
from mmedge.retrieval.index import Index
from mmedge.retrieval.items import Match
from mmedge.retrieval.recordings import index_recording, index_video

SEEDS = (1, 2, 3)
TILE, GAP, HEAD = 224, 16, 48


def tile(sheet: Image.Image, column: int) -> Image.Image:
    """A tile of the first row."""
    left = GAP + column * (TILE + GAP)
    return sheet.crop((left, HEAD, left + TILE, HEAD + TILE))


def difference(sheet: Image.Image, column: int, seed: int) -> float:
    """Mean difference of a tile to a scene, of 64x48 pixels."""
    drawn = tile(sheet, column).crop((80, 88, 144, 136))
    return float(np.abs(np.asarray(drawn, np.int16) - scene(seed)).mean())


@pytest.fixture
def index(tiny_bundle: Bundle, tmp_path: Path) -> Index:
    return Index.create(tmp_path / "x.index", tiny_bundle.path)


@pytest.mark.parametrize("kind", ["mcap", "folder", "ros1"])
def test_hits_in_a_recording_are_its_frames(index: Index, tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.bag" if kind == "ros1" else "a")
    images = [("rgb8", scene(seed)) for seed in SEEDS]
    made = write_bag(path, images, ros1=kind == "ros1", mcap=kind == "mcap")
    with index, Recording(made, "/cam") as recording:
        index_recording(index, index.bulk_model, recording)
        hits = [index.search(scene(seed), 1)[0] for seed in SEEDS]
    sheet = draw_sheet("scenes", hits)
    for column, seed in enumerate(SEEDS):
        assert difference(sheet, column, seed) == 0


def test_a_hit_in_a_video_is_the_frame_that_was_found(index: Index, tmp_path: Path) -> None:
    shots = [scene(seed) for seed in SEEDS for _ in range(20)]
    with index:
        index_video(index, index.bulk_model, write_video(tmp_path / "v.mp4", shots))
        hits = [index.search(scene(seed), 1)[0] for seed in (3, 1, 2)]
    sheet = draw_sheet("scenes", hits)
    for column, seed in enumerate((3, 1, 2)):
        assert difference(sheet, column, seed) < 12
        assert difference(sheet, column, seed % 3 + 1) > 24


def test_tiles_without_an_image_give_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.mcap").write_bytes(b"no recording")
    (tmp_path / "v.mp4").write_bytes(b"no video")
    frame = {"topic": "/cam", "position": 7}
    hits = [
        Match("a", 0.9),
        Match("b", 0.8, source=str(tmp_path / "gone.jpg")),
        Match("c", 0.7, source=str(tmp_path / "gone.mcap"), metadata=frame),
        Match("d", 0.6, source=str(tmp_path / "bad.mcap"), metadata=frame),
        Match("e", 0.5, source=str(tmp_path / "notes.txt"), metadata={"positions": ["left"]}),
        Match("f", 0.4, source=str(tmp_path / "v.mp4"), metadata={"positions": ["3"]}),
    ]
    reasons = []
    monkeypatch.setattr(
        "mmedge.cli.sheet._short",
        lambda _draw, text, *_, **__: reasons.append(text) or text,
    )
    draw_sheet("all", hits)
    expected = ["no file", "file is gone", "file is gone", "cannot be read", ".txt"]
    assert [each for each in reasons if each in {*expected, "needs mmedge[media]"}] == [
        *expected,
        "cannot be read",
    ]
    monkeypatch.setitem(sys.modules, "av", None)
    draw_sheet("video", hits[-1:])
    assert "needs mmedge[media]" in reasons
