"""decode_image: every kind of picture, and every kind of damage."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from mmedge.errors import DTypeError, ImageError, InputError, ShapeError
from mmedge.preprocess import decode_image
from mmedge.specs import Array


def pixels(height: int = 13, width: int = 17, channels: int = 3) -> Array:
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(height * width).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, image_format: str, exif: Image.Exif | None = None) -> bytes:
    buffer = io.BytesIO()
    if exif is None:
        image.save(buffer, image_format)
    else:
        image.save(buffer, image_format, exif=exif)
    return buffer.getvalue()


def palette_image(transparency: int | bytes | None) -> Image.Image:
    image = Image.fromarray(pixels()).quantize(16)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def rgb_with_transparent_colour() -> Image.Image:
    image = Image.fromarray(pixels())
    image.info["transparency"] = tuple(int(v) for v in pixels()[0, 0])
    return image


MODES = {
    "RGB": lambda: Image.fromarray(pixels()),
    "RGBA": lambda: Image.fromarray(pixels(channels=4)),
    "L": lambda: Image.fromarray(pixels(channels=0)),
    "LA": lambda: Image.fromarray(pixels(channels=4)).convert("LA"),
    "PA": lambda: Image.fromarray(pixels(channels=4)).convert("LA").convert("PA"),
    "1": lambda: Image.fromarray(pixels(channels=0)).convert("1"),
    "CMYK": lambda: Image.fromarray(pixels()).convert("CMYK"),
    "YCbCr": lambda: Image.fromarray(pixels()).convert("YCbCr"),
    "HSV": lambda: Image.fromarray(pixels()).convert("HSV"),
    "P": lambda: palette_image(None),
    "P, one colour transparent": lambda: palette_image(3),
    "P, alpha for every colour": lambda: palette_image(bytes(range(0, 256, 16))),
    "RGB, one colour transparent": rgb_with_transparent_colour,
}


@pytest.mark.parametrize("mode", MODES)
def test_mode_is_converted_as_transformers_does(mode: str) -> None:
    image = MODES[mode]()
    expected = convert_to_rgb(image, return_numpy=True)
    decoded = decode_image(image)
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), expected)


@pytest.mark.parametrize("shape", [(13, 17), (13, 17, 1), (13, 17, 3), (13, 17, 4)])
def test_array_is_converted_as_transformers_does(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    reference = array[..., None] if array.ndim == 2 else array
    expected = convert_to_rgb(reference, return_numpy=True, input_data_format="channels_last")
    np.testing.assert_array_equal(np.asarray(decode_image(array)), expected)


def test_array_need_not_be_contiguous() -> None:
    bgr = pixels()
    np.testing.assert_array_equal(np.asarray(decode_image(bgr[..., ::-1])), bgr[..., ::-1])


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF", "PPM", "GIF", "JPEG", "WEBP"])
def test_file_and_bytes_are_read_as_pillow_reads_them(image_format: str, tmp_path: Path) -> None:
    data = encoded(Image.fromarray(pixels()), image_format)
    path = tmp_path / "a name without an extension"
    path.write_bytes(data)
    with Image.open(io.BytesIO(data)) as image:
        expected = convert_to_rgb(image, return_numpy=True)
    for source in (data, path, str(path)):
        np.testing.assert_array_equal(np.asarray(decode_image(source)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_a_file_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = pixels(4, 6)
    # How a camera stores an upright picture under each orientation (Exif 2.32, tag 0x0112).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif)
    np.testing.assert_array_equal(np.asarray(decode_image(data)), upright)
    # A PIL image is taken as it stands, as transformers' processors take it.
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(np.asarray(decode_image(image)), stored)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_greyscale_is_scaled_not_clipped(image_format: str) -> None:
    values = np.arange(0, 65536, 7, dtype=np.uint16)[: 96 * 96].reshape(96, 96)
    values[0, :2] = (0, 65535)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(values), image_format)))
    expected = np.round(values.astype(np.float64) * 255 / 65535).astype(np.uint8)
    np.testing.assert_array_equal(decoded, np.repeat(expected[..., None], 3, axis=2))


def test_big_endian_16_bit_tiff() -> None:
    values = np.array([[0, 257, 65535]], np.uint16)
    image = Image.frombytes("I;16B", (3, 1), values.astype(">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(decode_image(image))[0, :, 0], [0, 1, 255])


def test_32_bit_integers_are_taken_only_where_their_scale_is_known() -> None:
    known = Image.fromarray(np.array([[0, 128, 255]], np.int32))
    np.testing.assert_array_equal(np.asarray(decode_image(known))[0, :, 0], [0, 128, 255])
    with pytest.raises(ImageError, match=r"32-bit integer pixels in \[0, 70000\]"):
        decode_image(Image.fromarray(np.array([[0, 70000]], np.int32)))


@pytest.mark.parametrize(
    ("values", "expected"), [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 0.6, 255.0], [0, 1, 255])]
)
def test_float_image_is_scaled_by_its_range(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], np.float32))
    assert image.mode == "F"
    np.testing.assert_array_equal(np.asarray(decode_image(image))[0, :, 0], expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 300.0])
def test_float_image_out_of_range_is_refused(value: float) -> None:
    image = Image.fromarray(np.array([[0.0, value]], np.float32))
    with pytest.raises(ImageError, match=r"NaN or infinite|expected 0\.\.1"):
        decode_image(image)


def test_rgb_image_is_not_copied() -> None:
    image = Image.fromarray(pixels())
    assert decode_image(image) is image


def damaged_files() -> dict[str, bytes]:
    image = Image.fromarray(pixels(64, 64))
    png, jpeg = encoded(image, "PNG"), encoded(image, "JPEG")
    return {
        "empty": b"",
        "text": b"not an image at all, but long enough to be looked at",
        "truncated png": png[: len(png) // 2],
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "header alone": png[:20],
        "changed byte": png[:60] + bytes([png[60] ^ 255]) + png[61:],
        "truncated webp": encoded(image, "WEBP")[:200],
        "truncated tiff": encoded(image, "TIFF")[:100],
        "truncated gif": encoded(image, "GIF")[:200],
        "truncated bmp": encoded(image, "BMP")[:500],
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    }


@pytest.mark.parametrize("damage", damaged_files())
def test_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(damaged_files()[damage])
    with pytest.raises(ImageError, match=r"picture\.png"):
        decode_image(path)
    with pytest.raises(ImageError, match="bytes"):
        decode_image(path.read_bytes())


def test_every_truncation_is_an_image_error_or_the_picture() -> None:
    for image_format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"):
        data = encoded(Image.fromarray(pixels(9, 9)), image_format)
        whole = decode_image(data)
        for length in range(1, len(data), 7):
            try:
                decoded = decode_image(data[:length])
            except ImageError:
                continue
            assert decoded.size == whole.size  # only trailing bytes were missing


def test_random_damage_is_an_image_error_or_a_picture() -> None:
    rng = np.random.default_rng(0)
    refused = 0
    with warnings.catch_warnings():
        # Readers may warn of odd metadata that they could read past; that is not damage.
        warnings.simplefilter("ignore")
        for image_format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"):
            data = np.frombuffer(encoded(Image.fromarray(pixels(9, 9)), image_format), np.uint8)
            for _ in range(150):
                changed = data.copy()
                changed[rng.integers(0, len(data), 4)] = rng.integers(0, 256, 4)
                try:
                    assert decode_image(changed.tobytes(), max_pixels=10**6).mode == "RGB"
                except ImageError:
                    refused += 1
    assert refused > 100


def test_missing_file_directory_and_odd_paths(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nowhere\.png.*no such file"):
        decode_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="is a directory"):
        decode_image(tmp_path)
    with pytest.raises(ImageError, match="Image '': the path is empty"):
        decode_image("")
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ImageError, match="the file is empty"):
        decode_image(tmp_path / "empty.jpg")
    with pytest.raises(ImageError, match="not a regular file"):
        decode_image("/dev/null")
    with pytest.raises(ImageError, match="addresses are not fetched"):
        decode_image("https://example.org/cat.jpg")
    with pytest.raises(ImageError, match=r"cannot be read|no such file"):
        decode_image("nul\0byte.png")
    with pytest.raises(ImageError, match="cannot be read"):
        decode_image("x" * 5000)
    with pytest.raises(InputError, match="not a picture"):
        decode_image(42)  # type: ignore[arg-type]


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be enormous."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [9_460, 12_000, 60_000])
def test_decompression_bomb_is_refused_before_decoding_and_without_a_warning(side: int) -> None:
    # The sides lie above our limit, above Pillow's warning, and above Pillow's error.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ImageError, match=f"{side}x{side} pixels, more than"):
            decode_image(bomb(side, side))
    assert not caught


def test_pixel_limit_can_be_set() -> None:
    image = Image.fromarray(pixels(10, 10))
    assert decode_image(image, max_pixels=100).size == (10, 10)
    for source in (image, encoded(image, "PNG"), np.asarray(image)):
        with pytest.raises(ImageError, match="more than the 99 allowed"):
            decode_image(source, max_pixels=99)


@pytest.mark.parametrize(
    "shape", [(3, 8, 8), (8, 8, 2), (8, 8, 5), (8,), (0, 8, 3), (8, 0, 3), (2, 8, 8, 3)]
)
def test_array_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="Channels come last"):
        decode_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint16", "int64", "bool"])
def test_array_of_another_dtype_is_refused(dtype: str) -> None:
    with pytest.raises(DTypeError, match=f"got dtype {dtype}, expected uint8"):
        decode_image(np.zeros((8, 8, 3), dtype))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_array_with_nan_is_an_image_error(value: float) -> None:
    with pytest.raises(ImageError, match="NaN or infinite"):
        decode_image(np.full((8, 8, 3), value, np.float32))
