"""From whatever holds a picture to an upright RGB image, equal to what transformers would see."""

from __future__ import annotations

import importlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
from PIL import Image, ImageFile, ImageOps

from mmedge.errors import DTypeError, ImageError, InputError, ShapeError
from mmedge.preprocess.steps import Alpha
from mmedge.specs import Array

__all__ = ["MAX_PIXELS", "ImageSource", "decode_image", "describe_source"]

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | Array
"""A path, the bytes of an image file, a PIL image, or a uint8 array (height, width, channels)."""

_Reader: TypeAlias = tuple[
    Callable[[IO[bytes], str | bytes], ImageFile.ImageFile],
    Callable[[bytes], bool | str] | None,
]

MAX_PIXELS = 89_478_485
"""Default limit on width x height: 256 MiB of RGB, the size at which Pillow begins to warn."""

# Formats by the module that reads them. Not every format of Pillow is here: some run an external
# program (EPS), and a device meets none of them. The first group is imported with Pillow itself.
_COMMON = {
    "JPEG": "JpegImagePlugin",
    "PNG": "PngImagePlugin",
    "BMP": "BmpImagePlugin",
    "GIF": "GifImagePlugin",
    "PPM": "PpmImagePlugin",
}
_FURTHER = {
    "WEBP": "WebPImagePlugin",
    "TIFF": "TiffImagePlugin",
    "JPEG2000": "Jpeg2KImagePlugin",
    "AVIF": "AvifImagePlugin",
}

# What Pillow's readers raise on damaged files. Warning: a user may have turned warnings to errors.
_DAMAGED = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    Warning,
    Image.DecompressionBombError,
    struct.error,
    zlib.error,
)


def decode_image(
    source: ImageSource, *, alpha: Alpha = "white", max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Return a picture as an upright RGB image.

    16-bit greyscale is scaled to 8 bits, rounding to nearest. Floating-point images ("F") are
    taken as 0..1 where all their values lie there, as 0..255 otherwise. Of an animation the first
    frame is taken. The EXIF orientation is applied to files and bytes; a PIL image is taken as it
    stands. An RGB image is returned as it is, not copied.

    Args:
        source: Path; bytes of an image file; PIL image; uint8 array (H, W, 3) RGB, (H, W, 4) RGBA,
            (H, W) or (H, W, 1) greyscale.
        alpha: `white` composites transparent pixels onto white, as transformers 5 does
            (`convert_to_rgb`); `drop` ignores the alpha channel.
        max_pixels: Larger pictures are refused before they are decoded.

    Raises:
        ImageError: If the source is missing, not an image, damaged or too large; it is named.
        ShapeError: If an array has another shape.
        DTypeError: If an array is not uint8.
        InputError: If the source is of another type.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, alpha, max_pixels)
    name = describe_source(source)
    if isinstance(source, Image.Image):
        _check_pixels(source.size, max_pixels, name)
        return _to_rgb(source, alpha, name)
    if isinstance(source, bytes):
        if not source:
            raise ImageError(f"{name}: got no bytes. Check where they come from.")
        return _read(io.BytesIO(source), alpha, max_pixels, name)
    if isinstance(source, (str, os.PathLike)):
        path = _checked_path(source)
        try:
            with path.open("rb") as file:
                return _read(file, alpha, max_pixels, name)
        except OSError as error:
            raise ImageError(f"{name}: cannot be read ({error.strerror or error}).") from error
    raise InputError(
        f"{name}: not a picture. Pass a path, the bytes of an image file, a PIL image, or a uint8 "
        "array of (height, width, 3)."
    )


def describe_source(source: object) -> str:
    """Return a short name of a picture for messages: its path, or what kind of thing it is."""
    if isinstance(source, (str, os.PathLike)):
        return f"Image '{os.fspath(source)}'"
    if isinstance(source, bytes):
        return f"Image of {len(source)} bytes"
    if isinstance(source, Image.Image):
        opened = getattr(source, "filename", "")
        return f"Image '{opened}'" if opened else f"PIL image {source.width}x{source.height}"
    if isinstance(source, np.ndarray):
        return f"Image array {source.shape}"
    return f"Image of type {type(source).__name__}"


def _checked_path(source: str | os.PathLike[str]) -> Path:
    name = describe_source(source)
    if not os.fspath(source):
        raise ImageError(f"{name}: the path is empty. Pass the path of an image file.")
    if str(source).startswith(("http://", "https://")):
        raise ImageError(f"{name}: addresses are not fetched. Download it and pass the path.")
    path = Path(source)
    try:
        if path.is_dir():
            raise ImageError(f"{name}: is a directory. Pass its files one by one.")
        if not path.exists():
            raise ImageError(f"{name}: no such file. Check the path.")
        if not path.is_file():
            raise ImageError(f"{name}: not a regular file. Read it and pass its bytes.")
        if path.stat().st_size == 0:
            raise ImageError(f"{name}: the file is empty. Fetch or write it again.")
    except (OSError, ValueError) as error:  # unreadable folder, name too long, NUL in the name
        raise ImageError(f"{name}: cannot be read ({error}).") from error
    return path


def _read(file: IO[bytes], alpha: Alpha, max_pixels: int, name: str) -> Image.Image:
    image = _open(file, name)
    with image:
        _check_pixels(image.size, max_pixels, name)
        try:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
        except _DAMAGED as error:
            raise ImageError(
                f"{name}: damaged or truncated ({error}). Fetch or write it again."
            ) from error
        return _to_rgb(image, alpha, name)


def _open(file: IO[bytes], name: str) -> Image.Image:
    """Read the header of an image file.

    `Image.open` would warn of, or refuse, a large picture by a limit that belongs to the process;
    asking the readers directly leaves the limit to us and the process's warnings alone.
    """
    prefix = file.read(16)
    reasons = []
    for formats in (_COMMON, _FURTHER):
        for image_format in formats:
            reader = _reader(image_format, formats[image_format])
            if reader is None:
                continue
            factory, accepts = reader
            accepted = not accepts or accepts(prefix)
            if isinstance(accepted, str):  # known, but this build of Pillow cannot read it
                reasons.append(accepted)
            elif accepted:
                file.seek(0)
                try:
                    return factory(file, "")
                except _DAMAGED as error:
                    reasons.append(f"{image_format}: {error}")
    why = f" ({'; '.join(reasons)})" if reasons else ""
    raise ImageError(
        f"{name}: not an image that can be read{why}. Expected one of "
        f"{', '.join([*_COMMON, *_FURTHER])}; open other formats yourself and pass the PIL image."
    )


def _reader(image_format: str, module: str) -> _Reader | None:
    """Return Pillow's (factory, accepts) for a format, or None where this build lacks it."""
    if image_format not in Image.OPEN:
        try:
            importlib.import_module(f"PIL.{module}")
        except ImportError:
            return None
    return Image.OPEN.get(image_format)


def _check_pixels(size: tuple[int, int], max_pixels: int, name: str) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width}x{height} pixels, more than the {max_pixels} allowed. Scale it down "
            "first, or raise max_pixels if you trust where it comes from."
        )
    if width * height == 0:
        raise ImageError(f"{name}: has no pixels ({width}x{height}).")


def _to_rgb(image: Image.Image, alpha: Alpha, name: str) -> Image.Image:
    try:
        has_alpha = "A" in image.getbands() or image.info.get("transparency") is not None
        if image.mode == "RGB" and not has_alpha:
            image.load()  # a PIL image that was opened and not yet read
            return image
        if image.mode.startswith("I;16"):
            return _from_uint16(np.asarray(image)).convert("RGB")
        if image.mode == "I":
            return _from_int32(np.asarray(image), name).convert("RGB")
        if image.mode == "F":
            return _from_float(np.asarray(image), name).convert("RGB")
        if has_alpha:
            image = image.convert("RGBA")
            if alpha == "drop":
                return image.convert("RGB")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
    except _DAMAGED as error:
        raise ImageError(
            f"{name}: mode {image.mode} cannot be read as RGB ({error}). Convert it first."
        ) from error


def _from_uint16(values: Array) -> Image.Image:
    # 65535 / 255 = 257 exactly; half of it rounds to nearest.
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _from_int32(values: Array, name: str) -> Image.Image:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 255:
        raise ImageError(
            f"{name}: 32-bit integer pixels in [{low}, {high}], whose scale is unknown. Scale them "
            "to 0..255 and pass a uint8 array."
        )
    return Image.fromarray(values.astype(np.uint8))


def _from_float(values: Array, name: str) -> Image.Image:
    if not np.isfinite(values).all():
        raise ImageError(f"{name}: NaN or infinite pixels. Check what produced it.")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 255:
        raise ImageError(
            f"{name}: floating-point pixels in [{low:g}, {high:g}], expected 0..1 or 0..255. "
            "Scale them and pass a uint8 array."
        )
    if high <= 1:
        values = values * np.float32(255)
    return Image.fromarray(np.rint(values).astype(np.uint8))


def _from_array(array: Array, alpha: Alpha, max_pixels: int) -> Image.Image:
    name = describe_source(array)
    if array.dtype != np.uint8:
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise ImageError(f"{name}: NaN or infinite pixels. Check what produced it.")
        raise DTypeError(
            f"{name}: got dtype {array.dtype.name}, expected uint8. Scale the values to 0..255 and "
            "convert with array.astype('uint8'); a preprocessed float32 batch has four axes, "
            "(batch, 3, height, width)."
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or 0 in array.shape:
        raise ShapeError(
            f"{name}: expected (height, width, 3), (height, width, 4) or (height, width), none of "
            "them empty. Channels come last: array.transpose(1, 2, 0) where they come first."
        )
    _check_pixels((array.shape[1], array.shape[0]), max_pixels, name)
    if array.ndim == 3 and array.shape[2] == 4 and alpha == "drop":
        array = np.ascontiguousarray(array[..., :3])
    elif array.ndim == 3 and array.shape[2] == 4:
        # transformers blends arrays in float64 and rounds, where Pillow's own compositing may
        # differ by one; equal to the reference goes first.
        share = array[..., 3:] / 255
        array = np.round(share * array[..., :3] + (1 - share) * 255).astype(np.uint8)
    image = Image.fromarray(array)
    return image if image.mode == "RGB" else image.convert("RGB")
