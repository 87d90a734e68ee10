"""Processor configurations, frozen into the manifest at conversion."""

from __future__ import annotations

import builtins
from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmedge.preprocess.cleaning import Cleaning
from mmedge.preprocess.steps import (
    AudioStep,
    Crop,
    Decode,
    FitLength,
    ImageStep,
    LogMel,
    Normalize,
    Pad,
    Patches,
    Rescale,
    Resize,
    Step,
)

__all__ = [
    "AudioConfig",
    "ImageConfig",
    "ProcessorConfig",
    "TextConfig",
    "VectorConfig",
    "VideoConfig",
]

_Step = TypeVar("_Step", bound=Step)
_FROZEN = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
_Input: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]

_IMAGE_ORDER = (Decode, Pad, Resize, Crop, Patches, Rescale, Normalize)


class ImageConfig(BaseModel):
    """From an image to `(batch, 3, height, width)` float32, or to patches: see Patches.

    Attributes:
        input: Graph input that takes the tensor.
        steps: Decode, then at most one each of pad, resize, crop, rescale and normalize, in this
            order; patches stands in place of pad, resize and crop.
    """

    model_config = _FROZEN
    type: Literal["image"] = "image"
    input: _Input = "pixel_values"
    steps: tuple[ImageStep, ...]

    @model_validator(mode="after")
    def _check_order(self) -> ImageConfig:
        order = [_IMAGE_ORDER.index(type(step)) for step in self.steps]
        if order[:1] != [0] or order != sorted(set(order)):
            raise ValueError(
                f"steps {[step.op for step in self.steps]}; expected decode, then at most one each "
                "of pad, resize, crop, rescale, normalize, in this order"
            )
        resize = self.find(Resize)
        smooth = resize is not None and resize.resample == "gaussian"
        if (smooth and self.find(Crop)) or (self.find(Pad) and not smooth):
            raise ValueError("pad goes with a gaussian resize, and that without a crop")
        if self.find(Patches) and (resize or self.find(Pad) or self.find(Crop)):
            raise ValueError("patches go without pad, resize and crop")
        return self

    def find(self, kind: builtins.type[_Step]) -> _Step | None:
        """Return the step of a kind, None if there is none."""
        return next((step for step in self.steps if isinstance(step, kind)), None)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Graph inputs made by the processor."""
        patches = self.find(Patches)
        return (self.input,) if patches is None else (self.input, patches.shapes)

    @property
    def files(self) -> tuple[str, ...]:
        """Bundle files read by the processor."""
        return ()


class TextConfig(BaseModel):
    """From a text to `(batch, sequence)` token ids.

    Attributes:
        input: Graph input that takes the ids.
        attention_mask: Graph input that takes the mask (1 for a token, 0 for padding), or None
            where the graph has none.
        positions: Graph input that takes the positions with outputs, counted back from the last;
            all of them. None where the graph has none.
        tokenizer_file: Path in the bundle of a `tokenizer.json`, special tokens included in its
            post-processor.
        max_length: Tokens, special ones included; longer texts are truncated so that the closing
            special token stays.
        padding: `longest` pads to the longest text of the call (models whose output does not
            depend on the padding), `max_length` always pads to max_length (models trained so).
        pad_id: Id that pads on the right.
        cleaning: What is done to a text before tokenization; None for nothing. `siglip`: as
            transformers' SiglipTokenizer does, lower-case, no punctuation, white space folded.
            `lower`, `whitespace`, `canonicalize`: as open_clip's functions of these names do, after
            ftfy's repairs (without those of wrongly decoded text) and unescaping of HTML. `strip`,
            `strip_lower`: white space at both ends removed, as sentence-transformers does.
    """

    model_config = _FROZEN
    type: Literal["text"] = "text"
    input: _Input = "input_ids"
    attention_mask: _Input | None = None
    positions: _Input | None = None
    tokenizer_file: Annotated[str, Field(min_length=1, max_length=1024)] = "tokenizer.json"
    max_length: int = Field(ge=1, le=1_000_000)
    padding: Literal["longest", "max_length"]
    pad_id: int = Field(ge=0, lt=1 << 31)
    cleaning: Cleaning | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Graph inputs made by the processor."""
        named = (self.input, self.attention_mask, self.positions)
        return tuple(name for name in named if name is not None)

    @property
    def files(self) -> tuple[str, ...]:
        """Bundle files read by the processor."""
        return (self.tokenizer_file,)


class AudioConfig(BaseModel):
    """From audio to a log-mel spectrogram, float32.

    `(batch, mels, frames)` where the spectrogram's `log` is `whisper`, else `(batch, channels,
    frames, mels)` with four channels where the audio is truncated by `fusion`, else one.

    Attributes:
        input: Graph input that takes the spectrogram.
        sampling_rate: Hz; audio of another rate is resampled.
        steps: fit_length, then log_mel.
    """

    model_config = _FROZEN
    type: Literal["audio"] = "audio"
    input: _Input = "input_features"
    sampling_rate: int = Field(ge=1000, le=384_000)
    steps: tuple[AudioStep, ...]

    @model_validator(mode="after")
    def _check_steps(self) -> AudioConfig:
        if [step.op for step in self.steps] != ["fit_length", "log_mel"]:
            raise ValueError(
                f"steps {[step.op for step in self.steps]}; expected fit_length, log_mel"
            )
        if self.log_mel.max_hz > self.sampling_rate / 2:
            raise ValueError(
                f"max_hz {self.log_mel.max_hz} is above half the sampling rate {self.sampling_rate}"
            )
        if self.length.samples <= self.log_mel.fft_size // 2:
            raise ValueError(
                f"{self.length.samples} samples; expected more than half of fft_size "
                f"{self.log_mel.fft_size}"
            )
        if self.length.truncate == "fusion" and self.log_mel.log != "db":
            raise ValueError("truncation by fusion; expected log 'db' with it")
        return self

    @property
    def length(self) -> FitLength:
        """The step that fixes the number of samples."""
        return next(step for step in self.steps if isinstance(step, FitLength))

    @property
    def log_mel(self) -> LogMel:
        """The spectrogram."""
        return next(step for step in self.steps if isinstance(step, LogMel))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Graph inputs made by the processor."""
        return (self.input,)

    @property
    def files(self) -> tuple[str, ...]:
        """Bundle files read by the processor."""
        return ()


class VectorConfig(BaseModel):
    """From numbers, such as a robot's joint positions, to `(batch, size)` float32.

    Attributes:
        input: Graph input that takes them.
        size: Values in a vector.
        mean: Subtracted from each value; for min/max normalisation to -1..1, (min + max) / 2.
        std: Divides then; for min/max normalisation, (max - min) / 2.
    """

    model_config = _FROZEN
    type: Literal["vector"] = "vector"
    input: _Input
    size: int = Field(ge=1, le=65_536)
    mean: tuple[Annotated[float, Field(ge=-1e9, le=1e9)], ...]
    std: tuple[Annotated[float, Field(ge=1e-6, le=1e9)], ...]

    @model_validator(mode="after")
    def _check_sizes(self) -> VectorConfig:
        if not len(self.mean) == len(self.std) == self.size:
            raise ValueError(
                f"{len(self.mean)} means and {len(self.std)} stds; expected {self.size} of each"
            )
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        """Graph inputs made by the processor."""
        return (self.input,)

    @property
    def files(self) -> tuple[str, ...]:
        """Bundle files read by the processor."""
        return ()


class VideoConfig(BaseModel):
    """From a video to `(batch, frames, 3, height, width)` float32.

    Attributes:
        input: Graph input that takes the tensor.
        frames: Frames of a video; of a file, the middle one of each of so many equal parts.
        steps: Of each frame: see ImageConfig.
    """

    model_config = _FROZEN
    type: Literal["video"] = "video"
    input: _Input = "pixel_values"
    frames: int = Field(ge=1, le=1024)
    steps: tuple[ImageStep, ...]

    @model_validator(mode="after")
    def _check_steps(self) -> VideoConfig:
        if len(self.image.inputs) > 1:
            raise ValueError("patches of frames; expected resize and crop")
        return self

    @property
    def image(self) -> ImageConfig:
        """The preprocessing of a frame."""
        return ImageConfig(input=self.input, steps=self.steps)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Graph inputs made by the processor."""
        return (self.input,)

    @property
    def files(self) -> tuple[str, ...]:
        """Bundle files read by the processor."""
        return ()


ProcessorConfig: TypeAlias = Annotated[
    ImageConfig | TextConfig | AudioConfig | VectorConfig | VideoConfig,
    Field(discriminator="type"),
]
