"""Preprocessing repeated from the steps in io.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from bundles import tokenizer_json

from mmedge.bundle import Bundle
from mmedge.exports.document import VectorFile
from mmedge.exports.place import ExportFolder
from mmedge.exports.steps import describe_images, describe_texts, example_frame
from mmedge.preprocess.config import ImageConfig, TextConfig
from mmedge.preprocess.steps import (
    Crop,
    Decode,
    ImageStep,
    Normalize,
    Patches,
    Resample,
    Rescale,
    Resize,
)
from mmedge.specs import Array

FLOATS = (Rescale(factor=1 / 255), Normalize(mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28)))


def read(folder: Path, vector: VectorFile) -> Array:
    raw = np.frombuffer((folder / vector.file).read_bytes(), np.dtype(vector.dtype))
    return raw.reshape(vector.shape)


def kernel(resample: str, x: Array) -> Array:
    """The filters, written down from the words of the steps."""
    x = np.abs(x)
    if resample == "bilinear":
        return np.where(x < 1, 1 - x, 0)
    if resample == "hamming":
        return np.where(x < 1, np.sinc(x) * (0.54 + 0.46 * np.cos(np.pi * x)), 0)
    if resample == "lanczos":
        return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0)
    a = -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def resized_rows(frame: Array, wanted: int, resample: str) -> Array:
    """Along axis 1, rounded to 8 bits."""
    size = frame.shape[1]
    shrink = max(size / wanted, 1.0)
    centres = (np.arange(wanted) + 0.5) * size / wanted
    distance = (np.arange(size) + 0.5)[None] - centres[:, None]
    weights = kernel(resample, distance / shrink)
    weights /= weights.sum(axis=1, keepdims=True)
    sums = np.einsum("hwc,ow->hoc", frame.astype(np.float64), weights)
    return np.clip(np.floor(sums + 0.5), 0, 255).astype(np.uint8)


def clip(resample: Resample = "bicubic") -> ImageConfig:
    resize = Resize(mode="shortest_edge", height=24, width=24, resample=resample)
    return ImageConfig(steps=(Decode(), resize, Crop(height=24, width=24), *FLOATS))


def followed(steps: Sequence[ImageStep], frame: Array) -> tuple[Array, Array]:
    """Do what the steps say; return the 8-bit image after resize and crop, and the tensor."""
    values = frame
    for step in steps:
        if isinstance(step, Resize):
            height, width = step.height, step.width
            if step.mode == "shortest_edge":
                short, long = sorted(values.shape[:2])
                longer = int(step.height * long / short)
                upright = values.shape[0] > values.shape[1]
                height, width = (longer, step.height) if upright else (step.height, longer)
            values = resized_rows(values, width, step.resample)
            values = resized_rows(values.swapaxes(0, 1), height, step.resample).swapaxes(0, 1)
        elif isinstance(step, Crop):
            height, width = step.height, step.width
            top, left = (values.shape[0] - height) // 2, (values.shape[1] - width) // 2
            cut = np.zeros((height, width, 3), np.uint8)
            for y in range(max(0, top), min(values.shape[0], top + height)):
                for x in range(max(0, left), min(values.shape[1], left + width)):
                    cut[y - top, x - left] = values[y, x]
            values = cut
    image, floats = values, values.astype(np.float32)
    for step in steps:
        if isinstance(step, Rescale):
            floats = (values.astype(np.float64) * step.factor).astype(np.float32)
        elif isinstance(step, Normalize):
            floats = (floats - np.float32(step.mean)) / np.float32(step.std)
    return image, floats.transpose(2, 0, 1)[None]


@pytest.fixture
def folder(tiny_bundle: Bundle, tmp_path: Path) -> ExportFolder:
    return ExportFolder(tmp_path, tiny_bundle)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "lanczos", "hamming"])
def test_the_words_are_enough_to_do_it_again(folder: ExportFolder, resample: Resample) -> None:
    steps = describe_images(clip(resample), folder)
    frame = read(folder.path, steps.example.frame)
    image, tensor = followed(steps.config.steps, frame)
    off = np.abs(image.astype(int) - read(folder.path, steps.example.resized))
    assert off.max() <= 1  # Pillow's weights have 22 bits
    assert np.count_nonzero(off) <= off.size // 100
    assert np.abs(tensor - read(folder.path, steps.example.tensor)).max() <= 1.01 / 255 / 0.26
    assert f"Pillow's {resample} filter" in steps.words[1]


def test_stretching_and_an_image_smaller_than_its_crop(folder: ExportFolder) -> None:
    resize = Resize(mode="exact", height=10, width=20, resample="bilinear")
    config = ImageConfig(steps=(Decode(), resize, Crop(height=16, width=12), *FLOATS))
    steps = describe_images(config, folder)
    image, tensor = followed(config.steps, read(folder.path, steps.example.frame))
    assert image.shape == (16, 12, 3)
    assert image[0].max() == 0  # beyond the border
    assert np.abs(image.astype(int) - read(folder.path, steps.example.resized)).max() <= 1
    assert tensor.shape == steps.example.tensor.shape


def test_numbers_are_exact_after_the_resize(folder: ExportFolder) -> None:
    steps = describe_images(clip(), folder)
    _, tensor = followed(FLOATS, read(folder.path, steps.example.resized))
    np.testing.assert_array_equal(tensor, read(folder.path, steps.example.tensor))


def test_no_resize_and_no_crop_give_no_such_steps(folder: ExportFolder) -> None:
    steps = describe_images(ImageConfig(steps=(Decode(), *FLOATS)), folder)
    assert [words.split()[0] for words in steps.words] == ["Decode", "Multiply", "In", "Lay"]
    np.testing.assert_array_equal(
        read(folder.path, steps.example.frame), read(folder.path, steps.example.resized)
    )


def test_the_example_frame_is_larger_and_odd() -> None:
    frame = example_frame(224, 224)
    assert frame.shape == (281, 393, 3)
    assert frame.dtype == np.uint8
    assert len({channel.tobytes() for channel in frame.transpose(2, 0, 1)}) == 3


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer_json(), "utf-8")
    return path


def test_texts_have_their_ids_and_steps(tokenizer: Path) -> None:
    config = TextConfig(max_length=6, padding="longest", pad_id=0)
    steps = describe_texts(config, tokenizer)
    first = steps.examples[0]
    assert first.text == "a photo of a cat"
    assert first.ids == (1, 9, 10, 11, 9, 2)  # truncated, the closing token kept
    assert all(len(example.ids) <= 6 for example in steps.examples)
    assert "to the longest text of the batch" in steps.words[-1]
    assert not any("punctuation" in step for step in steps.words)


def test_canonicalization_mask_and_fixed_length_are_described(tokenizer: Path) -> None:
    config = TextConfig(
        max_length=6,
        padding="max_length",
        pad_id=0,
        cleaning="siglip",
        attention_mask="attention_mask",
    )
    steps = describe_texts(config, tokenizer)
    words = " ".join(steps.words)
    assert "punctuation" in words
    assert "exactly 6 ids" in words
    assert "attention_mask to 1" in words


def test_patches_are_described_and_have_an_example(folder: ExportFolder) -> None:
    patches = Patches(size=8, count=9, resample="bilinear")
    steps = describe_images(ImageConfig(steps=(Decode(), patches, *FLOATS)), folder)
    words = " ".join(steps.words)
    assert "at which rows * columns is 9 or less" in words
    assert "pixel_values (batch, 9, 192), zeros behind the last patch; spatial_shapes" in words
    assert "Lay out as (batch, 3, height, width)" not in words
    assert steps.example.tensor.shape == (1, 9, 192)
