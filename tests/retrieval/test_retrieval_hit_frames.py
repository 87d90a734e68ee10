"""Frames of hits in videos, read by the positions in an item's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from mmedge.errors import InputError
from mmedge.retrieval.hit_frames import HitFrames
from mmedge.retrieval.items import Match


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """A video of three frames, grey 0, 100 and 200."""
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for grey in (0, 100, 200):
            pixels = np.full((48, 64, 3), grey, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def match(video: Path, positions: Any) -> Match:
    return Match("v", 0.5, {"positions": positions}, None, str(video), None, 1)


def test_the_frame_of_a_part_is_read(video: Path) -> None:
    with av.open(str(video)) as container:
        stamps = [str(frame.pts) for frame in container.decode(container.streams.video[0])]
    with HitFrames() as frames:
        image = np.asarray(frames.read(match(video, stamps)))
        assert abs(float(image.mean()) - 100) < 10
        assert frames.read(match(video, stamps[:1])) is None


@pytest.mark.parametrize(
    "position", ["", "1.5", "x", "9" * 5000, str(2**70), {"n": 1}, None, float("inf"), [1]]
)
def test_a_position_that_is_none_is_refused(video: Path, position: object) -> None:
    with HitFrames() as frames, pytest.raises(InputError):
        frames.read(match(video, ["0", position]))
