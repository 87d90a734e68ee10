"""ROS image messages, raw and compressed, as images."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmedge.errors import InputError
from mmedge.specs import Array

__all__ = ["IMAGE_TYPES", "RAW_ENCODINGS", "image_of", "stamp_of"]

IMAGE_TYPES = frozenset({"sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"})

# Encoding -> bytes a pixel, and the channels that make RGB.
RAW_ENCODINGS: dict[str, tuple[int, tuple[int, ...]]] = {
    "rgb8": (3, (0, 1, 2)),
    "bgr8": (3, (2, 1, 0)),
    "8UC3": (3, (2, 1, 0)),
    "rgba8": (4, (0, 1, 2)),
    "bgra8": (4, (2, 1, 0)),
    "8UC4": (4, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)),
    "8UC1": (1, (0, 0, 0)),
    "mono16": (2, (0, 0, 0)),
}
"""Encodings of raw images that are read; of mono16 the upper eight bits."""


def image_of(message: Any, place: str) -> Array | bytes:  # noqa: ANN401, of a generated class
    """Return a message's image.

    Args:
        message: A sensor_msgs Image or CompressedImage.
        place: Topic and time, for messages.

    Returns:
        (H, W, 3) uint8 RGB of a raw image; the bytes of a compressed one's file.

    Raises:
        InputError: If the encoding is another, or the sizes disagree.
    """
    if not hasattr(message, "encoding"):
        packed = bytes(message.data)
        if not packed:
            raise InputError(f"{place}: the image is empty.")
        return packed
    encoding = str(message.encoding)
    if encoding not in RAW_ENCODINGS:
        raise InputError(
            f"{place}: got the encoding {encoding!r}, expected one of {', '.join(RAW_ENCODINGS)} "
            "or a compressed image. Convert the topic with image_proc or cv_bridge."
        )
    size, channels = RAW_ENCODINGS[encoding]
    height, width, step = int(message.height), int(message.width), int(message.step)
    data = np.frombuffer(bytes(message.data), np.uint8)
    if min(height, width) < 1 or step < width * size or len(data) < height * step:
        raise InputError(
            f"{place}: a {width}x{height} {encoding} image of {step} bytes a row has {len(data)} "
            "bytes. The recording is damaged."
        )
    rows = data[: height * step].reshape(height, step)[:, : width * size]
    pixels = rows.reshape(height, width, size)
    if encoding == "mono16":  # the more significant byte
        pixels = pixels[..., :1] if message.is_bigendian else pixels[..., 1:]
    return np.ascontiguousarray(pixels[..., list(channels)])


def stamp_of(message: Any, logged_ns: int) -> float:  # noqa: ANN401, of a generated class
    """Return the time of a message's header in seconds; without one, of its recording."""
    stamp = message.header.stamp
    seconds = float(stamp.sec) + float(stamp.nanosec) / 1e9
    return seconds if seconds > 0 else logged_ns / 1e9
