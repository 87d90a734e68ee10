"""Frames of cameras: bytes whose format, size and stride are declared."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

import numpy as np
from PIL import Image

from mmedge.errors import DTypeError, InputError, ShapeError
from mmedge.specs import Array

__all__ = ["FrameFormat", "RawFrame"]

FrameFormat: TypeAlias = Literal["rgb", "bgr", "yuyv", "nv12", "depth16"]

_PIXEL_BYTES: dict[str, int] = {"rgb": 3, "bgr": 3, "yuyv": 2, "nv12": 1, "depth16": 2}
# Weights of red and of blue in luma.
_LUMA: dict[str, tuple[float, float]] = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}
_DEPTH_MAX = 65_535


@dataclass(frozen=True, slots=True, eq=False)
class RawFrame:
    """A frame as a camera gives it, wherever an image is taken.

    Attributes:
        data: The bytes, or an array of uint8 or, for depth16, uint16, of any shape.
        format: `rgb`, `bgr`: 3 bytes per pixel. `yuyv` (YUY2): 4:2:2, bytes Y U Y V for two
            pixels. `nv12`: 4:2:0, a plane of Y, then one of U and V in turns of half the height.
            `depth16` (Z16, Y16): one 16-bit value per pixel, little-endian.
        width: Pixels; even for yuyv and nv12.
        height: Pixels; even for nv12.
        stride: Bytes from one row to the next, in both planes of nv12; None where rows follow
            each other without padding.
        matrix: Of YUV: `bt601` (most webcams) or `bt709` (most HD cameras).
        full_range: Whether YUV uses 0..255; else Y is in 16..235, and U and V in 16..240.
        near: Depth that becomes black, in the units of the data; smaller ones (0 means no
            measurement to most cameras) are black too.
        far: Depth that becomes white; larger ones are white too.

    Raises:
        InputError: If a declared value is unknown or out of range.
        ShapeError: If the data does not have as many bytes as was declared.
        DTypeError: If the data is an array of another type.
    """

    data: bytes | bytearray | memoryview | Array = field(repr=False)
    format: FrameFormat
    width: int
    height: int
    stride: int | None = None
    matrix: Literal["bt601", "bt709"] = "bt601"
    full_range: bool = False
    near: int = 0
    far: int = _DEPTH_MAX

    def __post_init__(self) -> None:
        if self.format not in get_args(FrameFormat):
            known = ", ".join(get_args(FrameFormat))
            raise InputError(f"RawFrame format: got {self.format!r}, expected one of {known}.")
        if self.matrix not in _LUMA:
            raise InputError(f"RawFrame matrix: got {self.matrix!r}, expected bt601 or bt709.")
        even_width, even_height = self.format in {"yuyv", "nv12"}, self.format == "nv12"
        if self.width < 1 or (even_width and self.width % 2):
            raise self._wrong("width", self.width, "an even number" if even_width else "1 or more")
        if self.height < 1 or (even_height and self.height % 2):
            raise self._wrong(
                "height", self.height, "an even number" if even_height else "1 or more"
            )
        if not 0 <= self.near < self.far <= _DEPTH_MAX:
            raise self._wrong("near, far", (self.near, self.far), "0 <= near < far <= 65535")
        row = self.width * _PIXEL_BYTES[self.format]
        if self._stride < row:
            raise self._wrong("stride", self.stride, f"{row} bytes or more, or None")
        if self.format == "depth16" and self._stride % 2:
            raise self._wrong("stride", self.stride, "an even number of bytes")
        expected = self._stride * (self.height * 3 // 2 if self.format == "nv12" else self.height)
        got = len(self._bytes())
        if got != expected:
            raise ShapeError(
                f"{self}: got {got} bytes, expected {expected}. Check format, width and height, "
                "and state the stride where the camera pads its rows."
            )

    def to_rgb(self) -> Image.Image:
        """Return the frame as an 8-bit RGB image.

        Chroma is that of the nearest sample, as in OpenCV. Depth becomes grey, from `near` to
        `far`, rounded to nearest.
        """
        size, data = (self.width, self.height), self._bytes()
        if self.format in {"rgb", "bgr"}:
            return Image.frombytes("RGB", size, data, "raw", self.format.upper(), self._stride, 1)
        rows = data.reshape(-1, self._stride)
        if self.format == "depth16":
            return Image.fromarray(self._grey(rows.view("<u2")[:, : self.width])).convert("RGB")
        if self.format == "yuyv":
            pairs = rows[:, : 2 * self.width].reshape(self.height, -1, 4)[..., [0, 1, 3, 2, 1, 3]]
        else:  # in six assignments: several times faster than to repeat the chroma
            luma = rows[: self.height, : self.width].reshape(self.height, -1, 2)
            chroma = rows[self.height :, : self.width].reshape(self.height // 2, 1, -1, 2)
            pairs = np.empty((self.height, self.width // 2, 6), np.uint8)
            pairs[..., 0], pairs[..., 3] = luma[..., 0], luma[..., 1]
            two_rows = pairs.reshape(self.height // 2, 2, -1, 6)
            for plane, (first, second) in enumerate(((1, 4), (2, 5))):
                two_rows[..., first] = two_rows[..., second] = chroma[..., plane]
        yuv = pairs.reshape(self.height, self.width, 3)
        return Image.fromarray(yuv).convert("RGB", self._to_rgb_matrix())

    def copy(self) -> RawFrame:
        """Return a frame with data of its own, for cameras that overwrite their buffers."""
        return replace(self, data=self._bytes().tobytes())

    def __str__(self) -> str:
        return f"RawFrame {self.format} {self.width}x{self.height}, stride {self._stride}"

    @property
    def _stride(self) -> int:
        row = self.width * _PIXEL_BYTES[self.format]
        return row if self.stride is None else self.stride

    def _bytes(self) -> Array:
        data = self.data
        if not isinstance(data, np.ndarray):
            return np.frombuffer(data, np.uint8)
        wide = data.dtype.kind == "u" and data.dtype.itemsize == 2
        if data.dtype != np.uint8 and not (wide and self.format == "depth16"):
            kinds = "uint8 or uint16" if self.format == "depth16" else "uint8"
            raise DTypeError(f"{self}: got an array of {data.dtype.name}, expected {kinds}.")
        little = data.astype("<u2", copy=False) if wide else data
        return np.ascontiguousarray(little).reshape(-1).view(np.uint8)

    def _grey(self, depth: Array) -> Array:
        span = self.far - self.near
        above = depth.clip(self.near, self.far).astype(np.uint32) - np.uint32(self.near)
        return ((above * 510 + span) // (2 * span)).astype(np.uint8)

    def _to_rgb_matrix(self) -> tuple[float, ...]:
        """Return Pillow's matrix, (3, 4) in a row: weights of Y, U, V, and the constant."""
        red, blue = _LUMA[self.matrix]
        green = 1 - red - blue
        black, luma, chroma = (0, 1.0, 1.0) if self.full_range else (16, 255 / 219, 255 / 224)
        u_blue, v_red = 2 * (1 - blue) * chroma, 2 * (1 - red) * chroma
        u_green, v_green = -u_blue * blue / green, -v_red * red / green
        rows = ((0.0, v_red), (u_green, v_green), (u_blue, 0.0))
        return tuple(
            value for u, v in rows for value in (luma, u, v, -black * luma - 128 * (u + v))
        )

    def _wrong(self, what: str, got: object, expected: str) -> InputError:
        return InputError(f"RawFrame {self.format} {what}: got {got}, expected {expected}.")
