"""decode_image: every kind of image, and every kind of damage."""

from __future__ import annotations

import io
import struct
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers.image_transforms import convert_to_rgb

from mmedge.errors import DTypeError, ImageError, InputError, ShapeError
from mmedge.preprocess import ImageOptions, decode_image, rgb
from mmedge.preprocess.decode import image_files
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["object", "file"])
def test_alpha_can_be_dropped_as_load_image_does(mode: str, kind: str) -> None:
    image = MODES[mode]()
    if kind == "file":
        if mode in ("PA", "CMYK", "YCbCr", "HSV"):
            pytest.skip("no PNG of this mode")
        image = Image.open(io.BytesIO(encoded(image, "PNG")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow advises to convert to RGBA first
        expected = np.asarray(image.convert("RGB"))
    for got in (decode_image(image, alpha="drop"), decode_image(image, ImageOptions(alpha="drop"))):
        np.testing.assert_array_equal(np.asarray(got), expected)
    on_white = convert_to_rgb(image, return_numpy=True)
    got = decode_image(image, ImageOptions(alpha="white"), alpha="drop")
    np.testing.assert_array_equal(np.asarray(got), on_white)


@pytest.mark.parametrize("alpha", ["white", "drop"])
def test_one_rule_of_alpha_for_paths_bytes_objects_and_arrays(alpha: Any, tmp_path: Path) -> None:
    array = pixels(channels=4)
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    expected = np.asarray(decode_image(path, alpha=alpha)).astype(int)
    for source in (path.read_bytes(), Image.open(path), Image.fromarray(array)):
        np.testing.assert_array_equal(np.asarray(decode_image(source, alpha=alpha)), expected)
    off = np.abs(np.asarray(decode_image(array, alpha=alpha)) - expected)
    assert off.max() <= 1  # the reference blends arrays in float64


@pytest.mark.parametrize("shape", [(13, 17), (13, 17, 1), (13, 17, 3), (13, 17, 4)])
def test_bgr_arrays_are_turned_and_nothing_else(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    order = {3: [2, 1, 0], 4: [2, 1, 0, 3]}.get(shape[-1])
    turned = array if order is None else array[..., order]
    bgr = ImageOptions(channels="bgr")
    np.testing.assert_array_equal(
        np.asarray(decode_image(turned, bgr)), np.asarray(decode_image(array))
    )
    image = Image.fromarray(pixels())
    for source in (image, encoded(image, "PNG")):
        np.testing.assert_array_equal(np.asarray(decode_image(source, bgr)), pixels())


def test_unknown_options_are_refused() -> None:
    with pytest.raises(InputError, match="channels: got 'brg', expected 'rgb' or 'bgr'"):
        ImageOptions(channels="brg")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="alpha: got 'black'"):
        ImageOptions(alpha="black")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_pixels: got 0"):
        ImageOptions(max_pixels=0)


def test_large_arrays_are_blended_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    array = pixels(30, 7, channels=4)
    whole = np.asarray(decode_image(array))
    monkeypatch.setattr(rgb, "_BAND", 20)
    np.testing.assert_array_equal(np.asarray(decode_image(array)), whole)


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
    # How a camera stores an upright image under each orientation (Exif 2.32, tag 0x0112).
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


@pytest.mark.parametrize("most", [65535, 1000])
def test_16_bit_pgm_is_read_as_the_same_png(most: int, tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, most + 1, (6, 8), dtype=np.uint16)
    values[0, 0] = most
    header = f"P5\n8 6\n{most}\n".encode()
    path = tmp_path / "depth.pgm"
    path.write_bytes(header + values.astype(">u2").tobytes())
    full = np.round(values * (65535 / most)).astype(np.uint16)  # the header gives the scale
    expected = np.asarray(decode_image(encoded(Image.fromarray(full), "PNG"))).astype(int)
    for source in (path, path.read_bytes(), Image.open(path)):
        off = np.abs(np.asarray(decode_image(source)) - expected)
        assert off.max() <= (0 if most == 65535 else 1)


class Stream:
    """What a network gives: read() alone, once."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, size: int = -1) -> bytes:
        assert size == -1
        data, self._data = self._data, b""
        return data


def test_bytes_and_files_of_every_kind_are_read(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(pixels()), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    written = io.BytesIO()
    written.write(data)  # stands at its end, as after image.save(buffer)
    with path.open("rb") as file, tempfile.SpooledTemporaryFile() as spooled:
        spooled.write(data)
        sources: list[Any] = [bytearray(data), memoryview(data), written, file, spooled]
        for source in (*sources, Stream(data)):
            np.testing.assert_array_equal(np.asarray(decode_image(source)), pixels())
        assert not file.closed
        np.testing.assert_array_equal(np.asarray(decode_image(file)), pixels())


def test_files_that_give_no_bytes_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("text")
    with path.open() as text, pytest.raises(InputError, match=r"Open it with mode 'rb'"):
        decode_image(text)  # type: ignore[arg-type]
    closed = io.BytesIO()
    closed.close()
    with pytest.raises(ImageError, match="cannot be read"):
        decode_image(closed)
    with pytest.raises(ImageError, match="not an image"):
        decode_image(io.BytesIO())
    with pytest.raises(ImageError, match="got no bytes"):
        decode_image(bytearray())


def test_tensors_are_read_as_their_arrays() -> None:
    tensor = torch.from_numpy(pixels())
    np.testing.assert_array_equal(np.asarray(decode_image(tensor)), pixels())
    with pytest.raises(ShapeError, match=r"tensor\.permute\(1, 2, 0\)"):
        decode_image(tensor.permute(2, 0, 1))
    with pytest.raises(InputError, match=r"Tensor: cannot be read .*detach\(\)\.cpu\(\)"):
        decode_image(torch.zeros(8, 8, 3, requires_grad=True))
    with pytest.raises(InputError, match="Tensor: cannot be read as an array"):
        decode_image(torch.zeros(8, 8, 3, device="meta"))


def test_a_pil_image_whose_file_was_closed_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for mode in ("RGB", "RGBA", "P"):
        Image.fromarray(pixels()).convert(mode).save(path)
        with Image.open(path) as image:
            pass
        with pytest.raises(ImageError, match=r"a\.png': its file was closed before it was read"):
            decode_image(image)
    read = Image.fromarray(pixels())
    read.close()
    with pytest.raises(ImageError, match="closed"):
        decode_image(read)


def large_jpeg(*, progressive: bool = False, exif: Image.Exif | None = None) -> bytes:
    """A smooth JPEG of 800x600 with the corners marked, and its orientation."""
    y, x = np.mgrid[0:600, 0:800]
    array = np.stack([x * 255 // 799, y * 255 // 599, (x + y) * 255 // 1398], -1).astype(np.uint8)
    buffer = io.BytesIO()
    exif = exif or Image.Exif()
    Image.fromarray(array).save(buffer, "JPEG", quality=95, progressive=progressive, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("max_pixels", "least_side", "size"),
    [
        (480_000, 100, (800, 600)),  # not above the limit
        (479_999, 100, (200, 150)),
        (479_999, 200, (400, 300)),
        (10_000, 60, (100, 75)),
        (479_999, 301, None),
        (479_999, 0, None),  # nothing says what is enough
        (7000, 60, None),
    ],
)
def test_a_jpeg_above_the_limit_is_decoded_at_a_fraction(
    max_pixels: int, least_side: int, size: tuple[int, int] | None, tmp_path: Path
) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(large_jpeg())
    options = ImageOptions(max_pixels=max_pixels)
    opened = Image.open(path)
    for source in (path, path.read_bytes(), opened):
        if size is None:
            with pytest.raises(ImageError, match="800x600 pixels, more than"):
                decode_image(source, options, least_side=least_side)
            continue
        got = decode_image(source, options, least_side=least_side)
        assert got.size == size
        whole = decode_image(path).resize(size, Image.Resampling.BOX)
        assert np.abs(np.asarray(got).astype(int) - np.asarray(whole)).max() <= 4
    assert opened.size == (800, 600)  # the caller's image is left alone
    assert opened.convert("RGB").size == (800, 600)


def test_a_fraction_of_a_jpeg_stands_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    got = decode_image(large_jpeg(exif=exif), ImageOptions(max_pixels=10**5), least_side=100)
    assert got.size == (150, 200)


def test_a_progressive_jpeg_above_the_limit_is_refused() -> None:
    # Its coefficients are all kept in memory, whatever size is decoded.
    with pytest.raises(ImageError, match="more than"):
        decode_image(large_jpeg(progressive=True), ImageOptions(max_pixels=10**5), least_side=50)


def test_a_jpeg_of_several_images_is_decoded_at_a_fraction_too() -> None:
    first = Image.open(io.BytesIO(large_jpeg()))
    buffer = io.BytesIO()
    first.save(buffer, "MPO", save_all=True, append_images=[first.resize((80, 60))])
    got = decode_image(buffer.getvalue(), ImageOptions(max_pixels=10**5), least_side=100)
    assert got.size == (200, 150)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(
    ("least_side", "size"), [(50, (100, 75)), (150, (200, 150)), (400, (800, 600))]
)
def test_a_jpeg_below_the_limit_is_shrunk_on_request(
    progressive: bool, least_side: int, size: tuple[int, int]
) -> None:
    data = large_jpeg(progressive=progressive)
    assert decode_image(data, least_side=least_side, shrink=True).size == size
    assert decode_image(data, least_side=least_side).size == (800, 600)
    assert decode_image(data, shrink=True).size == (800, 600)  # nothing says what is enough


class HeifFile(ImageFile.ImageFile):
    """A reader as pillow-heif registers it; here the image is a PNG behind HEIF's first bytes."""

    format = "HEIF"

    def _open(self) -> None:
        assert self.fp is not None
        self.fp.seek(12)
        with Image.open(io.BytesIO(self.fp.read())) as inner:
            self._size, self._mode, self._pixels = inner.size, inner.mode, inner.tobytes()
        self.tile = []

    def load(self) -> Any:
        self.im = Image.frombytes(self.mode, self.size, self._pixels).im
        return super().load()


HEIC = b"\0\0\0\x18ftypheic" + encoded(Image.fromarray(pixels()), "PNG")


def test_a_format_that_the_program_registers_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match=r"HEIF: install pillow-heif and call .*register_heif"):
        decode_image(HEIC)
    reader = (HeifFile, lambda prefix: prefix[4:12] == b"ftypheic")
    monkeypatch.setitem(Image.OPEN, "HEIF", reader)
    np.testing.assert_array_equal(np.asarray(decode_image(HEIC)), pixels())
    with pytest.raises(ImageError, match="more than the 10 allowed"):
        decode_image(HEIC, ImageOptions(max_pixels=10))


def test_pillows_readers_that_run_programs_stay_out() -> None:
    Image.init()  # registers them all, EPS included
    assert "EPS" in Image.OPEN
    with pytest.raises(ImageError, match="not an image that can be read"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


def test_images_of_a_folder_are_found_by_their_suffixes(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("b.PNG", "below/a.jpg", "below/note.txt", "c.heic"):
        (tmp_path / name).write_bytes(b"x")
    found = [path.relative_to(tmp_path).as_posix() for path in image_files(tmp_path)]
    assert found == ["b.PNG", "below/a.jpg", "c.heic"]


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
    path = tmp_path / "image.png"
    path.write_bytes(damaged_files()[damage])
    with pytest.raises(ImageError, match=r"image\.png"):
        decode_image(path)
    with pytest.raises(ImageError, match="bytes"):
        decode_image(path.read_bytes())


def test_every_truncation_is_an_image_error_or_the_image() -> None:
    for image_format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"):
        data = encoded(Image.fromarray(pixels(9, 9)), image_format)
        whole = decode_image(data)
        for length in range(1, len(data), 7):
            try:
                decoded = decode_image(data[:length])
            except ImageError:
                continue
            assert decoded.size == whole.size  # only trailing bytes were missing


def test_random_damage_is_an_image_error_or_an_image() -> None:
    rng = np.random.default_rng(0)
    refused = 0
    limit = ImageOptions(max_pixels=10**6)
    with warnings.catch_warnings():
        # Readers may warn of odd metadata that they could read past; that is not damage.
        warnings.simplefilter("ignore")
        for image_format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"):
            data = np.frombuffer(encoded(Image.fromarray(pixels(9, 9)), image_format), np.uint8)
            for _ in range(150):
                changed = data.copy()
                changed[rng.integers(0, len(data), 4)] = rng.integers(0, 256, 4)
                try:
                    assert decode_image(changed.tobytes(), limit).mode == "RGB"
                except ImageError:
                    refused += 1
    assert refused > 100


def test_missing_file_directory_and_odd_paths(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nowhere\.png.*no such file"):
        decode_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match=r"is a folder\. Pass it to encode_image_files"):
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
    with pytest.raises(InputError, match="not an image"):
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
    file = encoded(image, "PNG")
    assert decode_image(file, ImageOptions(max_pixels=100)).size == (10, 10)
    limit = ImageOptions(max_pixels=99)
    for source in (file, io.BytesIO(file), Image.open(io.BytesIO(file))):
        with pytest.raises(ImageError, match=r"the 99 allowed\. Raise max_pixels of load"):
            decode_image(source, limit)
    for decoded in (image, pixels(10, 10)):  # in memory already
        assert decode_image(decoded, limit).size == (10, 10)


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
