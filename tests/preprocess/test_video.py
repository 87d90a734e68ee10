"""Videos: frames chosen from files, frames given, and what is refused."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from models.tiny_video import FRAMES, moving, write_video
from pydantic import ValidationError

from mmedge.errors import ImageError, InputError, ShapeError
from mmedge.preprocess.config import ImageConfig, VideoConfig
from mmedge.preprocess.image import ImageProcessor
from mmedge.preprocess.steps import Crop, Decode, Rescale, Resize
from mmedge.preprocess.video import VideoProcessor, is_video_source
from mmedge.preprocess.video_file import open_video, spread, spread_frames

STEPS = (
    Decode(),
    Resize(mode="shortest_edge", height=16, width=16, resample="bilinear"),
    Crop(height=16, width=16),
    Rescale(factor=1 / 255),
)
CONFIG = VideoConfig(frames=FRAMES, steps=STEPS)


def test_frames_are_prepared_as_images() -> None:
    videos = [moving(1), moving(2)]
    got = VideoProcessor(CONFIG)(videos)["pixel_values"]
    images = ImageProcessor(ImageConfig(steps=STEPS))
    assert got.shape == (2, FRAMES, 3, 16, 16)
    for video, rows in zip(videos, got, strict=True):
        np.testing.assert_array_equal(rows, images(video)["pixel_values"])
    np.testing.assert_array_equal(
        got, VideoProcessor(CONFIG)([list(v) for v in videos])["pixel_values"]
    )
    turned = VideoProcessor(CONFIG).with_options(channels="bgr")(videos)["pixel_values"]
    np.testing.assert_array_equal(turned, got[:, :, ::-1])


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [(4, 4, [0, 1, 2, 3]), (4, 8, [1, 3, 5, 7]), (1, 1, [0]), (3, 10, [1, 5, 8]), (1, 9, [4])],
)
def test_the_middle_of_each_part_is_taken(count: int, total: int, expected: list[int]) -> None:
    assert spread(count, total) == expected


def test_a_file_gives_frames_at_even_distances(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", moving(1, 12))
    chosen = list(spread_frames(path, FRAMES))
    with av.open(str(path)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(every) == 12
    for got, number in zip(chosen, (1, 4, 7, 10), strict=True):
        np.testing.assert_array_equal(got, every[number])
    prepared = VideoProcessor(CONFIG)([path, str(path)])["pixel_values"]
    expected = VideoProcessor(CONFIG)([np.stack(chosen)])["pixel_values"]
    np.testing.assert_array_equal(prepared, np.concatenate([expected] * 2))


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ([], ShapeError, "got no frames, the model takes 4"),
        (np.zeros((0, 8, 8, 3), np.uint8), ShapeError, "got no frames"),
        (moving(1, 3), ShapeError, r"got 3 frames, the model takes 4\. Pass that many"),
        (moving(1)[0], ShapeError, r"got an array \(48, 64, 3\), expected \(frames"),
        (b"video", InputError, "got bytes, expected the path of a video"),
        (7, InputError, "got int"),
        ([moving(1)[0]] * 3 + [b"damaged"], ImageError, r"images\[3\]"),
        ("nowhere.mp4", InputError, r"nowhere\.mp4: no such file"),
    ],
)
def test_what_is_no_video_is_refused(item: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VideoProcessor(CONFIG)([item])  # type: ignore[list-item]
    with pytest.raises(error, match=r"^videos\[1\]: "):
        VideoProcessor(CONFIG)([moving(1), item])  # type: ignore[list-item]


def test_calls_without_a_list_of_videos_are_refused() -> None:
    with pytest.raises(InputError, match=r"Pass \[video\]"):
        VideoProcessor(CONFIG)("v.mp4")
    with pytest.raises(InputError, match="got none"):
        VideoProcessor(CONFIG)([])


def test_files_that_cannot_be_used_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = write_video(tmp_path / "short.mp4", moving(1, 3))
    with pytest.raises(InputError, match=r"short\.mp4: 3 frames, the model takes 4"):
        list(spread_frames(short, 4))
    with pytest.raises(InputError, match=r"64x48 pixels, more than the 100 allowed"):
        open_video(short, max_pixels=100)
    junk = tmp_path / "junk.mp4"
    junk.write_bytes(b"no video at all" * 100)
    with pytest.raises(InputError, match=r"junk\.mp4: not a video that can be read"):
        list(spread_frames(junk, 4))
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    with pytest.raises(InputError, match=r"sound\.mp4: has no video stream"):
        list(spread_frames(sound, 4))
    unknown = write_video(tmp_path / "unknown.mkv", moving(1, 4))
    unknown.write_bytes(unknown.read_bytes().replace(b"V_MPEG4", b"V_NOSUC"))
    with pytest.raises(InputError, match=r"unknown\.mkv: has a codec that PyAV does not know"):
        list(spread_frames(unknown, 4))
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(InputError, match=r'pip install "mmedge\[media\]"'):
        list(spread_frames(short, 4))


def test_a_list_of_files_under_a_videos_name_opens_none_of_them(tmp_path: Path) -> None:
    write_video(tmp_path / "private.mp4", moving(1, 4))
    listed = tmp_path / "listed.mp4"
    listed.write_text("ffconcat version 1.0\nfile private.mp4\n")
    with pytest.raises(InputError, match="not a video"):
        open_video(listed)


def test_a_cut_file_is_an_error(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.ts", moving(1, 40))
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(InputError, match=r"v\.ts: "):
        list(spread_frames(path, FRAMES))


def test_frames_larger_than_the_file_states_are_refused(tmp_path: Path) -> None:
    path, large = write_video(tmp_path / "v.ts", moving(1, 40)), tmp_path / "large.ts"
    with av.open(str(large), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
        black = av.VideoFrame.from_ndarray(np.zeros((480, 640, 3), np.uint8), format="rgb24")
        for packet in [*stream.encode(black), *stream.encode()]:
            container.mux(packet)
    path.write_bytes(path.read_bytes() + large.read_bytes())
    with pytest.raises(InputError, match=r"v\.ts: 640x480 pixels, more than the 3072 allowed"):
        list(spread_frames(path, 41, max_pixels=64 * 48))


@pytest.mark.parametrize(
    ("item", "one"),
    [
        ("v.mp4", True),
        (Path("v.mp4"), True),
        (moving(1), True),
        (list(moving(1)), True),
        ([b"jpeg"], True),
        (["a.mp4", "b.mp4"], False),
        ([moving(1), moving(2)], False),
        ([list(moving(1))], False),
        (np.stack([moving(1), moving(2)]), False),
        ([], False),
    ],
)
def test_one_video_is_told_from_several(item: object, one: bool) -> None:
    assert is_video_source(item) is one


def test_steps_are_checked_as_those_of_images() -> None:
    with pytest.raises(ValidationError, match="expected decode, then at most one each"):
        VideoConfig(frames=2, steps=STEPS[1:])
    with pytest.raises(ValidationError):
        VideoConfig(frames=0, steps=STEPS)
