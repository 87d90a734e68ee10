"""Preprocessing steps as text and numbers, with examples to check them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmedge.exports.document import ImageExample, ImageSteps, TextExample, TextSteps
from mmedge.exports.place import ExportFolder
from mmedge.exports.vectors import VECTORS, write_raw
from mmedge.preprocess.cleaning import CLEANING_WORDS
from mmedge.preprocess.config import ImageConfig, TextConfig
from mmedge.preprocess.decode import decode_image
from mmedge.preprocess.image import ImageProcessor
from mmedge.preprocess.steps import Crop, Decode, ImageStep, Pad, Patches, Rescale, Resize
from mmedge.preprocess.text import TextProcessor
from mmedge.specs import Array

__all__ = ["describe_images", "describe_texts", "example_frame"]

# Formulas of Pillow's filters (src/libImaging/Resample.c).
_KERNELS = {
    "nearest": "the pixel whose centre is nearest",
    "box": "1 for -0.5 < x <= 0.5",
    "bilinear": "1 - |x| for |x| < 1",
    "hamming": "sinc(x) * (0.54 + 0.46 * cos(pi * x)) for |x| < 1",
    "bicubic": "cubic convolution with a = -0.5 for |x| < 2",
    "lanczos": "sinc(x) * sinc(x / 3) for |x| < 3",
}

_TEXTS = (
    "a photo of a cat",
    "Two red robots, one blue box; 3 wheels!",
    " ".join(["a very long description of the same image"] * 15),
)


_LAID_OUT = "Lay out as (batch, 3, height, width): all R, then all G, then all B, row by row."


def describe_images(config: ImageConfig, folder: ExportFolder) -> ImageSteps:
    """Describe how images become the graph's input, and write an example of it.

    Args:
        config: The bundle's frozen configuration.
        folder: Of the document; three files are written under it.
    """
    processor = ImageProcessor(config)
    frame = example_frame(*(processor.output_size or (64, 64)))
    resized = processor.resize(decode_image(frame))
    tensor = processor([frame])[config.input]
    patches = config.find(Patches)
    place = f"{VECTORS}/image"
    return ImageSteps(
        config=config,
        words=(
            *map(_words, config.steps),
            _LAID_OUT if patches is None else _cut_words(config.input, patches),
        ),
        example=ImageExample(
            frame=write_raw(folder, f"{place}/frame.bin", "frame", frame),
            resized=write_raw(folder, f"{place}/resized.bin", "resized", resized),
            tensor=write_raw(folder, f"{place}/tensor.bin", config.input, tensor),
        ),
    )


def describe_texts(config: TextConfig, tokenizer_file: Path) -> TextSteps:
    """Describe how texts become the graph's inputs, with examples.

    Args:
        config: The bundle's frozen configuration, with the tokenizer's name in the export.
        tokenizer_file: The bundle's tokenizer.

    Raises:
        IntegrityError, BundleError: See TextProcessor.
    """
    processor = TextProcessor(config, tokenizer_file)
    examples = zip(_TEXTS, processor.tokenize(_TEXTS), strict=True)
    return TextSteps(
        config=config,
        words=tuple(_text_words(config)),
        examples=tuple(TextExample(text=text, ids=tuple(ids)) for text, ids in examples),
    )


def example_frame(height: int, width: int) -> Array:
    """Return a synthetic frame to check preprocessing: gradients and a fine grid, oversized.

    Whole numbers alone make it, so it is the same everywhere. Both sizes are odd and neither is a
    multiple of the target, so that every rounding shows.

    Args:
        height: Height of the model's input.
        width: Width of the model's input.

    Returns:
        (H, W, 3) uint8, H about 5/4 and W about 7/4 of what was given.
    """
    tall, wide = height * 5 // 4 | 1, width * 7 // 4 | 1
    y, x = np.mgrid[0:tall, 0:wide]
    red = x * 255 // (wide - 1)
    green = y * 255 // (tall - 1)
    blue = (x // 3 + y // 5) % 2 * 255
    frame: Array = np.stack([red, green, blue], axis=-1).astype(np.uint8)
    return frame


def _words(step: ImageStep) -> str:
    if isinstance(step, Decode):
        alpha = "Put transparent pixels on white" if step.alpha == "white" else "Ignore alpha"
        draft = (
            " JPEG files are decoded at 1/2, 1/4 or 1/8 of their size (libjpeg's scale_denom), the "
            "smallest whose sides are still at least twice those of the resize; whole, the outputs "
            "are nearly the same."
        )
        return (
            "Decode to 8-bit R, G, B in this order (OpenCV gives B, G, R). Apply the EXIF "
            f"orientation of a file. {alpha}; repeat greyscale three times."
            f"{draft * step.jpeg_draft}"
        )
    if isinstance(step, Patches):
        return (
            f"Resize to rows * {step.size} by columns * {step.size} with Pillow's {step.resample} "
            f"filter, {_KERNELS[step.resample]}, where rows = max(ceil(height * scale / "
            f"{step.size}), 1), columns likewise, and scale is the largest, to 1e-5, at which rows "
            f"* columns is {step.count} or less."
        )
    if isinstance(step, Pad):
        return "Pad with black to a square, at the right or the bottom; boxes are parts of it."
    if isinstance(step, Resize):
        return _resize_words(step)
    if isinstance(step, Crop):
        place = (
            "left = floor((width - crop_width) / 2), top = floor((height - crop_height) / 2), "
            "rounding towards minus infinity"
            if step.rounding == "down"
            else "left = (width - crop_width) / 2, top = (height - crop_height) / 2, rounded half "
            "to even where positive and towards 0 where negative"
        )
        return (
            f"Cut height {step.height}, width {step.width} from the centre: {place}; where the "
            f"image is smaller, pixels beyond its border are {step.fill}."
        )
    if isinstance(step, Rescale):
        return f"Multiply every value by {step.factor!r}, giving float32."
    return f"In float32, for each of R, G, B: subtract {step.mean!r}, then divide by {step.std!r}."


def _cut_words(name: str, step: Patches) -> str:
    return (
        f"Cut into patches of {step.size} x {step.size}, row by row, each pixel by pixel as R, G, "
        f"B: {name} (batch, {step.count}, {3 * step.size**2}), zeros behind the last patch; "
        f"{step.shapes} (batch, 2) int64 takes rows and columns."
    )


def _resize_words(resize: Resize) -> str:
    if resize.mode == "exact":
        size = f"Stretch to height {resize.height}, width {resize.width}"
    elif resize.mode != "shortest_edge":
        least = "smallest" if resize.mode == "cover" else "largest"
        size = (
            f"Divide both sides by the {least} of image_height / {resize.height} and image_width / "
            f"{resize.width}, rounded half to even"
        )
    else:
        size = (
            f"Scale so that the shorter side is {resize.height} and the longer "
            f"int({resize.height} * longer / shorter), cut off and not rounded"
        )
    if resize.resample == "gaussian":
        how = (
            "in floats, each axis for itself: where it shrinks by a factor f, blur with a Gaussian "
            "of deviation (f - 1) / 2, cut off after int(2 * (f - 1) + 0.5) pixels; then take the "
            "value at (i + 0.5) * f - 0.5, between two pixels linearly; beyond the border the "
            "image is mirrored, its outermost pixels not repeated (scipy.ndimage.gaussian_filter "
            "and zoom, mode mirror, grid_mode)"
        )
    elif resize.resample == "nearest":
        how = "taking the pixel whose centre is nearest"
    else:
        how = (
            f"with Pillow's {resize.resample} filter: {_KERNELS[resize.resample]}, where x is the "
            "centre of a source pixel minus that of the target pixel, in source pixels, divided by "
            "the factor of reduction when the image shrinks (antialiasing); weights are "
            "normalised to sum 1, beyond the border there is nothing; first all rows, rounded to 8 "
            "bits, then all columns, rounded to 8 bits. OpenCV's and most GPU resizers differ from "
            "it"
        )
    return f"{size}, {how}. An image that has this size already is left alone."


def _text_words(config: TextConfig) -> list[str]:
    steps = ["Decode the text as UTF-8."]
    if config.cleaning is not None:
        steps.append(CLEANING_WORDS[config.cleaning])
    steps += [
        f"Tokenize with {config.tokenizer_file} (tokenizers library, special tokens, no padding).",
        f"Truncate to {config.max_length} ids so that the closing special token stays.",
    ]
    if config.padding == "longest":
        steps.append(
            f"Pad on the right with {config.pad_id} to the longest text of the batch; more padding "
            f"does not change the answer, up to {config.max_length} ids."
        )
    else:
        steps.append(
            f"Pad on the right with {config.pad_id} to exactly {config.max_length} ids, always."
        )
    if config.attention_mask is not None:
        steps.append(f"Set {config.attention_mask} to 1 for tokens and 0 for padding, int64.")
    if config.positions is not None:
        steps.append(
            f"Set {config.positions} to the positions with outputs, counted back from the last, "
            "int64, the same in each row: 0 for the last alone."
        )
    return steps
