"""RawFrame: the pixels of each format, and frames that are not what was declared."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmedge.errors import DTypeError, InputError, ShapeError
from mmedge.preprocess import RawFrame, decode_image
from mmedge.preprocess.camera import FrameFormat
from mmedge.specs import Array

WIDTH, HEIGHT = 8, 6
SIZES: dict[FrameFormat, tuple[int, int]] = {
    "rgb": (WIDTH * 3, HEIGHT),
    "bgr": (WIDTH * 3, HEIGHT),
    "yuyv": (WIDTH * 2, HEIGHT),
    "nv12": (WIDTH, HEIGHT * 3 // 2),
    "depth16": (WIDTH * 2, HEIGHT),
}


def noise(rows: int, row_bytes: int) -> Array:
    return np.random.default_rng(rows).integers(0, 256, (rows, row_bytes), dtype=np.uint8)


def padded(rows: Array, stride: int) -> bytes:
    return np.pad(rows, ((0, 0), (0, stride - rows.shape[1])), constant_values=77).tobytes()


def pixels(frame: RawFrame) -> Array:
    return np.asarray(decode_image(frame))


def yuv_to_rgb(yuv: Array, matrix: str, *, full_range: bool) -> Array:
    """The standards' formulas in float64: R and B from the colour differences, then G."""
    red, blue = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}[matrix]
    y, u, v = (yuv[..., plane].astype(np.float64) for plane in range(3))
    if full_range:
        y, u, v = y / 255, (u - 128) / 255, (v - 128) / 255
    else:
        y, u, v = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    g = (y - red * r - blue * b) / (1 - red - blue)
    return np.stack([r, g, b], axis=-1).clip(0, 1) * 255


@pytest.mark.parametrize("stride", [None, 37])
def test_rgb_and_bgr_frames_are_the_same_image(stride: int | None) -> None:
    rows = noise(HEIGHT, WIDTH * 3)
    data = rows.tobytes() if stride is None else padded(rows, stride)
    expected = rows.reshape(HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(
        pixels(RawFrame(data, "rgb", WIDTH, HEIGHT, stride=stride)), expected
    )
    np.testing.assert_array_equal(
        pixels(RawFrame(data, "bgr", WIDTH, HEIGHT, stride=stride)), expected[..., ::-1]
    )


@pytest.mark.parametrize("matrix", ["bt601", "bt709"])
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("stride", [None, 24])
def test_yuv_frames_become_rgb_by_their_standard(
    matrix: Any, full_range: bool, stride: int | None
) -> None:
    def check(rows: Any, form: Any) -> None:
        data = rows.tobytes() if stride is None else padded(rows, stride)
        declared = {"stride": stride, "matrix": matrix, "full_range": full_range}
        frame = RawFrame(data, form, WIDTH, HEIGHT, **declared)
        expected = yuv_to_rgb(yuv, matrix, full_range=full_range)
        np.testing.assert_allclose(pixels(frame), expected, atol=0.51)

    packed = noise(HEIGHT, WIDTH * 2)
    yuv = np.empty((HEIGHT, WIDTH, 3))
    for y in range(HEIGHT):
        for x in range(WIDTH):
            pair = packed[y, x // 2 * 4 : x // 2 * 4 + 4]
            yuv[y, x] = pair[0 if x % 2 == 0 else 2], pair[1], pair[3]
    check(packed, "yuyv")

    planes = noise(HEIGHT * 3 // 2, WIDTH)
    for y in range(HEIGHT):
        for x in range(WIDTH):
            chroma = planes[HEIGHT + y // 2, x // 2 * 2 : x // 2 * 2 + 2]
            yuv[y, x] = planes[y, x], chroma[0], chroma[1]
    check(planes, "nv12")


@pytest.mark.parametrize(
    ("yuv", "rgb"),
    [((16, 128, 128), (0, 0, 0)), ((235, 128, 128), (255, 255, 255)), ((81, 90, 240), (255, 0, 0))],
)
def test_colours_of_a_webcam(yuv: tuple[int, int, int], rgb: tuple[int, int, int]) -> None:
    y, u, v = yuv
    assert np.abs(pixels(RawFrame(bytes([y, u, y, v]), "yuyv", 2, 1)).astype(int) - rgb).max() <= 1


def test_depth_is_grey_from_near_to_far() -> None:
    depth = np.array([[0, 499, 500, 1000], [1500, 2000, 2500, 65535]], np.uint16)
    frame = RawFrame(depth.tobytes(), "depth16", 4, 2, near=500, far=2500)
    assert pixels(frame)[..., 0].tolist() == [[0, 0, 0, 64], [128, 191, 255, 255]]
    for array in (depth, depth.astype(">u2"), depth.view(np.uint8)):
        again = RawFrame(array, "depth16", 4, 2, near=500, far=2500)
        np.testing.assert_array_equal(pixels(again), pixels(frame))


def test_depth_of_the_full_range_is_what_a_16_bit_file_gives() -> None:
    depth = np.random.default_rng(0).integers(0, 1 << 16, (9, 11), dtype=np.uint16)
    file = io.BytesIO()
    Image.fromarray(depth).save(file, "PNG")
    expected = np.asarray(decode_image(file))
    np.testing.assert_array_equal(pixels(RawFrame(depth, "depth16", 11, 9)), expected)


@pytest.mark.parametrize("container", [bytes, bytearray, memoryview, np.frombuffer])
def test_any_buffer_is_taken_and_copied(container: Any) -> None:
    data = noise(HEIGHT, WIDTH * 2).tobytes()
    given = container(data, np.uint8) if container is np.frombuffer else container(data)
    frame = RawFrame(given, "yuyv", WIDTH, HEIGHT)
    np.testing.assert_array_equal(pixels(frame), pixels(RawFrame(data, "yuyv", WIDTH, HEIGHT)))
    buffer = bytearray(data)
    copied = RawFrame(buffer, "yuyv", WIDTH, HEIGHT).copy()
    buffer[:] = bytes(len(buffer))
    np.testing.assert_array_equal(pixels(copied), pixels(frame))


@pytest.mark.parametrize("extra", [-1, 1])
@pytest.mark.parametrize("form", SIZES)
def test_bytes_that_do_not_match_are_refused(form: FrameFormat, extra: int) -> None:
    row, rows = SIZES[form]
    with pytest.raises(ShapeError, match=rf"{form} 8x6.* got {row * rows + extra} bytes, expected"):
        RawFrame(bytes(row * rows + extra), form, WIDTH, HEIGHT)
    with pytest.raises(ShapeError, match=f"expected {(row + 8) * rows}"):
        RawFrame(bytes(row * rows), form, WIDTH, HEIGHT, stride=row + 8)
    with pytest.raises(InputError, match=f"stride: got {row - 1}, expected {row} bytes or more"):
        RawFrame(bytes(row * rows), form, WIDTH, HEIGHT, stride=row - 1)


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("yuv420", {}, "format: got 'yuv420', expected one of rgb, bgr, yuyv, nv12, depth16"),
        ("yuyv", {"width": 7}, "width: got 7, expected an even number"),
        ("nv12", {"height": 5}, "height: got 5, expected an even number"),
        ("rgb", {"width": 0}, "width: got 0, expected 1 or more"),
        ("rgb", {"height": -6}, "height: got -6, expected 1 or more"),
        ("rgb", {"stride": 0}, "stride: got 0, expected 24 bytes or more"),
        ("yuyv", {"matrix": "bt2020"}, "matrix: got 'bt2020', expected bt601 or bt709"),
        ("depth16", {"near": 5, "far": 5}, "near, far: got"),
        ("depth16", {"far": 70000}, "near, far: got"),
        ("depth16", {"stride": 17}, "stride: got 17, expected an even number"),
    ],
)
def test_what_cannot_be_declared_is_refused(
    form: Any, changes: dict[str, Any], message: str
) -> None:
    declared: dict[str, Any] = {"width": WIDTH, "height": HEIGHT, **changes}
    with pytest.raises(InputError, match=message):
        RawFrame(bytes(96), form, **declared)


def test_arrays_of_another_type_are_refused() -> None:
    with pytest.raises(DTypeError, match="got an array of float32, expected uint8"):
        RawFrame(np.zeros((6, 16), np.float32), "yuyv", WIDTH, HEIGHT)
    with pytest.raises(DTypeError, match="got an array of int16, expected uint8 or uint16"):
        RawFrame(np.zeros((6, 8), np.int16), "depth16", WIDTH, HEIGHT)
