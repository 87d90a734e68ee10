"""Typed preprocessing steps of the manifest and `io.json`."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "Alpha",
    "AudioStep",
    "Crop",
    "Decode",
    "FitLength",
    "ImageStep",
    "LogMel",
    "Normalize",
    "Pad",
    "Patches",
    "Resample",
    "Rescale",
    "Resize",
    "Step",
]

MAX_AREA = 1 << 26
"""Largest height x width of a step's output: 192 MiB of RGB."""

MAX_PATCHES = 1 << 14
"""Largest budget of patches: attention grows with its square."""

Alpha: TypeAlias = Literal["white", "drop"]
Resample: TypeAlias = Literal[
    "nearest", "lanczos", "bilinear", "bicubic", "box", "hamming", "gaussian"
]
Side: TypeAlias = Annotated[int, Field(ge=1, le=16_384)]
Mean: TypeAlias = Annotated[float, Field(ge=-1e3, le=1e3)]
Deviation: TypeAlias = Annotated[float, Field(ge=1e-6, le=1e3)]


class Step(BaseModel):
    """One step of preprocessing, named by `op`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Sized(Step):
    height: Side
    width: Side

    @model_validator(mode="after")
    def _check_area(self) -> _Sized:
        if self.height * self.width > MAX_AREA:
            raise ValueError(f"{self.height} x {self.width} is more than {MAX_AREA} pixels")
        return self


class Decode(Step):
    """From an image file, PIL image or array to 8-bit RGB.

    Attributes:
        alpha: `white` composites transparent pixels onto white, `drop` ignores the alpha channel.
        jpeg_draft: Decode JPEG files at 1/2, 1/4 or 1/8 of their size, the smallest whose sides
            are still at least twice those of the resize.
    """

    op: Literal["decode"] = "decode"
    alpha: Alpha = "white"
    jpeg_draft: bool = False


class Pad(Step):
    """To a square: black pixels at the right, or at the bottom."""

    op: Literal["pad"] = "pad"


class Resize(_Sized):
    """To another size, before the crop.

    Attributes:
        mode: `shortest_edge` keeps the aspect ratio and scales the shorter side to `height`
            (which equals `width`), the longer one cut off; `exact` stretches to (height, width);
            `cover` and `fit` keep the aspect ratio, for the smallest image that covers (height,
            width) and the largest that fits into it, both sides rounded, half to even.
        height: Pixels.
        width: Pixels.
        resample: Pillow's filter of that name, with its antialiasing; `gaussian` blurs an image
            that shrinks and interpolates linearly, in floats, as scipy does.
    """

    op: Literal["resize"] = "resize"
    mode: Literal["shortest_edge", "exact", "cover", "fit"]
    resample: Resample

    @model_validator(mode="after")
    def _check_edge(self) -> Resize:
        if self.resample == "gaussian" and self.mode != "exact":
            raise ValueError(f"gaussian: mode is {self.mode}; expected exact")
        if self.mode == "shortest_edge" and self.height != self.width:
            raise ValueError(
                f"shortest_edge: height {self.height} and width {self.width} differ; expected the "
                "length of the shorter side in both"
            )
        return self


class Crop(_Sized):
    """The centre, or the image within a border where it is smaller.

    Attributes:
        height: Pixels.
        width: Pixels.
        rounding: Where the margins are odd: `down` moves the window up and left, for a crop and a
            border alike (transformers); `nearest` rounds the place of a crop half to even, and puts
            the image up and left within a border (torchvision).
        fill: R, G and B of the border.
    """

    op: Literal["crop"] = "crop"
    rounding: Literal["down", "nearest"] = "down"
    fill: int = Field(ge=0, le=255, default=0)


class Patches(Step):
    """To patches, in place of resize and crop, as SigLIP 2 NaFlex takes them.

    Here the image is resized, both sides to multiples of `size`, to the largest scale at which it
    has `count` patches or fewer. After normalize it is cut: `(batch, count, size * size * 3)`,
    patches row by row, each pixel by pixel as R, G, B, and zeros behind the last.

    Attributes:
        size: Height and width of a patch, in pixels.
        count: Most patches of an image.
        resample: Pillow's filter of that name, with its antialiasing.
        shapes: Graph input that takes rows and columns of each image, `(batch, 2)` int64.
    """

    op: Literal["patches"] = "patches"
    size: int = Field(ge=1, le=1024)
    count: int = Field(ge=1, le=MAX_PATCHES)
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
    shapes: str = Field(default="spatial_shapes", min_length=1, max_length=256)

    @model_validator(mode="after")
    def _check_area(self) -> Patches:
        if self.count * self.size**2 > MAX_AREA:
            raise ValueError(
                f"{self.count} patches of {self.size} x {self.size} are more than {MAX_AREA} pixels"
            )
        return self


class Rescale(Step):
    """From 0..255 to floats.

    Attributes:
        factor: Multiplies the uint8 values (1/255 for most models).
    """

    op: Literal["rescale"] = "rescale"
    factor: float = Field(ge=1e-6, le=1e3)


class Normalize(Step):
    """To the range that the model was trained on.

    Attributes:
        mean: Subtracted, for R, G, B.
        std: Divides then, for R, G, B.
    """

    op: Literal["normalize"] = "normalize"
    mean: tuple[Mean, Mean, Mean]
    std: tuple[Deviation, Deviation, Deviation]


ImageStep: TypeAlias = Annotated[
    Decode | Pad | Resize | Crop | Patches | Rescale | Normalize, Field(discriminator="op")
]


class FitLength(Step):
    """To a fixed number of samples.

    Attributes:
        samples: At the processor's sampling rate.
        pad: For shorter audio: `zeros` appends silence; `repeat` repeats the audio and cuts it;
            `repeat_zeros` repeats the whole audio as often as it fits, then appends silence.
        truncate: For longer audio: `first` keeps the beginning, `centre` the middle; `fusion`
            keeps all, and gives four spectrograms: one of the whole, shrunk, and those of the
            middle window of each third (CLAP's fusion models).
    """

    op: Literal["fit_length"] = "fit_length"
    samples: int = Field(ge=1, le=1 << 24)
    pad: Literal["zeros", "repeat", "repeat_zeros"]
    truncate: Literal["first", "centre", "fusion"]


class LogMel(Step):
    """Log-mel spectrogram: periodic Hann window, reflected borders, power of 2.

    Attributes:
        fft_size: Samples in a window.
        hop: Samples from one window to the next.
        mels: Mel filters.
        min_hz: Lower edge of the first filter.
        max_hz: Upper edge of the last filter.
        scale: Formula of the mel scale.
        norm: `slaney` divides a filter by its width; None leaves its peak at 1.
        log: `db`: 10 log10(max(x, 1e-10)), laid out (frames, mels). `whisper`: v = log10(max(x,
            1e-10)) without the last frame, then (max(v, max(v) - 8) + 4) / 4, laid out (mels,
            frames).
    """

    op: Literal["log_mel"] = "log_mel"
    fft_size: int = Field(ge=16, le=65_536)
    hop: int = Field(ge=1, le=65_536)
    mels: int = Field(ge=1, le=1024)
    min_hz: float = Field(ge=0, le=1e6)
    max_hz: float = Field(gt=0, le=1e6)
    scale: Literal["htk", "slaney"]
    norm: Literal["slaney"] | None
    log: Literal["db", "whisper"]

    @model_validator(mode="after")
    def _check_band(self) -> LogMel:
        if self.min_hz >= self.max_hz:
            raise ValueError(f"min_hz {self.min_hz} is not below max_hz {self.max_hz}")
        return self


AudioStep: TypeAlias = Annotated[FitLength | LogMel, Field(discriminator="op")]
