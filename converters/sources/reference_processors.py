"""Freezing of transformers' processors into the manifest at conversion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from mmedge.converters.sources.clean import clean_copy
from mmedge.converters.sources.config import Fields, foreign_errors, read_fields
from mmedge.converters.sources.reference_audio import audio_reference_inputs
from mmedge.converters.sources.source import Source
from mmedge.converters.sources.tokenizer import load_tokenizer
from mmedge.errors import ExportError, SourceError
from mmedge.preprocess import ImageProcessor, TextProcessor
from mmedge.preprocess.cleaning import clean
from mmedge.preprocess.config import (
    AudioConfig,
    ImageConfig,
    ProcessorConfig,
    TextConfig,
    VideoConfig,
)
from mmedge.preprocess.steps import (
    Crop,
    Decode,
    ImageStep,
    Normalize,
    Pad,
    Patches,
    Rescale,
    Resize,
)
from mmedge.specs import Array

__all__ = [
    "check_image_preprocessing",
    "check_text_preprocessing",
    "check_video_preprocessing",
    "read_image_preprocessing",
    "read_patch_preprocessing",
    "reference_inputs",
]

_FILE = "preprocessor_config.json"
_MAX_SIDE = 1 << 13
_UNCROPPED_FROM = 384  # see transformers' ConvNextImageProcessorPil.resize
_RESAMPLE: dict[object, Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}
# Sizes (height, width) that are larger and smaller than common models take, and of both aspects.
_PROBE_SIZES = ((64, 48), (240, 320), (333, 250), (17, 500))
_PROBE_TEXTS = (
    "a photo of a cat",
    "Two RED circles, left of a small square!",
    "Größe: 3½ Äpfel, naïve café — “quoted”",
    "東京タワーの写真 🗼🏽",
    "tabs\tand\nnew lines  and   spaces ",
    "word " * 300,
)


def read_image_preprocessing(source: Source, side: int | None) -> ImageConfig:
    """Freeze the Pillow image processor of transformers, which puts transparent pixels on white.

    Args:
        source: The original.
        side: Height and width that the graph takes; None where it takes any fixed size.

    Raises:
        SourceError: If it is missing, asks for a step that mmedge does not have, or gives images
            of another size.
    """
    processor = _load_image_processor(source)
    owlv2 = type(processor).__name__.startswith("Owlv2")  # resizes in floats, as scipy does
    values = processor.to_dict()
    for key in ("size", "crop_size"):
        if values.get(key) is not None and not isinstance(values[key], Mapping):
            values[key] = dict(values[key])  # transformers' SizeDict
    settings = Fields(source.folder / _FILE, values)
    pads = settings.flag("do_pad")
    if pads and not owlv2:
        raise settings.error("do_pad", "false", "mmedge pads images for OWLv2 alone.")
    steps: list[ImageStep] = [Decode(), Pad()] if pads else [Decode()]
    if settings.flag("do_resize"):
        if owlv2:
            height, width = _read_sides(settings, "size")
            steps.append(Resize(mode="exact", height=height, width=width, resample="gaussian"))
        else:
            steps += _read_resize(settings)
    if settings.flag("do_center_crop"):
        height, width = _read_sides(settings, "crop_size")
        steps.append(Crop(height=height, width=width))
    _check_size(source, steps[-1], side)
    if settings.flag("do_rescale"):
        steps.append(Rescale(factor=settings.number("rescale_factor", 1e-6, 1e3)))
    steps += _read_normalize(settings)
    return ImageConfig(steps=tuple(steps))


def read_patch_preprocessing(source: Source, size: int, most: int) -> ImageConfig:
    """Freeze the Pillow image processor of SigLIP 2 NaFlex: patches of a budget.

    Args:
        source: The original.
        size: Height and width of a patch that the model takes.
        most: Largest budget.

    Raises:
        SourceError: If it is missing, or its patches or budget are not such.
    """
    values = _load_image_processor(source).to_dict()
    settings = Fields(source.folder / _FILE, values)
    if not settings.flag("do_resize"):
        raise settings.error("do_resize", "true: patches need sides that they divide")
    if settings.integer("patch_size", 1, 1 << 10) != size:
        raise settings.error("patch_size", f"{size}, the patch_size of the model")
    patches = Patches(
        size=size,
        count=settings.integer("max_num_patches", 1, most),
        resample=settings.choice("resample", _RESAMPLE),
    )
    steps: list[ImageStep] = [Decode(), patches]
    if settings.flag("do_rescale"):
        steps.append(Rescale(factor=settings.number("rescale_factor", 1e-6, 1e3)))
    return ImageConfig(steps=(*steps, *_read_normalize(settings)))


def _read_normalize(settings: Fields) -> list[ImageStep]:
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if settings.flag("do_normalize"):
        mean = settings.triple("image_mean", -1e3, 1e3)
        std = settings.triple("image_std", 1e-6, 1e3)
    if settings.flag("rescale_offset"):  # EfficientNet's processor, as include_top
        mean = (mean[0] + 1, mean[1] + 1, mean[2] + 1)
    if settings.flag("include_top"):
        again = settings.triple("image_std", 1e-6, 1e3)
        std = (std[0] * again[0], std[1] * again[1], std[2] * again[2])
    unchanged = not any(mean) and std == (1.0, 1.0, 1.0)
    return [] if unchanged else [Normalize(mean=mean, std=std)]


def _read_resize(settings: Fields) -> list[ImageStep]:
    resample = settings.choice("resample", _RESAMPLE)
    size = settings.section("size")
    if size is not None and size.values.get("shortest_edge") is not None:
        edge = size.integer("shortest_edge", 1, _MAX_SIDE)
        if settings.values.get("crop_pct") is None:
            return [Resize(mode="shortest_edge", height=edge, width=edge, resample=resample)]
        # ConvNeXt's processor, which ResNet uses too.
        if edge >= _UNCROPPED_FROM:
            return [Resize(mode="exact", height=edge, width=edge, resample=resample)]
        whole = int(edge / settings.number("crop_pct", 0.1, 1.0))
        resize = Resize(mode="shortest_edge", height=whole, width=whole, resample=resample)
        return [resize, Crop(height=edge, width=edge)]
    height, width = _read_sides(settings, "size")
    return [Resize(mode="exact", height=height, width=width, resample=resample)]


def _read_sides(settings: Fields, key: str) -> tuple[int, int]:
    section = settings.section(key)
    if section is None:
        raise settings.error(key, "a height and a width")
    return section.integer("height", 1, _MAX_SIDE), section.integer("width", 1, _MAX_SIDE)


def _check_size(source: Source, last: ImageStep, side: int | None) -> None:
    """Check that the last resizing step gives the graph's input size, or a fixed one."""
    fixed = isinstance(last, Crop) or (isinstance(last, Resize) and last.mode == "exact")
    got = f"{last.height}x{last.width}" if isinstance(last, Crop | Resize) and fixed else "any size"
    if side is None and not fixed:
        raise SourceError(
            f"{source.folder / _FILE}: gives images of {got}, expected one size. Set "
            "do_center_crop and crop_size, or size to a height and width."
        )
    if side is not None and got != f"{side}x{side}":
        raise SourceError(
            f"{source.folder / _FILE}: gives images of {got}, but the model takes {side}x{side}. "
            f"Set do_center_crop and crop_size to {side}, or size to that height and width."
        )


def reference_inputs(source: Source, config: ProcessorConfig) -> tuple[Sequence[Any], Any]:
    """Return samples, and the outputs of the source's own processor for them.

    Args:
        source: The original.
        config: The frozen preprocessing.

    Returns:
        Samples, and tensors by name; both empty for other modalities.

    Raises:
        SourceError: If the processor rejects them.
    """
    if isinstance(config, ImageConfig):
        images = _probe_images()
        with foreign_errors(f"{source.folder / _FILE}: transformers rejects it", "Correct it."):
            return images, _load_image_processor(source)(images, return_tensors="pt")
    if isinstance(config, VideoConfig):
        # The frames of one video are prepared as the images of one batch.
        images = _probe_images()
        frames = [images[n % len(images)] for n in range(config.frames)]
        with foreign_errors(f"{source.folder / _FILE}: transformers rejects it", "Correct it."):
            return [frames], _load_image_processor(source)([frames], return_tensors="pt")
    if isinstance(config, AudioConfig):
        return audio_reference_inputs(source, config)
    if isinstance(config, TextConfig):
        tokenizer = load_tokenizer(source)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_id)
        given = [_cleaned(text, config) for text in _PROBE_TEXTS]
        with foreign_errors(f"{source.name}: its tokenizer rejects a text", "Correct it."):
            return _PROBE_TEXTS, tokenizer(
                given,
                padding=config.padding,
                truncation=True,
                max_length=config.max_length,
                return_tensors="pt",
            )
    return (), {}


def check_image_preprocessing(source: Source, config: ImageConfig, folder: Path) -> None:  # noqa: ARG001
    """Compare the frozen preprocessing with transformers' Pillow processor on noise images.

    One of them is transparent where the reference takes it: it decides the treatment of alpha.

    Raises:
        ExportError: If a pixel differs by more than one step of uint8.
    """
    _check_frames(source, config, lambda given: given)


def check_video_preprocessing(source: Source, config: VideoConfig, folder: Path) -> None:  # noqa: ARG001
    """Compare the frozen preprocessing of frames with transformers' Pillow processor of videos.

    Raises:
        ExportError: If a pixel differs by more than one step of uint8.
    """
    name = config.input
    _check_frames(source, config.image, lambda given: {name: given[name][0]})


def _check_frames(source: Source, config: ImageConfig, shown: Callable[[Any], Any]) -> None:
    reference = _load_image_processor(source)
    ours = ImageProcessor(config)
    # One step of uint8 after rescale and normalize: rounding in the resize may differ.
    rescale, normalize = config.find(Rescale), config.find(Normalize)
    allowed = (rescale.factor if rescale else 1.0) / (min(normalize.std) if normalize else 1) + 1e-5
    images = _probe_images()
    with foreign_errors(f"{source.folder / _FILE}: transformers rejects it", "Correct it."):
        composes = reference.do_convert_rgb and _composes_on_white(reference)
    if composes:
        images[-1].putalpha(Image.linear_gradient("L").resize(images[-1].size))
    for (height, width), image in zip(_PROBE_SIZES, images, strict=True):
        with foreign_errors(f"{source.folder / _FILE}: transformers rejects it", "Correct it."):
            given = shown(reference(image, return_tensors="np"))
        for name, got in ours([image]).items():
            _compare(source, f"{width}x{height}", got, np.asarray(given[name]), allowed)


def _compare(source: Source, shown: str, got: Array, expected: Array, allowed: float) -> None:
    """Check what an image becomes.

    Raises:
        ExportError: If a value differs by more than is allowed.
    """
    if got.shape != expected.shape:
        raise ExportError(
            f"{source.name}: a {shown} image becomes {got.shape}, with transformers "
            f"{expected.shape}. The preprocessing cannot be frozen."
        )
    error = float(np.abs(got - expected).max())
    if not error <= allowed:
        raise ExportError(
            f"{source.name}: a {shown} image differs from transformers' by {error:.3g} after "
            f"preprocessing, {allowed:.3g} is allowed. The preprocessing cannot be frozen."
        )


def _composes_on_white(reference: Any) -> bool:  # noqa: ANN401, transformers is untyped
    """Tell whether transformers composes on white: early releases of 5 drop alpha instead."""
    clear, white = Image.new("RGBA", (64, 64)), Image.new("RGB", (64, 64), "white")
    got, expected = (reference(one, return_tensors="np")["pixel_values"] for one in (clear, white))
    return bool(np.array_equal(got, expected))


def _probe_images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    arrays = (rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in _PROBE_SIZES)
    return [Image.fromarray(array) for array in arrays]


def check_text_preprocessing(source: Source, config: TextConfig, folder: Path) -> None:
    """Compare the frozen tokenizer with transformers' on texts of several scripts.

    Args:
        source: The original.
        config: The frozen preprocessing.
        folder: Folder of `config.tokenizer_file`.

    Raises:
        ExportError: If the ids of a text differ.
    """
    reference = load_tokenizer(source)
    ours = TextProcessor(config, folder / config.tokenizer_file)
    for text in _PROBE_TEXTS:
        got = ours([text])[config.input][0].tolist()  # bounded, as the reference is not
        with foreign_errors(f"{source.name}: its tokenizer rejects a text", "Correct it."):
            expected = reference(
                _cleaned(text, config),
                padding="max_length" if config.padding == "max_length" else False,
                truncation=True,
                max_length=config.max_length,
            )["input_ids"]
        if got != list(expected):
            raise ExportError(
                f"{source.name}: the text {text[:40]!r} becomes {got[:12]}, with transformers "
                f"{list(expected)[:12]}. The tokenizer cannot be frozen."
            )


def _is_pair(value: object) -> bool:
    pair = isinstance(value, list) and len(value) == 2
    return pair and all(type(side) is int for side in value)  # type: ignore[attr-defined]


def _cleaned(text: str, config: TextConfig) -> str:
    """Return what the source's own code passes to its tokenizer, which does the rest."""
    if config.cleaning not in {"strip", "strip_lower"}:
        return text
    return clean(text, config.cleaning) or ""


def _load_image_processor(source: Source) -> Any:  # noqa: ANN401, transformers is untyped
    # Not from transformers itself, whose 5.4 to 5.17 give a stand-in where there is no torchvision.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    if (source.folder / _FILE).exists():
        written = read_fields(source.folder / _FILE)
        for key in ("size", "crop_size"):
            value = written.values.get(key)
            if not isinstance(value, int | Mapping | None) and not _is_pair(value):
                raise written.error(key, "a number, two of them, or an object of sides")
    with (
        foreign_errors(
            f"{source.folder / _FILE}: the image processor cannot be loaded",
            "Put the preprocessor_config.json of the model into the folder.",
        ),
        clean_copy(source.folder) as folder,
    ):
        return AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
