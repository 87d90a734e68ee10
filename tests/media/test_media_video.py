"""Frames chosen by change, on videos that the test encodes."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from mmedge.errors import InputError
from mmedge.media.video import Choosing, Video

FPS = 20


def write_video(path: Path, frames: list[np.ndarray], **metadata: str) -> Path:
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata)
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.bit_rate = 4_000_000
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def scene(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return coarse.repeat(8, axis=0).repeat(8, axis=1)


def test_a_still_scene_is_one_frame_and_each_shot_another(tmp_path: Path) -> None:
    blend = [(scene(1) * (1 - s) + scene(2) * s).astype(np.uint8) for s in (0.25, 0.5, 0.75)]
    shots = [scene(1)] * 40 + blend + [scene(2)] * 40 + [scene(3)] * 40
    with Video(write_video(tmp_path / "v.mp4", shots)) as video:
        frames = list(video)
        assert len(frames) == 3
        for frame, seed in zip(frames, (1, 2, 3), strict=True):
            assert np.abs(np.asarray(frame.item, np.int16) - scene(seed)).mean() < 12
        again = np.asarray(video.image_at(frames[1].position))
        np.testing.assert_array_equal(again, frames[1].item)
        assert 2.1 < frames[1].offset_s < 2.6


def test_a_moving_camera_and_a_long_still_are_sampled(tmp_path: Path) -> None:
    moving = [np.roll(scene(1), 2 * shift, axis=1) for shift in range(80)]
    path = write_video(tmp_path / "v.mp4", moving + [moving[-1]] * 80)
    with Video(path, Choosing(most_s=2.0)) as video:
        offsets = [frame.offset_s for frame in video]
    assert 4 <= len(offsets) <= 9
    assert max(np.diff(offsets)) <= 2.2


def test_the_time_is_read_from_the_file(tmp_path: Path) -> None:
    made = write_video(tmp_path / "a.mp4", [scene(1)] * 3, creation_time="2024-05-06T07:08:09Z")
    with Video(made) as video:
        assert [frame.time for frame in video] == [1714979289.0]
    with Video(write_video(tmp_path / "b.mp4", [scene(1)] * 3)) as video:
        assert [frame.time for frame in video] == [None]


def test_other_files_are_no_video(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Video(tmp_path / "gone.mp4")
    (tmp_path / "x.mp4").write_bytes(b"no video at all")
    with pytest.raises(InputError, match="not a video"):
        Video(tmp_path / "x.mp4")


@pytest.mark.parametrize("position", [10**6, 2**63, -(2**70)])
def test_a_position_without_a_frame_is_refused(tmp_path: Path, position: int) -> None:
    path = write_video(tmp_path / "v.mp4", [scene(1)] * 3)
    with Video(path) as video, pytest.raises(InputError, match="no frame at"):
        video.image_at(position)
