"""How inputs become tensors, frozen into the manifest at conversion."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ImagePreprocessing", "Preprocessing", "Resize", "TextPreprocessing"]

_FROZEN = ConfigDict(extra="forbid", frozen=True)

Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]


class Resize(BaseModel):
    """How a frame is scaled before the crop.

    Attributes:
        mode: `shortest_edge` keeps the aspect ratio and scales the shorter side to `height`
            (which equals `width`); `exact` stretches to (height, width).
        height: Pixels.
        width: Pixels.
        resample: Pillow's filter of that name, with its antialiasing.
    """

    model_config = _FROZEN
    mode: Literal["shortest_edge", "exact"]
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    resample: Resample


class ImagePreprocessing(BaseModel):
    """From a picture to `(batch, 3, height, width)` float32, in the order of the fields.

    Attributes:
        input_name: Graph input that takes the tensor.
        resize: None leaves the size alone.
        crop_height: Centre crop after the resize, zero-padded where the picture is smaller; None
            for no crop.
        crop_width: See crop_height.
        rescale: Factor applied to the uint8 values (1/255 for most models).
        mean: Per channel (R, G, B), subtracted after the rescale.
        std: Per channel (R, G, B), divides after the mean is subtracted.
    """

    model_config = _FROZEN
    input_name: str = "pixel_values"
    resize: Resize | None
    crop_height: int | None = Field(default=None, ge=1)
    crop_width: int | None = Field(default=None, ge=1)
    rescale: float = Field(gt=0)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class TextPreprocessing(BaseModel):
    """From a text to `(batch, sequence)` token ids.

    Attributes:
        input_name: Graph input that takes the ids.
        attention_mask_name: Graph input that takes the mask (1 for a token, 0 for padding), or
            None where the graph has none.
        tokenizer_file: Path in the bundle of a `tokenizer.json`, special tokens included in its
            post-processor.
        max_length: Tokens, special ones included; longer texts are truncated so that the closing
            special token stays.
        padding: `longest` pads to the longest text of the call (models whose answer does not
            depend on the padding), `max_length` always pads to max_length (models trained so).
        pad_id: Id that pads on the right.
        canonicalize: Lower-case, strip punctuation and fold white space before tokenization, as
            SigLIP does.
    """

    model_config = _FROZEN
    input_name: str = "input_ids"
    attention_mask_name: str | None = None
    tokenizer_file: str = "tokenizer.json"
    max_length: int = Field(ge=1)
    padding: Literal["longest", "max_length"]
    pad_id: int = Field(ge=0)
    canonicalize: bool = False


class Preprocessing(BaseModel):
    """Preprocessing of every modality that a bundle takes; None where it takes none."""

    model_config = _FROZEN
    image: ImagePreprocessing | None = None
    text: TextPreprocessing | None = None
