"""The processors of transformers, read once at conversion and frozen into the manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from PIL import Image

from mmedge.converters.sources.clean import clean_copy
from mmedge.converters.sources.source import Source
from mmedge.errors import ExportError, SourceError
from mmedge.preprocess import ImageProcessor, TextProcessor
from mmedge.preprocess.config import ImageConfig, TextConfig
from mmedge.preprocess.steps import Crop, Decode, ImageStep, Normalize, Rescale, Resize

__all__ = [
    "backend_json",
    "check_image_preprocessing",
    "check_text_preprocessing",
    "load_tokenizer",
    "read_image_preprocessing",
]

_RESAMPLE: dict[int, Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]] = {
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


def load_tokenizer(source: Source) -> Any:  # noqa: ANN401, transformers is untyped
    """Load the tokenizer as transformers does, without remote code.

    Raises:
        SourceError: If there is none.
    """
    from transformers import AutoTokenizer

    try:
        with clean_copy(source.folder) as folder:
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise SourceError(
            f"{source.name}: its tokenizer cannot be loaded ({_first_line(error)}). Put "
            "tokenizer.json, or the vocabulary files of transformers, into the folder."
        ) from error


def backend_json(source: Source, tokenizer: Any) -> str:  # noqa: ANN401, transformers is untyped
    """Return the `tokenizer.json` of a tokenizer that runs on the tokenizers library.

    Raises:
        SourceError: If it does not.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SourceError(
            f"{source.name}: {type(tokenizer).__name__} is not backed by a tokenizer.json. Save "
            "one with the tokenizers library and put it into the folder."
        )
    content = json.loads(backend.to_str())
    # Both belong to a call, not to the vocabulary; the manifest says how texts are padded.
    content["truncation"] = content["padding"] = None
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def read_image_preprocessing(source: Source) -> ImageConfig:
    """Freeze the Pillow image processor of transformers.

    Raises:
        SourceError: If it is missing or asks for a step that mmedge does not have.
    """
    processor = _load_image_processor(source)
    side = processor.size
    steps: list[ImageStep] = [Decode()]
    if processor.do_resize:
        resample = _RESAMPLE[int(processor.resample)]
        if side.shortest_edge:
            edge = int(side.shortest_edge)
            steps.append(Resize(mode="shortest_edge", height=edge, width=edge, resample=resample))
        elif side.height and side.width:
            height, width = int(side.height), int(side.width)
            steps.append(Resize(mode="exact", height=height, width=width, resample=resample))
        else:
            raise SourceError(
                f"{source.name}: preprocessor_config.json resizes by {side}; expected "
                "'shortest_edge', or 'height' and 'width'."
            )
    crop = processor.crop_size if getattr(processor, "do_center_crop", None) else None
    if getattr(processor, "do_pad", None):
        raise SourceError(f"{source.name}: preprocessor_config.json pads pictures (do_pad).")
    if crop:
        steps.append(Crop(height=int(crop.height), width=int(crop.width)))
    if processor.do_rescale:
        steps.append(Rescale(factor=float(processor.rescale_factor)))
    if processor.do_normalize:
        mean, std = _triple(processor.image_mean), _triple(processor.image_std)
        steps.append(Normalize(mean=mean, std=std))
    return ImageConfig(steps=tuple(steps))


def check_image_preprocessing(source: Source, config: ImageConfig) -> None:
    """Compare the frozen preprocessing with transformers' Pillow processor on noise pictures.

    Raises:
        ExportError: If a pixel differs by more than one step of uint8.
    """
    reference = _load_image_processor(source)
    ours = ImageProcessor(config)
    rng = np.random.default_rng(0)
    # One step of uint8 after rescale and normalize: rounding in the resize may differ.
    rescale, normalize = config.find(Rescale), config.find(Normalize)
    allowed = (rescale.factor if rescale else 1.0) / (min(normalize.std) if normalize else 1) + 1e-5
    for height, width in _PROBE_SIZES:
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = np.asarray(reference(picture, return_tensors="np")["pixel_values"])
        got = ours([picture])[config.input]
        if got.shape != expected.shape:
            raise ExportError(
                f"{source.name}: a {width}x{height} picture becomes {got.shape}, with transformers "
                f"{expected.shape}. The preprocessing cannot be frozen."
            )
        error = float(np.abs(got - expected).max())
        if not error <= allowed:
            raise ExportError(
                f"{source.name}: a {width}x{height} picture differs from transformers' by "
                f"{error:.3g} after preprocessing, {allowed:.3g} is allowed. The preprocessing "
                "cannot be frozen."
            )


def check_text_preprocessing(source: Source, folder: Path, config: TextConfig) -> None:
    """Compare the frozen tokenizer with transformers' on texts of several scripts.

    Args:
        source: The original.
        folder: Where `config.tokenizer_file` lies.
        config: The frozen preprocessing.

    Raises:
        ExportError: If the ids of a text differ.
    """
    reference = load_tokenizer(source)
    ours = TextProcessor(config, folder / config.tokenizer_file)
    for text in _PROBE_TEXTS:
        expected = reference(
            text,
            padding="max_length" if config.padding == "max_length" else False,
            truncation=True,
            max_length=config.max_length,
        )["input_ids"]
        got = ours([text])[config.input][0].tolist()
        if got != list(expected):
            raise ExportError(
                f"{source.name}: the text {text[:40]!r} becomes {got[:12]}, with transformers "
                f"{list(expected)[:12]}. The tokenizer cannot be frozen."
            )


def _load_image_processor(source: Source) -> Any:  # noqa: ANN401, transformers is untyped
    # Not from transformers itself, whose 5.4 to 5.17 give a stand-in where there is no torchvision.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    try:
        with clean_copy(source.folder) as folder:
            return AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise SourceError(
            f"{source.name}: its image processor cannot be loaded ({_first_line(error)}). Put "
            "preprocessor_config.json into the folder."
        ) from error


def _triple(values: Any) -> tuple[float, float, float]:  # noqa: ANN401, number or sequence
    spread = [values] * 3 if isinstance(values, int | float) else list(values)
    return cast("tuple[float, float, float]", tuple(float(value) for value in spread))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
