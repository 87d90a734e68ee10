"""Video files: opening, and frames at even distances. Needs PyAV, of the extra [media]."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmedge.errors import InputError
from mmedge.preprocess.decode import MAX_PIXELS
from mmedge.specs import Array

__all__ = ["VIDEO_SUFFIXES", "decoded", "decoding", "open_video", "spread", "spread_frames"]

VIDEO_SUFFIXES = frozenset(
    {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm"}
)

_FORMATS = "3g2,3gp,avi,m4a,m4v,matroska,mj2,mov,mp4,mpeg,mpegts,mpegvideo,webm"
"""Formats of these files. FFmpeg goes by content: a list of files may be named .mp4, too."""


def open_video(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[Any, Any]:
    """Open a video file.

    Args:
        path: The file.
        max_pixels: Videos of more pixels a frame are refused.

    Returns:
        PyAV's container, to be closed, and its first video stream.

    Raises:
        InputError: If it is no video that can be read, or PyAV is not installed.
    """
    av = _pyav(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file. Check the path.")
    try:
        container = av.open(str(path), options={"format_whitelist": _FORMATS})
    except (av.FFmpegError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a video that can be read ({error}).") from error
    reason = None
    if not container.streams.video:
        reason = "has no video stream"
    elif container.streams.video[0].codec_context is None:
        reason = "has a codec that PyAV does not know. Convert it to H.264"
    else:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        reason = _too_large(stream, max_pixels)
    if reason is not None:
        container.close()
        raise InputError(f"{path}: {reason}.")
    return container, stream


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Turn what PyAV raises while it decodes a file into an InputError that names it."""
    try:
        yield
    except (_pyav(path).FFmpegError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}). Copy it again.") from error


def decoded(
    path: Path,
    container: Any,  # noqa: ANN401, PyAV's
    stream: Any,  # noqa: ANN401
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Any]:
    """Yield PyAV's frames of an opened video.

    Raises:
        InputError: If it is damaged, or a frame is larger than allowed, whatever the file states.
    """
    with decoding(path):
        for frame in container.decode(stream):
            reason = _too_large(frame, max_pixels)
            if reason is not None:
                raise InputError(f"{path}: {reason}.")
            yield frame


def _too_large(shown: Any, max_pixels: int) -> str | None:  # noqa: ANN401, a stream or frame
    if shown.width * shown.height <= max_pixels:
        return None
    return (
        f"{shown.width}x{shown.height} pixels, more than the {max_pixels} allowed. Scale it down "
        "first"
    )


def spread(count: int, total: int) -> list[int]:
    """Return the middle frame of each of `count` equal parts of `total` frames."""
    return [(2 * part + 1) * total // (2 * count) for part in range(count)]


def spread_frames(path: Path, count: int, max_pixels: int = MAX_PIXELS) -> Iterator[Array]:
    """Yield frames of a video file at even distances: the middle one of each equal part.

    The file is read twice: once to count its frames, without decoding, and once up to the last
    frame that is needed.

    Args:
        path: The file.
        count: Frames.
        max_pixels: See open_video.

    Yields:
        (H, W, 3) uint8 RGB each, `count` of them.

    Raises:
        InputError: If it cannot be read, or has fewer frames.
    """
    container, stream = open_video(path, max_pixels)
    with container, decoding(path):
        total = sum(one.size > 0 and not one.is_discard for one in container.demux(stream))
    if total < count:
        raise InputError(
            f"{path}: {total} frames, the model takes {count}. Pass a longer video, or the frames "
            "themselves."
        )
    wanted = set(spread(count, total))
    seen = 0
    container, stream = open_video(path, max_pixels)
    with container, decoding(path):
        for frame in decoded(path, container, stream, max_pixels):
            if seen in wanted:
                wanted.remove(seen)
                yield frame.to_ndarray(format="rgb24")
                if not wanted:
                    return
            seen += 1
    raise InputError(f"{path}: damaged, {seen} of {total} frames can be decoded. Copy it again.")


def _pyav(path: Path) -> Any:  # noqa: ANN401, a module
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise InputError(
            f"{path}: videos: the package av is not installed. Install it with: "
            'pip install "mmedge[media]"'
        ) from error
