"""Image topics of bags and MCAP files that the test writes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rosbags.rosbag1 import Writer as Writer1
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from mmedge.errors import InputError
from mmedge.media.recordings import Recording, is_recording

RGB = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
STAMP = 1_700_000_000


def write_bag(
    path: Path, images: list[tuple[str, np.ndarray]], *, ros1: bool = False, mcap: bool = True
) -> Path:
    """A raw image topic with a message a second, and a compressed one of one JPEG."""
    store = get_typestore(Stores.ROS1_NOETIC if ros1 else Stores.ROS2_HUMBLE)
    types = store.types
    stamp, header = types["builtin_interfaces/msg/Time"], types["std_msgs/msg/Header"]
    plugin = StoragePlugin.MCAP if mcap else StoragePlugin.SQLITE3
    serialize = store.serialize_ros1 if ros1 else store.serialize_cdr

    def head(second: int) -> object:
        extra = {"seq": 0} if ros1 else {}
        return header(stamp=stamp(sec=STAMP + second, nanosec=500_000_000), frame_id="", **extra)

    with Writer1(path) if ros1 else Writer(path, version=9, storage_plugin=plugin) as bag:
        raw = bag.add_connection("/cam", "sensor_msgs/msg/Image", typestore=store)
        for second, (encoding, pixels) in enumerate(images):
            message = types["sensor_msgs/msg/Image"](
                header=head(second),
                height=pixels.shape[0],
                width=pixels.shape[1],
                encoding=encoding,
                is_bigendian=0,
                step=pixels[0].nbytes,
                data=np.frombuffer(pixels.tobytes(), np.uint8),
            )
            bag.write(raw, 1_000_000_000 * (second + 1), serialize(message, raw.msgtype))
        packed = bag.add_connection("/jpg", "sensor_msgs/msg/CompressedImage", typestore=store)
        jpeg = io.BytesIO()
        Image.fromarray(RGB).save(jpeg, "JPEG")
        data = np.frombuffer(jpeg.getvalue(), np.uint8)
        message = types["sensor_msgs/msg/CompressedImage"](header=head(0), format="jpeg", data=data)
        bag.write(packed, 5, serialize(message, packed.msgtype))
        other = bag.add_connection("/clock", "builtin_interfaces/msg/Time", typestore=store)
        bag.write(other, 5, serialize(stamp(sec=1, nanosec=0), other.msgtype))
    return next(path.glob("*.mcap")) if mcap and not ros1 else path


@pytest.mark.parametrize("kind", ["mcap", "folder of mcap", "folder of sqlite3", "ros1"])
def test_frames_have_their_headers_time(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.bag" if kind == "ros1" else "a")
    made = write_bag(path, [("rgb8", RGB)] * 3, ros1=kind == "ros1", mcap="mcap" in kind)
    place = made if kind == "mcap" else path
    assert is_recording(place)
    with Recording(place, "/cam") as recording:
        frames = list(recording)
        assert recording.count == 3
        assert [frame.time for frame in frames] == [STAMP + second + 0.5 for second in range(3)]
        assert [frame.offset_s for frame in frames] == [0, 1, 2]
        np.testing.assert_array_equal(frames[2].item, RGB)
        np.testing.assert_array_equal(recording.image_at(frames[1].position), RGB)
        with pytest.raises(InputError, match="no message at 7 ns"):
            recording.image_at(7)
    with Recording(place, "/jpg") as recording:
        (frame,) = recording
        assert isinstance(frame.item, bytes)
        assert Image.open(io.BytesIO(frame.item)).size == (3, 2)


GREY = RGB[..., 0]


@pytest.mark.parametrize(
    ("encoding", "pixels", "expected"),
    [
        ("bgr8", RGB[..., ::-1], RGB),
        ("rgba8", np.dstack([RGB, GREY]), RGB),
        ("bgra8", np.dstack([RGB[..., ::-1], GREY]), RGB),
        ("mono8", GREY, np.dstack([GREY] * 3)),
        ("mono16", GREY.astype("<u2") * 256 + 7, np.dstack([GREY] * 3)),
    ],
)
def test_raw_encodings(
    tmp_path: Path, encoding: str, pixels: np.ndarray, expected: np.ndarray
) -> None:
    with Recording(write_bag(tmp_path / "a", [(encoding, pixels)]), "/cam") as recording:
        (frame,) = recording
    np.testing.assert_array_equal(frame.item, expected)


def test_another_encoding_is_named(tmp_path: Path) -> None:
    made = write_bag(tmp_path / "a", [("bayer_rggb8", GREY)])
    with Recording(made, "/cam") as recording, pytest.raises(InputError, match="'bayer_rggb8'"):
        list(recording)


def test_topics_are_named(tmp_path: Path) -> None:
    made = write_bag(tmp_path / "a", [("rgb8", RGB)])
    for topic, message in (
        (None, "--topic: /cam, /jpg"),
        ("/no", "no topic '/no'"),
        ("/clock", "expected images"),
    ):
        with pytest.raises(InputError, match=message):
            Recording(made, topic)


@pytest.mark.parametrize("name", ["x.mcap", "x.bag"])
def test_missing_and_damaged_recordings_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no such file"):
        Recording(tmp_path / name)
    (tmp_path / name).write_bytes(b"\x89MCAP0\r\n" + b"x" * 64)
    with pytest.raises(InputError, match=r"can(not)? be read"):
        Recording(tmp_path / name)
