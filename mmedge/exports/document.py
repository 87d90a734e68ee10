"""`io.json`: one document that describes the exported graphs for programs without mmedge.

Everything that a C++ node has to do is there in words and in numbers, and with files to check
itself by: raw arrays, little-endian, row-major, without a header.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from mmedge.bundle.kinds import ClassHead, ContrastiveHead
from mmedge.bundle.manifest import FileEntry
from mmedge.bundle.paths import BundlePath
from mmedge.bundle.quality import Tolerance
from mmedge.bundle.tensors import AxisName, AxisSize, TensorEntry
from mmedge.preprocess.config import (
    AudioConfig,
    ImageConfig,
    TextConfig,
    VectorConfig,
    VideoConfig,
)
from mmedge.specs import Axis, Modality, Precision

__all__ = [
    "IO_FORMAT_VERSION",
    "IO_NAME",
    "TOKENIZER_NAME",
    "EngineFile",
    "Graph",
    "GraphVectors",
    "ImageExample",
    "ImageSteps",
    "IoDocument",
    "ShapeBounds",
    "TextExample",
    "TextSteps",
    "TrtexecLines",
    "VectorFile",
]

IO_NAME = "io.json"
TOKENIZER_NAME = "tokenizer.json"
IO_FORMAT_VERSION = "1.0"

_FROZEN = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class VectorFile(BaseModel):
    """A raw array: little-endian, row-major (the last axis varies fastest), no header.

    Attributes:
        name: Of the tensor.
        file: Where it lies.
        dtype: numpy's name; bool is one byte, 0 or 1.
        shape: Of this array, every axis a number.
    """

    model_config = _FROZEN
    name: str = Field(min_length=1)
    file: BundlePath
    dtype: str
    shape: tuple[AxisSize, ...]


class ShapeBounds(BaseModel):
    """Shapes of one input in one profile of an engine."""

    model_config = _FROZEN
    min: tuple[NonNegativeInt, ...]
    opt: tuple[NonNegativeInt, ...]
    max: tuple[NonNegativeInt, ...]


class EngineFile(BaseModel):
    """A serialized engine, for one library version and kind of GPU.

    Attributes:
        file: The plan.
        backend: Whose library runs it: `tensorrt`, or `tensorrt-rtx`.
        version: Of the library that built it and must load it.
        compute_capability: Of the GPU, or a portability class such as "8.9+12.0".
        cuda: Version of the CUDA runtime, "" where the engine does not depend on it.
        driver: Version of the driver, "" where it was built without a GPU.
        profiles: What it takes: bounds by input name, in the order of its optimization profiles.
    """

    model_config = _FROZEN
    file: BundlePath
    backend: str
    version: str
    compute_capability: str
    cuda: str = ""
    driver: str = ""
    profiles: tuple[dict[str, ShapeBounds], ...] = ()


class TrtexecLines(BaseModel):
    """Command lines to run in the folder of this document.

    Attributes:
        build: Builds the engine.
        build_rtx: The same with the command of TensorRT for RTX.
        check: Runs it on the first golden vectors and writes its outputs as JSON.
    """

    model_config = _FROZEN
    build: str
    build_rtx: str
    check: str


class GraphVectors(BaseModel):
    """One batch of inputs with the outputs at conversion, in ONNX Runtime on a CPU.

    Attributes:
        samples: Number of samples in the batch.
        inputs: Arrays to feed.
        outputs: What to expect.
        tolerance: Largest accepted difference of outputs.
    """

    model_config = _FROZEN
    samples: int = Field(ge=1)
    inputs: tuple[VectorFile, ...]
    outputs: tuple[VectorFile, ...]
    tolerance: Tolerance


class Graph(BaseModel):
    """One variant of one role.

    Attributes:
        role: What it does: "image_encoder", ...
        variant: Which variant of it.
        precision: The number format of that variant; inputs and outputs keep their own.
        modality: What it takes in, None for arrays.
        onnx: Standard ONNX operators, QDQ where it is quantized.
        external_data: Files that the ONNX file reads, which must stay beside it.
        opset: Of the default ONNX domain.
        inputs: In the graph's order. A str in a shape names a dynamic axis.
        outputs: In the graph's order.
        axes: Bounds of the dynamic axes, by name. An engine built so refuses what lies outside, the
            ONNX file does not.
        engines: Engines built from this ONNX file.
        trtexec: How to build one.
        vectors: To check it by.
    """

    model_config = _FROZEN
    role: str
    variant: str
    precision: Precision
    modality: Modality | None
    onnx: BundlePath
    external_data: tuple[BundlePath, ...]
    opset: int = Field(ge=1)
    inputs: tuple[TensorEntry, ...] = Field(min_length=1)
    outputs: tuple[TensorEntry, ...] = Field(min_length=1)
    axes: dict[AxisName, Axis]
    engines: tuple[EngineFile, ...] = ()
    trtexec: TrtexecLines
    vectors: GraphVectors


class ImageExample(BaseModel):
    """A synthetic frame after each step.

    Attributes:
        frame: (height, width, 3) uint8, RGB: what a camera gives.
        resized: (h, w, 3) uint8, float32 after a Gaussian resize: after resize and crop.
        tensor: (1, 3, h, w) float32: what the graph takes.
    """

    model_config = _FROZEN
    frame: VectorFile
    resized: VectorFile
    tensor: VectorFile


class ImageSteps(BaseModel):
    """From an image to the graph's input.

    Attributes:
        config: The input, and the steps in order.
        words: What to do in each step, exactly, and last the layout: (batch, 3, height, width).
        example: To check them by.
    """

    model_config = _FROZEN
    config: ImageConfig
    words: tuple[str, ...]
    example: ImageExample


class TextExample(BaseModel):
    """A text and its ids, special tokens included, not padded."""

    model_config = _FROZEN
    text: str
    ids: tuple[int, ...]


class TextSteps(BaseModel):
    """From a text to the graph's inputs, (batch, sequence) int64.

    Attributes:
        config: Inputs, tokenizer (a file of this folder), length and padding.
        words: The same in words, in order.
        examples: To check them by.
    """

    model_config = _FROZEN
    config: TextConfig
    words: tuple[str, ...]
    examples: tuple[TextExample, ...]


class IoDocument(BaseModel):
    """The document.

    Attributes:
        format_version: "major.minor"; a minor version only adds fields.
        name: Of the bundle, for people.
        family: Model family ("clip", "siglip", ...).
        made_by: mmedge and its version.
        byte_order: Of every raw file.
        graphs: One for each role and variant that was exported.
        image: How images become inputs; None if no role takes images.
        text: How texts become inputs; None where nothing takes texts.
        audio: How sounds become inputs, by the formulas that io.schema.json gives with each step;
            None where nothing takes sounds.
        vectors: How vectors of numbers become inputs.
        video: How videos become inputs: the steps of `image` for each frame, (batch, frames, 3,
            height, width); None where nothing takes videos.
        scores: How cosines of an image's and a text's embedding become probabilities.
        classes: How the output `logits` becomes probabilities of labels.
        files: Size and sha256 of every other file of the folder.
    """

    model_config = _FROZEN
    format_version: str = Field(default=IO_FORMAT_VERSION, pattern="^[0-9]+\\.[0-9]+$")
    name: str
    family: str
    made_by: str
    byte_order: Literal["little"] = "little"
    graphs: tuple[Graph, ...] = Field(min_length=1)
    image: ImageSteps | None = None
    text: TextSteps | None = None
    audio: AudioConfig | None = None
    vectors: tuple[VectorConfig, ...] = ()
    video: VideoConfig | None = None
    scores: ContrastiveHead | None = None
    classes: ClassHead | None = None
    files: dict[BundlePath, FileEntry]

    @model_validator(mode="after")
    def _check_files(self) -> IoDocument:
        for graph in self.graphs:
            named = [graph.onnx, *graph.external_data]
            named += [engine.file for engine in graph.engines]
            named += [vector.file for vector in (*graph.vectors.inputs, *graph.vectors.outputs)]
            for path in named:
                if path not in self.files:
                    raise ValueError(f"{graph.role}/{graph.variant}: {path!r} is not in files")
        return self
