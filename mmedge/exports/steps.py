"""Preprocessing in words and numbers, each step with something to check it by."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmedge.exports.document import (
    Crop,
    Decode,
    ImageExample,
    ImageStep,
    ImageSteps,
    Layout,
    Normalize,
    Rescale,
    ResizeTo,
    TextExample,
    TextSteps,
)
from mmedge.exports.place import ExportFolder
from mmedge.exports.vectors import VECTORS, write_raw
from mmedge.preprocess.config import ImagePreprocessing, Resize, TextPreprocessing
from mmedge.preprocess.decode import decode_image
from mmedge.preprocess.image import ImageProcessor
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
    " ".join(["a very long description of the same picture"] * 15),
)


def describe_images(config: ImagePreprocessing, folder: ExportFolder) -> ImageSteps:
    """Describe how pictures become the graph's input, and write an example of it.

    Args:
        config: The bundle's frozen preprocessing.
        folder: Of the document; three files are written under it.
    """
    processor = ImageProcessor(config)
    frame = example_frame(*(processor.output_size or (64, 64)))
    resized = processor.resize(decode_image(frame))
    tensor = processor([frame])
    place = f"{VECTORS}/image"
    return ImageSteps(
        input=config.input_name,
        steps=tuple(_image_steps(config)),
        example=ImageExample(
            frame=write_raw(folder, f"{place}/frame.bin", "frame", frame),
            resized=write_raw(folder, f"{place}/resized.bin", "resized", resized),
            tensor=write_raw(folder, f"{place}/tensor.bin", config.input_name, tensor),
        ),
    )


def describe_texts(config: TextPreprocessing, tokenizer_file: Path, tokenizer: str) -> TextSteps:
    """Describe how texts become the graph's inputs, with examples.

    Args:
        config: The bundle's frozen preprocessing.
        tokenizer_file: The bundle's tokenizer.
        tokenizer: Where it lies in the export, as the document names it.

    Raises:
        IntegrityError, BundleError: See TextProcessor.
    """
    processor = TextProcessor(config, tokenizer_file)
    examples = zip(_TEXTS, processor.tokenize(_TEXTS), strict=True)
    return TextSteps(
        input=config.input_name,
        attention_mask=config.attention_mask_name,
        tokenizer=tokenizer,
        max_length=config.max_length,
        padding=config.padding,
        pad_id=config.pad_id,
        canonicalize=config.canonicalize,
        steps=tuple(_text_steps(config, tokenizer)),
        examples=tuple(TextExample(text=text, ids=tuple(ids)) for text, ids in examples),
    )


def example_frame(height: int, width: int) -> Array:
    """Return a frame to check preprocessing by: gradients, a fine grid, larger than asked for.

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


def _image_steps(config: ImagePreprocessing) -> list[ImageStep]:
    steps: list[ImageStep] = [
        Decode(
            words="Decode to 8-bit R, G, B in this order (OpenCV gives B, G, R). Apply the EXIF "
            "orientation of a file. Put transparent pixels on white; repeat greyscale three times."
        )
    ]
    if config.resize is not None:
        steps.append(_resize_step(config.resize))
    if config.crop_height is not None or config.crop_width is not None:
        height, width = config.crop_height, config.crop_width
        steps.append(
            Crop(
                height=height,
                width=width,
                words=f"Cut {_size(height, width)} from the centre: left = floor((width - "
                "crop_width) / 2), top = floor((height - crop_height) / 2), rounding towards "
                "minus infinity; where the picture is smaller, pixels beyond its border are 0.",
            )
        )
    steps += [
        Rescale(
            factor=config.rescale,
            words=f"Multiply every value by {config.rescale!r}, giving float32.",
        ),
        Normalize(
            mean=config.mean,
            std=config.std,
            words=f"In float32, for each of R, G, B: subtract {_triple(config.mean)}, then divide "
            f"by {_triple(config.std)}.",
        ),
        Layout(
            words="Lay out as (batch, 3, height, width): all of R, then all of G, then all of B, "
            "each row by row."
        ),
    ]
    return steps


def _resize_step(resize: Resize) -> ResizeTo:
    if resize.mode == "exact":
        size = f"Stretch to height {resize.height}, width {resize.width}"
    else:
        size = (
            f"Scale so that the shorter side is {resize.height} and the longer "
            f"int({resize.height} * longer / shorter), cut off and not rounded"
        )
    if resize.resample == "nearest":
        how = "taking the pixel whose centre is nearest"
    else:
        how = (
            f"with Pillow's {resize.resample} filter: {_KERNELS[resize.resample]}, where x is the "
            "centre of a source pixel minus that of the target pixel, in source pixels, divided by "
            "the factor of reduction when the picture shrinks (antialiasing); weights are "
            "normalised to sum 1, beyond the border there is nothing; first all rows, rounded to 8 "
            "bits, then all columns, rounded to 8 bits. OpenCV's and most GPU resizers differ from "
            "it"
        )
    return ResizeTo(
        mode=resize.mode,
        height=resize.height,
        width=resize.width,
        resample=resize.resample,
        words=f"{size}, {how}. A picture that has this size already is left alone.",
    )


def _text_steps(config: TextPreprocessing, tokenizer: str) -> list[str]:
    steps = ["Decode the text as UTF-8."]
    if config.canonicalize:
        steps.append(
            "Turn U+2581 into a space, lower-case, remove the ASCII punctuation "
            "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~, fold runs of white space into one space, and "
            "trim both ends."
        )
    steps += [
        f"Tokenize with {tokenizer} (tokenizers library; special tokens on, its padding off).",
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
    if config.attention_mask_name is not None:
        steps.append(f"Set {config.attention_mask_name} to 1 for tokens and 0 for padding, int64.")
    return steps


def _size(height: int | None, width: int | None) -> str:
    parts = [f"height {height}"] if height is not None else []
    parts += [f"width {width}"] if width is not None else []
    return ", ".join(parts)


def _triple(values: tuple[float, float, float]) -> str:
    return "(" + ", ".join(repr(value) for value in values) + ")"
