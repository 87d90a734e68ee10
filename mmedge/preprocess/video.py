"""Video preprocessing: frames at even distances, each prepared as an image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, TypeAlias, TypeGuard, cast

import numpy as np

from mmedge.errors import InputError, ShapeError
from mmedge.preprocess.config import VideoConfig
from mmedge.preprocess.decode import Channels, ImageOptions, ImageSource, array_of
from mmedge.preprocess.image import ImageProcessor
from mmedge.preprocess.steps import Alpha
from mmedge.preprocess.video_file import spread_frames
from mmedge.specs import Array, Modality

__all__ = ["VideoProcessor", "VideoSource", "is_video_source"]

VideoSource: TypeAlias = str | os.PathLike[str] | Sequence[ImageSource] | Array
"""The path of a video file, or exactly the frames that the model takes: a list of images, or a
uint8 array (frames, height, width, 3)."""


def is_video_source(item: object) -> TypeGuard[VideoSource]:
    """Return whether an item is one video; a list of paths is several, a list of arrays one."""
    if isinstance(item, (str, os.PathLike)):
        return True
    array = array_of(item)
    if isinstance(array, np.ndarray):
        return array.ndim == 4
    first = next(iter(item), None) if isinstance(item, Sequence) else None
    several = first is None or isinstance(first, (str, os.PathLike, list, tuple))
    frame = array_of(first)
    return not several and not (isinstance(frame, np.ndarray) and frame.ndim == 4)


class VideoProcessor:
    """Choose frames of a file, and prepare each frame as ImageProcessor does.

    Args:
        config: The bundle's frozen configuration.
        options: Image options of the caller.
    """

    modality: ClassVar[Modality] = Modality.VIDEO

    def __init__(self, config: VideoConfig, options: ImageOptions | None = None) -> None:
        self.config = config
        self._images = ImageProcessor(config.image, options)

    @classmethod
    def open(cls, config: VideoConfig, folder: Path) -> VideoProcessor:  # noqa: ARG003
        """Open from a bundle's folder, which videos do not use."""
        return cls(config)

    def example(self) -> Array:
        """Return a video in which a gradient moves: (frames, 64, 128, 3) uint8."""
        image = self._images.example()
        return np.stack([np.roll(image, 8 * n, axis=1) for n in range(self.config.frames)])

    def with_options(
        self,
        *,
        channels: Channels | None = None,
        alpha: Alpha | None = None,
        max_pixels: int | None = None,
    ) -> VideoProcessor:
        """Return a processor with other image options; None keeps the current value."""
        images = self._images.with_options(channels=channels, alpha=alpha, max_pixels=max_pixels)
        return VideoProcessor(self.config, images.options)

    def __call__(self, items: Sequence[VideoSource]) -> dict[str, Array]:
        """Prepare videos.

        Args:
            items: N of them: see VideoSource.

        Returns:
            (N, frames, 3, h, w) float32, by the configured input.

        Raises:
            InputError: If a video cannot be used (ImageError, ShapeError, DTypeError: a frame of
                it), or there is none. Where there are several, the message begins with the
                video's position.
        """
        if isinstance(items, (str, os.PathLike)):
            raise InputError("Videos: got a single video, expected a list. Pass [video].")
        if len(items) == 0:
            raise InputError("Videos: got none, expected at least one.")
        names = [
            f"videos[{position}]: " if len(items) > 1 else "" for position in range(len(items))
        ]
        made = [self._prepare(item, name) for item, name in zip(items, names, strict=True)]
        return {self.config.input: np.stack(made)}

    def _prepare(self, item: VideoSource, name: str) -> Array:
        """Return the frames of one video, (frames, 3, h, w) float32."""
        try:
            if not isinstance(item, (str, os.PathLike)):
                return self._images(self._frames(item))[self.config.input]
            return self._prepare_file(Path(os.fspath(item)))
        except InputError as error:
            raise type(error)(f"{name}{error}") from error

    def _prepare_file(self, path: Path) -> Array:
        """Prepare a file frame by frame: all of them decoded may not fit in memory."""
        read = spread_frames(path, self.config.frames, self._images.options.max_pixels)
        frames = [self._images([frame])[self.config.input][0] for frame in read]
        sizes = {frame.shape[1:] for frame in frames}
        if len(sizes) != 1:
            raise ShapeError(f"{path}: frames of sizes {sorted(sizes)}, expected one size.")
        return np.stack(frames)

    def _frames(self, item: Sequence[ImageSource] | Array) -> Sequence[ImageSource]:
        """Return the frames of a video in memory.

        Raises:
            InputError: If it is no video.
            ShapeError: If it has no frames, or not as many as the model takes.
        """
        wanted = self.config.frames
        frames: object = array_of(item) if isinstance(array_of(item), np.ndarray) else item
        if isinstance(frames, np.ndarray) and frames.ndim != 4:
            raise ShapeError(
                f"Video: got an array {frames.shape}, expected (frames, height, width, 3)."
            )
        if isinstance(frames, bytes) or not isinstance(frames, (Sequence, np.ndarray)):
            raise InputError(
                f"Video: got {type(item).__name__}, expected the path of a video, a list of "
                "frames or an array (frames, height, width, 3)."
            )
        if len(frames) != wanted:
            some = f"{len(frames)} frames" if len(frames) else "no frames"
            raise ShapeError(
                f"Video: got {some}, the model takes {wanted}. Pass that many, at even distances, "
                "or the path of the video."
            )
        return cast("Sequence[ImageSource]", frames)
