"""The Gaussian resize against scipy, and OWLv2's preprocessing against transformers'."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from mmedge.errors import DTypeError
from mmedge.preprocess import ImageConfig, ImageProcessor
from mmedge.preprocess.steps import Crop, Decode, ImageStep, Normalize, Pad, Rescale, Resize
from mmedge.preprocess.zoom import gaussian_resize
from mmedge.specs import Array

SIZES = [(64, 48), (240, 320), (33, 250), (17, 500), (1, 1), (2, 7), (97, 95), (40, 40), (41, 3)]
FLOATS = (
    Rescale(factor=1 / 255),
    Normalize(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)),
)


def image_of(height: int, width: int) -> Array:
    rng = np.random.default_rng(height * 10_007 + width)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def owlv2(side: int) -> ImageConfig:
    resize = Resize(mode="exact", height=side, width=side, resample="gaussian")
    return ImageConfig(steps=(Decode(), Pad(), resize, *FLOATS))


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_resize_is_scipys(height: int, width: int, square: bool) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    image = image_of(height, width)
    padded = image.astype(np.float64)
    if square:
        side = max(height, width)
        padded = np.pad(padded, ((0, side - height), (0, side - width), (0, 0)))
    factors = np.array([padded.shape[0] / 40, padded.shape[1] / 32, 1])
    blurred = ndimage.gaussian_filter(padded, np.maximum(0, (factors - 1) / 2), mode="mirror")
    expected = ndimage.zoom(blurred, 1 / factors, order=1, mode="mirror", grid_mode=True)
    got = gaussian_resize(image, 40, 32, square=square)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=2e-4)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_owlv2_is_transformers(height: int, width: int) -> None:
    pytest.importorskip("scipy")
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    image = Image.fromarray(image_of(height, width))
    reference = Owlv2ImageProcessorPil(size={"height": 24, "width": 24})
    expected = reference(image, return_tensors="np")["pixel_values"]
    processor = ImageProcessor(owlv2(24))
    assert processor.pads
    assert processor.output_size == (24, 24)
    np.testing.assert_allclose(processor([image])["pixel_values"], expected, atol=2e-6)


def test_the_stages_are_the_whole() -> None:
    processor = ImageProcessor(owlv2(24))
    images = [image_of(30, 50), image_of(50, 30)]
    frames = np.stack([processor.resize(processor.decode(image)) for image in images])
    np.testing.assert_array_equal(processor.normalize(frames), processor(images)["pixel_values"])
    with pytest.raises(DTypeError, match="got dtype uint8, expected float32"):
        processor.normalize(frames.astype(np.uint8))


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ((Decode(), Pad(), *FLOATS), "pad goes with a gaussian resize"),
        (
            (
                Decode(),
                Resize(mode="exact", height=8, width=8, resample="gaussian"),
                Crop(height=4, width=4),
            ),
            "without a crop",
        ),
    ],
)
def test_steps_that_do_not_go_together(steps: tuple[ImageStep, ...], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ImageConfig(steps=steps)


def test_a_gaussian_resize_is_exact() -> None:
    with pytest.raises(ValidationError, match="expected exact"):
        Resize(mode="shortest_edge", height=8, width=8, resample="gaussian")
