"""ImageProcessor against transformers' Pillow processors, bit for bit."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mmedge.errors import DTypeError, ImageError, InputError, ShapeError
from mmedge.preprocess import ImageConfig, ImageOptions, ImageProcessor, ImageSource
from mmedge.preprocess.steps import Crop, Decode, Normalize, Patches, Resample, Rescale, Resize
from mmedge.specs import Array

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FLOATS = (Rescale(factor=1 / 255), Normalize(mean=CLIP_MEAN, std=CLIP_STD))
RESAMPLE: dict[Resample, int] = {
    "nearest": 0,
    "lanczos": 1,
    "bilinear": 2,
    "bicubic": 3,
    "box": 4,
    "hamming": 5,
}


def clip_config(edge: int = 224, crop: int = 224, resample: Resample = "bicubic") -> ImageConfig:
    resize = Resize(mode="shortest_edge", height=edge, width=edge, resample=resample)
    return ImageConfig(steps=(Decode(), resize, Crop(height=crop, width=crop), *FLOATS))


def siglip_config(height: int = 224, width: int = 224) -> ImageConfig:
    halves = Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    resize = Resize(mode="exact", height=height, width=width, resample="bicubic")
    return ImageConfig(steps=(Decode(), resize, Rescale(factor=1 / 255), halves))


def prepared(processor: ImageProcessor, images: Sequence[ImageSource]) -> Array:
    feed = processor(images)
    assert list(feed) == ["pixel_values"]
    return feed["pixel_values"]


def clip_reference(image: Image.Image, edge: int = 224, crop: int = 224) -> Array:
    reference = CLIPImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": crop, "width": crop}
    )
    output: Array = reference(image, return_tensors="np")["pixel_values"]
    return output


def drawn(height: int, width: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(height * 10_007 + width)
    channels = {"L": 1, "RGBA": 4}.get(mode, 3)
    array = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(array[..., 0] if mode == "L" else array).convert(mode)


SIZES = [
    (224, 224), (720, 1280), (1280, 720), (480, 640), (223, 225), (225, 223), (1, 1), (1, 7),
    (7, 1), (2, 3), (333, 777), (777, 333), (10, 2000), (2000, 10), (224, 225), (448, 449),
]  # fmt: skip


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_clip_is_bitwise_equal(height: int, width: int) -> None:
    image = drawn(height, width)
    expected = clip_reference(image)
    got = prepared(ImageProcessor(clip_config()), [image])
    assert got.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_siglip_is_bitwise_equal(height: int, width: int) -> None:
    image = drawn(height, width)
    expected = SiglipImageProcessorPil()(image, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(prepared(ImageProcessor(siglip_config()), [image]), expected)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    edge=st.integers(1, 40),
    crop=st.integers(1, 60),
    mode=st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"]),
)
def test_any_size_crop_and_mode_is_bitwise_equal(
    height: int, width: int, edge: int, crop: int, mode: str
) -> None:
    # A crop larger than the resized image is padded with zeros, by the reference's rounding.
    image = drawn(height, width, mode)
    got = prepared(ImageProcessor(clip_config(edge, crop)), [image])
    np.testing.assert_array_equal(got, clip_reference(image, edge, crop))


@pytest.mark.parametrize("resample", RESAMPLE)
def test_every_filter_is_bitwise_equal(resample: Resample) -> None:
    image = drawn(61, 83)
    reference = CLIPImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        resample=RESAMPLE[resample],
    )
    expected = reference(image, return_tensors="np")["pixel_values"]
    got = prepared(ImageProcessor(clip_config(32, 32, resample)), [image])
    np.testing.assert_array_equal(got, expected)


def test_uint8_stage_is_pillows_own() -> None:
    image = drawn(72, 128)
    resized = np.asarray(image.resize((113, 64), Image.Resampling.BICUBIC))[:, 24:88]
    frame = ImageProcessor(clip_config(64, 64)).resize(image)
    assert frame.dtype == np.uint8
    assert frame.flags.c_contiguous
    np.testing.assert_array_equal(frame, resized)


def test_without_rescale_mean_and_std_are_exact() -> None:
    config = ImageConfig(steps=(Decode(),))
    image = drawn(5, 6)
    got = prepared(ImageProcessor(config), [image])
    np.testing.assert_array_equal(got[0].transpose(1, 2, 0), np.asarray(image))


def test_normalize_takes_a_batch_of_frames() -> None:
    frames = np.stack([np.asarray(drawn(8, 9)), np.asarray(drawn(9, 8)).transpose(1, 0, 2)])
    got = ImageProcessor(clip_config()).normalize(frames)
    expected = (frames.astype(np.float64) / 255 - CLIP_MEAN) / CLIP_STD
    assert got.shape == (2, 3, 8, 9)
    assert got.flags.c_contiguous
    # Against exact arithmetic; the reference's own float32 roundings are all that is left.
    assert np.abs(got.transpose(0, 2, 3, 1) - expected).max() < 5e-7


def test_batch_equals_its_images_one_by_one() -> None:
    processor = ImageProcessor(clip_config(32, 32))
    images = [drawn(40, 50), drawn(90, 33), drawn(5, 5)]
    single = np.concatenate([prepared(processor, [image]) for image in images])
    np.testing.assert_array_equal(prepared(processor, images), single)
    buffer = np.full((3, 3, 32, 32), np.nan, np.float32)
    processor.into(images, buffer)
    np.testing.assert_array_equal(buffer, single)


def test_array_of_frames_is_a_batch() -> None:
    frames = np.stack([np.asarray(drawn(40, 50)), np.asarray(drawn(40, 50))[::-1]])
    processor = ImageProcessor(clip_config(32, 32))
    np.testing.assert_array_equal(prepared(processor, frames), prepared(processor, list(frames)))


def test_output_size_is_none_if_unknown() -> None:
    assert ImageProcessor(clip_config(40, 32)).output_size == (32, 32)
    assert ImageProcessor(siglip_config(24, 48)).output_size == (24, 48)
    assert prepared(ImageProcessor(siglip_config(24, 48)), [drawn(9, 9)]).shape == (1, 3, 24, 48)
    uncropped = clip_config().steps[:2]
    assert ImageProcessor(ImageConfig(steps=uncropped)).output_size is None


def test_without_a_common_size_only_equal_images_make_a_batch() -> None:
    processor = ImageProcessor(ImageConfig(steps=(Decode(), *FLOATS)))
    assert prepared(processor, [drawn(5, 6), drawn(5, 6)]).shape == (2, 3, 5, 6)
    with pytest.raises(ShapeError, match=r"several sizes \[\(5, 6\), \(6, 5\)\]"):
        processor([drawn(5, 6), drawn(6, 5)])


def test_bad_image_among_many_is_named_by_its_position() -> None:
    with pytest.raises(ImageError, match=r"^images\[1\]: Image 'gone\.png': no such file"):
        ImageProcessor(clip_config())([drawn(8, 8), "gone.png", drawn(8, 8)])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    short=st.integers(1, 40),
    long=st.integers(41, 900),
    upright=st.booleans(),
    edge=st.integers(2, 40),
    crop=st.integers(1, 60),
    resample=st.sampled_from(["bicubic", "bilinear", "lanczos", "hamming"]),
)
def test_of_a_long_thin_image_only_what_the_crop_shows_is_computed(
    short: int, long: int, upright: bool, edge: int, crop: int, resample: Resample
) -> None:
    noise = drawn(long, short) if upright else drawn(short, long)
    # Away from black and white: where a filter overshoots, the order of Pillow's passes shows.
    image = noise.point(lambda value: 64 + value // 2)
    config = clip_config(edge, crop, resample)
    whole = ImageProcessor(config).resize(image).astype(int)
    part = ImageProcessor(config, ImageOptions(max_pixels=1)).resize(image)
    assert part.shape == whole.shape
    assert np.abs(part - whole).max() <= 1


def test_a_long_thin_image_does_not_fill_the_memory() -> None:
    strip = np.zeros((1, 60_000, 3), np.uint8)
    strip[0, 29_900:30_100] = 255  # the middle, which the crop shows
    frame = ImageProcessor(clip_config()).resize(Image.fromarray(strip))
    assert frame.shape == (224, 224, 3)
    assert frame.min() == 255
    with pytest.raises(ImageError, match=r"too long and thin.*raise max_pixels"):
        ImageProcessor(ImageConfig(steps=clip_config().steps[:2]))([strip])


def test_a_large_jpeg_equals_the_fully_decoded_one() -> None:
    y, x = np.mgrid[0:1200, 0:1600]
    waves = 127 + 120 * np.sin(x / 90) * np.cos(y / 70)
    array = np.stack([waves, x * 255 / 1599, y * 255 / 1199], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=95)
    whole = prepared(ImageProcessor(clip_config()), [buffer.getvalue()]).ravel()
    limited = ImageProcessor(clip_config(), ImageOptions(max_pixels=10**6))
    part = prepared(limited, [buffer.getvalue()]).ravel()
    cosine = float(whole @ part / np.linalg.norm(whole) / np.linalg.norm(part))
    assert cosine > 0.9999


def test_a_jpeg_draft_is_decoded_to_at_least_twice_the_target() -> None:
    config = clip_config(64, 64)
    draft = ImageConfig(steps=(Decode(jpeg_draft=True), *config.steps[1:]))
    assert ImageConfig.model_validate_json(draft.model_dump_json()) == draft
    for size, expected in {
        (255, 300): (255, 300),
        (256, 300): (128, 150),
        (1100, 1024): (138, 128),
        (8000, 200): (8000, 200),
    }.items():
        scene = drawn(12, 10).resize(size, Image.Resampling.BICUBIC)
        files = {}
        for form in ("JPEG", "PNG"):
            buffer = io.BytesIO()
            scene.save(buffer, form)
            files[form] = buffer.getvalue()
        processor = ImageProcessor(draft)
        assert processor.decode(files["JPEG"]).size == expected
        assert processor.decode(files["JPEG"], whole=True).size == size
        assert processor.decode(files["PNG"]).size == size
        assert ImageProcessor(config).decode(files["JPEG"]).size == size
        whole = prepared(ImageProcessor(config), [files["JPEG"]]).ravel()
        small = prepared(processor, [files["JPEG"]]).ravel()
        assert whole @ small / np.linalg.norm(whole) / np.linalg.norm(small) > 0.99


def test_options_reach_the_decoder() -> None:
    frame = np.asarray(drawn(9, 9, "RGBA"))
    bgr = np.ascontiguousarray(frame[..., [2, 1, 0, 3]])
    plain = prepared(ImageProcessor(clip_config()), [frame])
    turned = ImageProcessor(clip_config(), ImageOptions(channels="bgr"))
    np.testing.assert_array_equal(prepared(turned, [bgr]), plain)
    dropped = ImageProcessor(clip_config(), ImageOptions(alpha="drop"))
    np.testing.assert_array_equal(
        prepared(dropped, [frame]), prepared(ImageProcessor(clip_config()), [frame[..., :3]])
    )
    frozen = ImageConfig(steps=(Decode(alpha="drop"), *clip_config().steps[1:]))
    np.testing.assert_array_equal(
        prepared(ImageProcessor(frozen), [frame]), prepared(dropped, [frame])
    )


def test_misuse_is_explained() -> None:
    processor = ImageProcessor(clip_config(8, 8))
    image = drawn(9, 9)
    with pytest.raises(InputError, match=r"Pass \[image\]"):
        processor(np.asarray(image))
    with pytest.raises(InputError, match=r"Pass \[image\]"):
        processor("a.png")
    with pytest.raises(InputError, match="got none"):
        processor([])
    with pytest.raises(InputError, match=r"Pass list\(images\)"):
        processor(iter([image]))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected RGB"):
        processor.resize(image.convert("L"))
    with pytest.raises(ShapeError, match=r"expected \(1, 3, 8, 8\)"):
        processor.into([image], np.empty((1, 3, 9, 9), np.float32))
    with pytest.raises(ShapeError, match=r"expected \(1, 3, height, width\)"):
        processor.into([image], np.empty((2, 3, 8, 8), np.float32))
    with pytest.raises(DTypeError, match="expected float32"):
        processor.into([image], np.empty((1, 3, 8, 8), np.float64))  # type: ignore[arg-type]
    with pytest.raises(DTypeError, match="expected uint8"):
        processor.normalize(np.zeros((1, 8, 8, 3), np.float32))
    with pytest.raises(ShapeError, match="expected"):
        processor.normalize(np.zeros((8, 8, 3), np.uint8))


def test_threads_share_a_processor() -> None:
    processor = ImageProcessor(clip_config(32, 32))
    images = [drawn(40 + i, 60 - i) for i in range(20)]
    alone = [prepared(processor, [image]) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: prepared(processor, [image]), images * 5))
    for position, got in enumerate(together):
        np.testing.assert_array_equal(got, alone[position % len(images)])


def test_a_crop_that_rounds_to_nearest_is_torchvisions() -> None:
    # An odd margin: transformers takes column 1 of 17, torchvision round(1.5) = 2.
    image = drawn(16, 19)
    columns = {
        rounding: ImageConfig(
            steps=(Decode(), Crop(height=16, width=16, rounding=rounding), *FLOATS)
        )
        for rounding in ("down", "nearest")
    }
    for rounding, left in (("down", 1), ("nearest", 2)):
        frame = ImageProcessor(columns[rounding]).resize(image)
        np.testing.assert_array_equal(frame, np.asarray(image)[:, left : left + 16])


@pytest.mark.parametrize("max_pixels", [89_478_485, 100])
@pytest.mark.parametrize(("height", "width"), [(10, 33), (33, 10), (24, 24), (1, 300), (8, 12)])
def test_cover_and_fit_keep_the_aspect_ratio(height: int, width: int, max_pixels: int) -> None:
    image = drawn(height, width)
    for mode in ("cover", "fit"):
        resize = Resize(mode=mode, height=16, width=24, resample="bilinear")
        crop = Crop(height=16, width=24, rounding="nearest", fill=90)
        config = ImageConfig(steps=(Decode(), resize, crop))
        frame = ImageProcessor(config, ImageOptions(max_pixels=max_pixels)).resize(image)
        ratios = height / 16, width / 24
        ratio = max(ratios) if mode == "fit" else min(ratios)
        size = max(round(width / ratio), 1), max(round(height / ratio), 1)
        expected = np.full((16, 24, 3), 90, np.uint8)
        whole = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
        margins = [24 - size[0], 16 - size[1]]
        if mode == "fit":
            left, top = (margin // 2 for margin in margins)
            expected[top : top + size[1], left : left + size[0]] = whole
        else:
            left, top = (round(-margin / 2) for margin in margins)
            expected[:] = whole[top : top + 16, left : left + 24]
        off = np.abs(frame.astype(int) - expected)
        assert off.max() <= (0 if size[0] * size[1] <= max_pixels else 1)


@pytest.mark.parametrize("size", [(3_000_000, 1), (1, 3_000_000)])
def test_images_of_more_patches_than_the_budget_at_any_scale_are_refused(
    size: tuple[int, int],
) -> None:
    patches = Patches(size=1, count=2, resample="bilinear")
    processor = ImageProcessor(ImageConfig(steps=(Decode(), patches, *FLOATS)))
    with pytest.raises(ImageError, match=r"too long, .* more than the 2 that the model takes"):
        processor([Image.new("RGB", size)])
