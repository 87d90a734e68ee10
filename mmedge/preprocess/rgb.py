"""Conversion of Pillow modes and arrays to RGB, equal to transformers'."""

from __future__ import annotations

import struct
import zlib
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image

from mmedge.errors import DTypeError, ImageError, ShapeError
from mmedge.preprocess.steps import Alpha
from mmedge.specs import Array

__all__ = ["DAMAGED", "Channels", "array_to_rgb", "to_rgb"]

Channels: TypeAlias = Literal["rgb", "bgr"]

# Errors of Pillow's readers on damaged files. Warning: users may turn warnings into errors.
DAMAGED = (
    ArithmeticError,
    AssertionError,
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

# Readers that give 16-bit greyscale as 32-bit integers, scaled to 65535 whatever the file's range.
_UINT16_FORMATS = ("PPM", "PNG")
_BAND = 1 << 20  # pixels blended at once in float64, to bound memory


def to_rgb(image: Image.Image, alpha: Alpha, name: str) -> Image.Image:
    """Return a decoded image as RGB, itself where it is RGB already.

    16-bit greyscale is scaled to 8 bits, rounding to nearest. Floating-point images ("F") are
    taken as 0..1 where all their values lie there, as 0..255 otherwise.

    Raises:
        ImageError: If the mode or the range of values cannot be read as RGB.
    """
    try:
        has_alpha = "A" in image.getbands() or image.info.get("transparency") is not None
        if image.mode == "RGB" and (alpha == "drop" or not has_alpha):
            return image
        if image.mode.startswith("I;16"):
            return _from_uint16(np.asarray(image)).convert("RGB")
        if image.mode == "I":
            values = np.asarray(image)
            if image.format in _UINT16_FORMATS and int(values.min()) >= 0:
                return _from_uint16(values).convert("RGB")
            return _from_int32(values, name).convert("RGB")
        if image.mode == "F":
            return _from_float(np.asarray(image), name).convert("RGB")
        if has_alpha:
            image = image.convert("RGBA")
            if alpha == "white":
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except DAMAGED as error:
        raise ImageError(
            f"{name}: mode {image.mode} cannot be read as RGB ({error}). Convert it first."
        ) from error


def array_to_rgb(array: Array, channels: Channels, alpha: Alpha, name: str) -> Image.Image:
    """Return a uint8 array (H, W, 3), (H, W, 4), (H, W, 1) or (H, W) as an RGB image.

    Raises:
        ImageError: If values are NaN or infinite.
        DTypeError: If it is not uint8.
        ShapeError: If it has another shape.
    """
    if array.dtype != np.uint8:
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ImageError(f"{name}: NaN or infinite pixels. Check its source.")
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
            "them empty. Channels come last: array.transpose(1, 2, 0), or tensor.permute(1, 2, 0), "
            "where they come first."
        )
    if array.ndim == 2:
        return Image.fromarray(array).convert("RGB")
    if array.shape[2] == 4 and alpha == "white":
        array = _on_white(array[..., :3], array[..., 3:])
    # Pillow turns the channels and drops the fourth as it reads them: one pass, no copy.
    raw = ("BGR" if channels == "bgr" else "RGB") + ("X" if array.shape[2] == 4 else "")
    height, width = array.shape[:2]
    pixels = np.ascontiguousarray(array)
    return Image.frombytes("RGB", (width, height), pixels, "raw", raw, 0, 1)


def _on_white(colours: Array, alpha: Array) -> Array:
    """Blend in float64 and round as transformers does, where Pillow may differ by one."""
    blended = np.empty(colours.shape, np.uint8)
    rows = max(1, _BAND // colours.shape[1])
    for start in range(0, len(colours), rows):
        part = slice(start, start + rows)
        share = alpha[part] / 255
        blended[part] = np.round(share * colours[part] + (1 - share) * 255)
    return blended


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
        raise ImageError(f"{name}: NaN or infinite pixels. Check its source.")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 255:
        raise ImageError(
            f"{name}: floating-point pixels in [{low:g}, {high:g}], expected 0..1 or 0..255. "
            "Scale them and pass a uint8 array."
        )
    if high <= 1:
        values = values * np.float32(255)
    return Image.fromarray(np.rint(values).astype(np.uint8))
