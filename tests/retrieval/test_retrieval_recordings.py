"""Recordings and videos in an index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from media.test_media_recordings import STAMP, write_bag
from media.test_media_video import scene, write_video

from mmedge.bundle import Bundle
from mmedge.media.recordings import Recording
from mmedge.retrieval.filters import Range
from mmedge.retrieval.index import Index
from mmedge.retrieval.recordings import index_recording, index_video


@pytest.fixture
def index(tiny_bundle: Bundle, tmp_path: Path) -> Index:
    return Index.create(tmp_path / "x.index", tiny_bundle.path)


def test_a_recording_is_an_item_a_frame_and_resumes(index: Index, tmp_path: Path) -> None:
    images = [("rgb8", scene(seed)) for seed in range(5)]
    made = write_bag(tmp_path / "drive", images)
    with index, Recording(made, "/cam") as recording:
        assert index_recording(index, index.bulk_model, recording) == 5
        assert index_recording(index, index.bulk_model, recording) == 0
        (best,) = index.search(scene(3), 1)
        assert best.time == STAMP + 3.5
        assert best.metadata["topic"] == "/cam"
        position = best.metadata["position"]
        assert isinstance(position, int)
        np.testing.assert_array_equal(recording.image_at(position), scene(3))
        late = index.search(scene(3), 9, where=Range("time", low=STAMP + 4))
        assert [match.time for match in late] == [STAMP + 4.5]


def test_a_video_is_one_item_with_its_frames(index: Index, tmp_path: Path) -> None:
    shots = [scene(seed) for seed in (1, 2, 3) for _ in range(20)]
    made = write_video(tmp_path / "v.mp4", shots)
    with index:
        assert index_video(index, index.bulk_model, made) == 3
        assert index_video(index, index.bulk_model, made) == 0
        assert len(index) == 1
        (match,) = index.search(scene(2), 5)
        assert match.id == "v.mp4"
        frames = match.metadata["frames"]
        assert isinstance(frames, list)
        assert len(frames) == 3
        (item,) = index.get(["v.mp4"])
        assert item is not None
        assert item.vectors.shape == (3, 4)
