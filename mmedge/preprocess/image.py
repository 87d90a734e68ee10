"""Image preprocessing to float tensors, in Pillow and numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from mmedge.errors import DTypeError, ImageError, InputError, ShapeError
from mmedge.preprocess.config import ImageConfig
from mmedge.preprocess.decode import (
    Channels,
    ImageOptions,
    ImageSource,
    array_of,
    decode_image,
    is_image_source,
)
from mmedge.preprocess.patches import cut, patch_grid
from mmedge.preprocess.steps import (
    Alpha,
    Crop,
    Decode,
    Normalize,
    Pad,
    Patches,
    Rescale,
    Resize,
)
from mmedge.preprocess.zoom import gaussian_resize
from mmedge.specs import Array, Float32Array, Modality

__all__ = ["ImageProcessor"]

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


class ImageProcessor:
    """Resize, crop, rescale and normalise as the source does, bit for bit.

    The source is a Pillow processor of transformers, or open_clip's transform of torchvision.

    A processor holds no state between calls and may be used from several threads at once.

    Args:
        config: The bundle's frozen configuration.
        options: Image options of the caller.
    """

    modality: ClassVar[Modality] = Modality.IMAGE

    def __init__(self, config: ImageConfig, options: ImageOptions | None = None) -> None:
        self.config = config
        self.options = options or ImageOptions()
        decode = config.find(Decode) or Decode()
        self._alpha, self._draft = decode.alpha, decode.jpeg_draft
        self._resize, self._crop = config.find(Resize), config.find(Crop)
        self._patches = config.find(Patches)
        self._fill = 0 if self._crop is None else self._crop.fill
        self._smooth = self._resize is not None and self._resize.resample == "gaussian"
        # A JPEG of twice the size gives the same output as the whole one: a cosine of 1.0000.
        edge = (0, 0) if self._resize is None else (self._resize.height, self._resize.width)
        self._least_side = 2 * max(edge)
        self._table = _lookup_table(config)

    @classmethod
    def open(cls, config: ImageConfig, folder: Path) -> ImageProcessor:  # noqa: ARG003
        """Open from a bundle's folder, which images do not use."""
        return cls(config)

    def example(self) -> Array:
        """Return an image, twice as wide as high: a gradient, (64, 128, 3) uint8."""
        gradient: Array = np.indices((64, 128, 3)).sum(axis=0).astype(np.uint8)
        return gradient

    def with_options(
        self,
        *,
        channels: Channels | None = None,
        alpha: Alpha | None = None,
        max_pixels: int | None = None,
    ) -> ImageProcessor:
        """Return a processor with other options; None keeps the current value."""
        if channels is None and alpha is None and max_pixels is None:
            return self
        known = self.options
        options = ImageOptions(
            channels or known.channels,
            alpha or known.alpha,
            known.max_pixels if max_pixels is None else max_pixels,
        )
        return ImageProcessor(self.config, options)

    @property
    def least_side(self) -> int:
        """Shortest side, in pixels, of a JPEG decoded at a fraction of its size; 0 for never."""
        return self._least_side

    @property
    def pads(self) -> bool:
        """Whether images are padded to a square, at the right or the bottom."""
        return self.config.find(Pad) is not None

    @property
    def output_size(self) -> tuple[int, int] | None:
        """Height and width of every prepared frame, None if they depend on the image."""
        if self._crop is not None:
            return self._crop.height, self._crop.width
        if self._resize is not None and self._resize.mode == "exact":
            return self._resize.height, self._resize.width
        return None

    def decode(
        self, source: ImageSource, *, shrink: bool = False, whole: bool = False
    ) -> Image.Image:
        """Return an image as upright RGB: see decode_image.

        Args:
            source: As for decode_image.
            shrink: Decode a large JPEG at a fraction of its size even if the bundle does not.
            whole: Never do so: one above max_pixels is refused.
        """
        return decode_image(
            source,
            self.options,
            alpha=self._alpha,
            least_side=0 if whole else self._least_side,
            shrink=shrink or self._draft,
        )

    def resize(self, image: Image.Image) -> Array:
        """Resize and centre-crop an RGB image.

        Args:
            image: In mode RGB, as decode returns it.

        Returns:
            (height, width, 3) uint8, C-contiguous; float32 in 0..255 after a Gaussian resize.

        Raises:
            ImageError: If there is no crop and so long an image would have more than max_pixels
                after the resize, or more patches than the model takes.
            InputError: If the image is not RGB.
        """
        if image.mode != "RGB":
            raise InputError(f"Image mode: got {image.mode}, expected RGB. Pass it through decode.")
        if self._smooth and self._resize is not None:
            height, width = self._resize.height, self._resize.width
            return gaussian_resize(np.asarray(image), height, width, square=self.pads)
        if self._patches is not None:
            step = self._patches
            rows, columns = patch_grid(step, *image.size)
            shown = image.resize((columns * step.size, rows * step.size), _RESAMPLE[step.resample])
            return np.asarray(shown)
        size = image.size if self._resize is None else _resized(self._resize, image.size)
        box = (0, 0, *size)
        if self._crop is not None:
            box = _window(self._crop, size)
        if self._resize is not None and size != image.size:
            resample = _RESAMPLE[self._resize.resample]
            if size[0] * size[1] <= self.options.max_pixels:
                image = image.resize(size, resample)
            elif self._crop is not None:
                return np.asarray(_resize_part(image, size, box, resample, self._fill))
            else:
                raise ImageError(
                    f"Image of {image.width}x{image.height} pixels: too long and thin, it would be "
                    f"{size[0]}x{size[1]} after the resize, more than the "
                    f"{self.options.max_pixels} pixels allowed. Crop it first, or raise max_pixels "
                    "of load or encode_image."
                )
        return np.asarray(image if box == (0, 0, *image.size) else _cut(image, box, self._fill))

    def normalize(self, frames: Array) -> Float32Array:
        """Rescale and normalise frames.

        Args:
            frames: (N, H, W, 3), as `resize` returns them.

        Returns:
            (N, 3, H, W) float32, C-contiguous.

        Raises:
            ShapeError: If the shape differs.
            DTypeError: If the frames are not uint8, or float32 after a Gaussian resize.
        """
        dtype = np.dtype(np.float32 if self._smooth else np.uint8)
        if frames.dtype != dtype:
            raise DTypeError(f"Frames: got dtype {frames.dtype.name}, expected {dtype.name}.")
        if frames.ndim != 4 or frames.shape[3] != 3:
            raise ShapeError(f"Frames: got {frames.shape}, expected (batch, height, width, 3).")
        count, height, width, _ = frames.shape
        out = np.empty((count, 3, height, width), np.float32)
        self._normalize_into(frames, out)
        return out

    def __call__(self, items: Sequence[ImageSource]) -> dict[str, Array]:
        """Prepare images.

        Args:
            items: Images, or an array of frames (N, H, W, 3) uint8.

        Returns:
            (N, 3, h, w) float32, C-contiguous, by the configured input; for patches, (N, count,
            values) float32, and (N, 2) int64 by the input of their rows and columns.

        Raises:
            InputError: If an image cannot be used (ImageError, ShapeError, DTypeError; see
                decode_image), if there is none, or, without resize and crop, if their sizes
                differ. Where there are several, the message begins with the image's position.
        """
        _check_is_sequence(items)
        if self.output_size is not None:
            out = np.empty((len(items), 3, *self.output_size), np.float32)
            self.into(items, out)
            return {self.config.input: out}
        frames = [self._frame(image, _place(items, i)) for i, image in enumerate(items)]
        if self._patches is not None:
            return self.cut(frames)
        sizes = {frame.shape[:2] for frame in frames}
        if len(sizes) != 1:
            raise ShapeError(
                f"Images of several sizes {sorted(sizes)} do not fit into one batch: this model "
                "neither resizes nor crops to one size. Pass them one by one."
            )
        return {self.config.input: self.normalize(np.stack(frames))}

    def cut(self, frames: Sequence[Array]) -> dict[str, Array]:
        """Normalise frames of several sizes, as `resize` returns them, and cut them into patches.

        Returns:
            By graph input: see __call__.

        Raises:
            InputError: If the model takes no patches.
        """
        step = self._patches
        if step is None:
            raise InputError("Patches: the model takes images of one size. Use normalize.")
        made = [cut(step, self.normalize(frame[None])[0]) for frame in frames]
        patches, shapes = (np.stack(arrays) for arrays in zip(*made, strict=True))
        return {self.config.input: patches, step.shapes: shapes}

    def buffers(self, count: int) -> dict[str, Array] | None:
        """Return empty arrays for `count` images by graph input, None if sizes vary."""
        step, size = self._patches, self.output_size
        if step is not None:
            values = np.empty((count, step.count, 3 * step.size**2), np.float32)
            return {self.config.input: values, step.shapes: np.empty((count, 2), np.int64)}
        if size is None:
            return None
        return {self.config.input: np.empty((count, 3, *size), np.float32)}

    def into(self, images: Sequence[ImageSource], out: Float32Array) -> None:
        """Prepare images into a buffer, such as an input of `Session.bind`.

        Args:
            images: As for a call, N of them.
            out: (N, 3, h, w) float32, written in place. Undefined if an error is raised.

        Raises:
            InputError: As for a call, and if `out` does not fit.
        """
        _check_is_sequence(images)
        if self._patches is not None:
            raise InputError("Output buffer: the model takes patches. Call the processor instead.")
        if out.dtype != np.float32:
            raise DTypeError(f"Output buffer: got dtype {out.dtype.name}, expected float32.")
        if out.ndim != 4 or out.shape[:2] != (len(images), 3):
            raise ShapeError(
                f"Output buffer: got {out.shape}, expected ({len(images)}, 3, height, width)."
            )
        for position, image in enumerate(images):
            frame = self._frame(image, _place(images, position))
            if frame.shape[:2] != out.shape[2:]:
                raise ShapeError(
                    f"Output buffer: got {out.shape}, expected "
                    f"({len(images)}, 3, {frame.shape[0]}, {frame.shape[1]})."
                )
            self._normalize_into(frame[None], out[position : position + 1])

    def _frame(self, source: ImageSource, place: str) -> Array:
        try:
            return self.resize(self.decode(source))
        except InputError as error:
            if not place:
                raise
            raise type(error)(f"{place}: {error}") from error

    def _normalize_into(self, frames: Array, out: Float32Array) -> None:
        if self._smooth:
            _normalize_floats(self.config, frames, out)
            return
        for channel in range(3):
            # mode="clip" skips a bounds check; a uint8 is always in the table.
            np.take(self._table[channel], frames[..., channel], out=out[:, channel], mode="clip")


def _normalize_floats(config: ImageConfig, frames: Array, out: Float32Array) -> None:
    """Write frames (N, H, W, 3) float32 of 0..255, rescaled and normalised, as (N, 3, H, W)."""
    rescale, normalize = config.find(Rescale), config.find(Normalize)
    factor = np.float32(1.0 if rescale is None else rescale.factor)
    np.multiply(frames.transpose(0, 3, 1, 2), factor, out=out)
    if normalize is not None:
        out -= np.array(normalize.mean, np.float32)[:, None, None]
        out /= np.array(normalize.std, np.float32)[:, None, None]


def _lookup_table(config: ImageConfig) -> Float32Array:
    """Return the float of every uint8 value: (3, 256) float32.

    In the steps and roundings of transformers' image_transforms: rescale in float64 rounded to
    float32, then subtract and divide in float32. A table is as fast as a multiply-add to within
    0.05 ms for 224x224, and unlike one it is bitwise equal to the reference.
    """
    rescale, normalize = config.find(Rescale), config.find(Normalize)
    factor = 1.0 if rescale is None else rescale.factor
    table: Float32Array = (np.arange(256, dtype=np.float64) * factor).astype(np.float32)
    if normalize is None:
        return np.tile(table, (3, 1))
    mean = np.array(normalize.mean, np.float32)[:, None]
    std = np.array(normalize.std, np.float32)[:, None]
    normalized: Float32Array = (table - mean) / std
    return normalized


def _resized(resize: Resize, size: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) after the resize: see Resize.mode."""
    if resize.mode == "exact":
        return resize.width, resize.height
    width, height = size
    if resize.mode != "shortest_edge":
        ratios = height / resize.height, width / resize.width
        ratio = min(ratios) if resize.mode == "cover" else max(ratios)
        return max(round(width / ratio), 1), max(round(height / ratio), 1)
    if width <= height:
        return resize.height, int(resize.height * height / width)
    return int(resize.height * width / height), resize.height


def _window(crop: Crop, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a crop, beyond the image where that is smaller."""
    margins = size[0] - crop.width, size[1] - crop.height
    if crop.rounding == "down":
        # Floor division on a negative difference is the padding of transformers' center_crop.
        left, top = (margin // 2 for margin in margins)
    else:
        left, top = (round(each / 2) if each >= 0 else -(-each // 2) for each in margins)
    return left, top, left + crop.width, top + crop.height


def _cut(image: Image.Image, box: tuple[int, int, int, int], fill: int) -> Image.Image:
    """Return `image.crop(box)` with a grey of `fill` beyond the border."""
    if fill == 0:
        return image.crop(box)
    canvas = Image.new("RGB", (box[2] - box[0], box[3] - box[1]), (fill, fill, fill))
    canvas.paste(image, (-box[0], -box[1]))
    return canvas


def _resize_part(
    image: Image.Image,
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    resample: Image.Resampling,
    fill: int,
) -> Image.Image:
    """Return `image.resize(size, resample).crop(box)`, computing only the box.

    Equal to it within a step of uint8, except where a filter overshoots black or white, since
    Pillow chooses the order of its two passes by size, and where `nearest` or `box` jumps.
    """
    shown = (max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1]))
    scales = [before / after for before, after in zip(image.size, size, strict=True)]
    source, part = [0.0] * 4, [0] * 4
    for axis, (scale, length) in enumerate(zip(scales, image.size, strict=True)):
        low, high = shown[axis] * scale, shown[axis + 2] * scale
        reach = math.ceil(3 * max(scale, 1)) + 2  # reach of the largest filter beyond the box
        start = max(0, math.floor(low) - reach)
        part[axis], part[axis + 2] = start, min(length, math.ceil(high) + reach)
        source[axis], source[axis + 2] = low - start, min(high, length) - start
    width, height = shown[2] - shown[0], shown[3] - shown[1]
    resized = image.crop((part[0], part[1], part[2], part[3])).resize(
        (width, height), resample, (source[0], source[1], source[2], source[3])
    )
    left, top = box[0] - shown[0], box[1] - shown[1]
    return _cut(resized, (left, top, left + box[2] - box[0], top + box[3] - box[1]), fill)


def _check_is_sequence(images: object) -> None:
    images = array_of(images)
    if is_image_source(images) or (isinstance(images, np.ndarray) and images.ndim in (2, 3)):
        raise InputError("Images: got a single image, expected a sequence. Pass [image].")
    if not isinstance(images, (Sequence, np.ndarray)):
        raise InputError(
            f"Images: got {type(images).__name__}, expected a sequence. Pass list(images)."
        )
    if len(images) == 0:
        raise InputError("Images: got none, expected at least one.")


def _place(images: Sequence[ImageSource], position: int) -> str:
    return f"images[{position}]" if len(images) > 1 else ""
