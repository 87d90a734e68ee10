"""Image topics of MCAP files and ROS bags."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmedge.closing import Closing
from mmedge.errors import InputError
from mmedge.media.frames import Frame, require
from mmedge.media.ros_images import IMAGE_TYPES, image_of, stamp_of
from mmedge.preprocess.decode import ImageSource
from mmedge.specs import Modality

__all__ = ["Recording", "is_recording"]

_DAMAGED = (ValueError, KeyError, EOFError, OSError, struct.error, AssertionError, IndexError)


def is_recording(path: Path) -> bool:
    """Return whether a path is an MCAP file, a ROS 1 bag or a folder of a ROS 2 bag."""
    return path.suffix.lower() in (".mcap", ".bag") or (path / "metadata.yaml").is_file()


class Recording(Closing):
    """One image topic of a recording, as frames in the order in which they were recorded.

    The time of a frame is its header's; its position is when it was recorded, in nanoseconds.

    Args:
        path: An .mcap file (ROS 1 or ROS 2 messages), a .bag file, or a folder of a ROS 2 bag.
        topic: Which one; None for the only one with images.

    Raises:
        InputError: If it cannot be read, there is no such topic, several have images and none is
            named, or its messages are no images.
    """

    def __init__(self, path: Path, topic: str | None = None) -> None:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder. Check the path.")
        self._path = path
        made = _Mcap if path.suffix.lower() == ".mcap" and path.is_file() else _Bag
        self._file: _Mcap | _Bag = made(path)
        try:
            self.topic = _topic(path, self._file.topics, topic)
        except BaseException:
            self._file.close()
            raise

    @property
    def name(self) -> str:
        """The path and the topic."""
        return f"{self._path}:{self.topic}"

    @property
    def count(self) -> int | None:
        """How many messages the topic has; None if the file does not say."""
        return self._file.count(self.topic)

    def __iter__(self) -> Iterator[Frame]:
        """Yield a frame a message; see FrameSource."""
        first: int | None = None
        for logged_ns, message in self._messages():
            first = logged_ns if first is None else first
            yield Frame(
                image_of(message, f"{self.name} at {logged_ns} ns"),
                Modality.IMAGE,
                str(self._path),
                logged_ns,
                stamp_of(message, logged_ns),
                (logged_ns - first) / 1e9,
            )

    def image_at(self, position: int) -> ImageSource:
        """Return the image of a frame by its position.

        Raises:
            InputError: If there is none.
        """
        for logged_ns, message in self._messages(position):
            return image_of(message, f"{self.name} at {logged_ns} ns")
        raise InputError(f"{self.name}: has no message at {position} ns.")

    def close(self) -> None:
        """Close the files."""
        self._file.close()

    def _messages(self, only_ns: int | None = None) -> Iterator[tuple[int, Any]]:
        what = f"{self._path}: recordings"
        damaged = (
            require("rosbags.serde", what).SerdeError,
            require("rosbags.rosbag1", what).ReaderError,
            require("rosbags.rosbag2", what).ReaderError,
            require("mcap.exceptions", what).McapError,
        )
        try:
            yield from self._file.messages(self.topic, only_ns)
        except (*damaged, *_DAMAGED) as error:
            raise InputError(
                f"{self.name}: damaged ({type(error).__name__}: {error}). Record or copy it again."
            ) from error


def _topic(path: Path, topics: dict[str, str], wanted: str | None) -> str:
    """Return the topic to read.

    Args:
        path: For messages.
        topics: Message type by topic.
        wanted: A topic, or None for the only one with images.
    """
    images = sorted(name for name, kind in topics.items() if kind in IMAGE_TYPES)
    shown = ", ".join(images) or "none"
    if wanted is None:
        if len(images) == 1:
            return images[0]
        raise InputError(f"{path}: name one of its image topics with --topic: {shown}.")
    if wanted not in topics:
        raise InputError(f"{path}: has no topic {wanted!r}. Its image topics: {shown}.")
    if wanted not in images:
        raise InputError(
            f"{path}: {wanted} has messages of {topics[wanted]}, expected images. Its image "
            f"topics: {shown}."
        )
    return wanted


class _Mcap:
    """An MCAP file."""

    def __init__(self, path: Path) -> None:
        what = f"{path}: recordings"
        reader, errors = require("mcap.reader", what), require("mcap.exceptions", what)
        self._types = _Types(what)
        self._file = path.open("rb")
        try:
            self._reader = reader.make_reader(self._file)
            self._summary = self._reader.get_summary()
        except (errors.McapError, *_DAMAGED) as error:
            self._file.close()
            raise InputError(f"{path}: not an MCAP file that can be read ({error}).") from error
        if self._summary is None:
            self._file.close()
            raise InputError(
                f"{path}: has no summary, as after a recorder that was killed. Run: mcap recover"
            )

    @property
    def topics(self) -> dict[str, str]:
        """Message type by topic."""
        schemas = self._summary.schemas
        return {
            channel.topic: _ros2_name(schemas[channel.schema_id].name)
            for channel in self._summary.channels.values()
            if channel.schema_id in schemas and channel.message_encoding in ("cdr", "ros1")
        }

    def count(self, topic: str) -> int | None:
        """Messages of a topic."""
        statistics = self._summary.statistics
        if statistics is None:
            return None
        channels = [c.id for c in self._summary.channels.values() if c.topic == topic]
        return sum(int(statistics.channel_message_counts.get(channel, 0)) for channel in channels)

    def messages(self, topic: str, only_ns: int | None) -> Iterator[tuple[int, Any]]:
        """Yield the time of recording, ns, and the message."""
        end = None if only_ns is None else only_ns + 1
        found = self._reader.iter_messages([topic], starting_at=only_ns, ending_before=end)
        for schema, channel, message in found:
            ros1 = channel.message_encoding == "ros1"
            yield message.log_time, self._types.read(message.data, _ros2_name(schema.name), ros1)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _Bag:
    """A ROS 1 bag file or a folder of a ROS 2 bag."""

    def __init__(self, path: Path) -> None:
        what = f"{path}: recordings"
        self._ros1 = path.is_file()
        rosbag = require("rosbags.rosbag1" if self._ros1 else "rosbags.rosbag2", what)
        self._types = _Types(what)
        try:
            self._reader = rosbag.Reader(path)
            self._reader.open()
        except (rosbag.ReaderError, *_DAMAGED) as error:
            raise InputError(f"{path}: not a ROS bag that can be read ({error}).") from error

    @property
    def topics(self) -> dict[str, str]:
        """Message type by topic."""
        return {each.topic: each.msgtype for each in self._reader.connections}

    def count(self, topic: str) -> int | None:
        """Messages of a topic."""
        return int(self._reader.topics[topic].msgcount)

    def messages(self, topic: str, only_ns: int | None) -> Iterator[tuple[int, Any]]:
        """Yield the time of recording, ns, and the message."""
        connections = [each for each in self._reader.connections if each.topic == topic]
        end = None if only_ns is None else only_ns + 1
        for connection, logged_ns, data in self._reader.messages(connections, only_ns, end):
            yield logged_ns, self._types.read(data, connection.msgtype, self._ros1)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


class _Types:
    """The image messages of ROS, as it ships them.

    What a recording says of its types is never used: rosbags makes Python code of it and runs that.
    """

    def __init__(self, what: str) -> None:
        types = require("rosbags.typesys", what)
        self._ros1 = types.get_typestore(types.Stores.ROS1_NOETIC)
        self._ros2 = types.get_typestore(types.Stores.ROS2_HUMBLE)

    def read(self, data: bytes, name: str, ros1: bool) -> Any:  # noqa: ANN401
        """Return a message."""
        if ros1:
            return self._ros1.deserialize_ros1(data, name)
        return self._ros2.deserialize_cdr(data, name)


def _ros2_name(name: str) -> str:
    """Return a message type in ROS 2's form: sensor_msgs/msg/Image."""
    package, _, kind = name.rpartition("/")
    return name if "/msg" in package else f"{package}/msg/{kind}"
