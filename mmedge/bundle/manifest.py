"""The manifest: everything a device needs to know about a bundle, as one JSON document.

A minor version may only add optional fields whose absence means what it meant before. A reader
refuses a newer major outright, and a newer minor where it meets something that it does not know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, TypeAlias

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    model_validator,
)

from mmedge.bundle.figures import Figure, FigureName
from mmedge.bundle.paths import MANIFEST_NAME, BundlePath
from mmedge.bundle.search import SearchRecord
from mmedge.preprocess.config import Preprocessing
from mmedge.specs import Modality, Precision, Task, TensorSpec

__all__ = [
    "FORMAT_VERSION",
    "ContrastiveHead",
    "FileEntry",
    "Layout",
    "Manifest",
    "Parity",
    "Provenance",
    "Quality",
    "Role",
    "TensorEntry",
    "Tolerance",
    "Variant",
]

FORMAT_VERSION = "1.0"

Layout: TypeAlias = Literal["portable", "onnxruntime"]

_FROZEN = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
_DTYPES = ("bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)))
_DTYPES += ("float16", "float32", "float64")


def _check_dtype(name: str) -> str:
    if name not in _DTYPES:
        raise ValueError(f"unknown dtype {name!r}; expected one of {', '.join(_DTYPES)}")
    return name


def _check_unique(kind: str, names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{kind} {twice[0]!r} appears more than once")


AxisSize = Annotated[int, Field(ge=1)]
AxisName = Annotated[str, StringConstraints(min_length=1)]
RoleName = Annotated[str, StringConstraints(pattern="^[a-z][a-z0-9_]*$")]


class FileEntry(BaseModel):
    """Size and hash of one file of the bundle."""

    model_config = _FROZEN
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class TensorEntry(BaseModel):
    """A TensorSpec as JSON: dtype by its numpy name, a str in shape is a dynamic axis."""

    model_config = _FROZEN
    name: str = Field(min_length=1)
    dtype: Annotated[str, AfterValidator(_check_dtype)]
    shape: tuple[AxisSize | AxisName, ...]

    @classmethod
    def of(cls, spec: TensorSpec) -> TensorEntry:
        """Return the entry that describes a spec."""
        return cls(name=spec.name, dtype=spec.dtype.name, shape=spec.shape)

    def spec(self) -> TensorSpec:
        """Return the spec that this entry describes."""
        return TensorSpec(self.name, np.dtype(self.dtype), self.shape)


class Parity(BaseModel):
    """Agreement with the PyTorch original on the same inputs, measured at conversion."""

    model_config = _FROZEN
    max_abs_error: float
    cosine_mean: float
    cosine_min: float
    samples: int = Field(ge=1)


class Quality(BaseModel):
    """Fidelity to the fp32 variant on held-out data, never on calibration data.

    Attributes:
        figures: By name, more being better. Agreement with fp32, where fp32 itself has 1:
            cosine_mean, cosine_p1, cosine_min, top_k_overlap, rank_correlation,
            interchangeability, mixed_index. Tasks, where the data has captions or labels: recall@K,
            text_to_image_recall@K, image_to_text_recall@K, mixed_recall@K, zero_shot_accuracy.
        drops: What is lost of each task figure: fp32's less the variant's, on the same samples.
        top_k: The K of top_k_overlap, interchangeability and mixed_index.
        samples: Number of samples behind the figures of agreement.
        data: What they were measured on.
    """

    model_config = _FROZEN
    figures: dict[FigureName, Figure] = Field(min_length=1)
    drops: dict[FigureName, Figure] = Field(default_factory=dict)
    top_k: int = Field(ge=1)
    samples: int = Field(ge=1)
    data: str

    @model_validator(mode="after")
    def _check_drops(self) -> Quality:
        for name in self.drops:
            if name not in self.figures:
                raise ValueError(f"drop of {name!r}, which is not among the figures")
        return self

    def value(self, name: str) -> float | None:
        """Return a figure without its interval, None where it was not measured."""
        figure = self.figures.get(name)
        return None if figure is None else figure.value


class Tolerance(BaseModel):
    """How far a device's answers may lie from the golden ones before `verify` fails.

    Golden outputs are the variant's own, computed at conversion by ONNX Runtime on CPU; another
    processor rounds differently, an integer kernel more so than a float one.
    """

    model_config = _FROZEN
    cosine_min: float = Field(ge=-1, le=1)
    max_abs_error: float = Field(ge=0)


class Variant(BaseModel):
    """One precision of one role.

    Attributes:
        name: Unique within the role and usable as a file name: "fp32", "int8-dynamic", ...
        precision: The number format that a caller asks for.
        recipe: The method and its settings, as the converter used them.
        models: ONNX file by layout. "portable" holds standard ONNX operators only and is what
            engines are built from; "onnxruntime" is the same graph in the operators that ONNX
            Runtime runs fastest. Layouts may share external data. At least one is there.
        files: Every file that the variant needs, the models included.
        size_bytes: Sum over files.
        opset: Opset of the default ONNX domain.
        space: Embedding-space fingerprint; variants that share it may be mixed. None where the
            role does not embed.
        parity: Against the PyTorch original.
        quality: Against the fp32 variant; None for fp32 itself where no task was measured.
        tolerance: For the golden vectors.
        nodes: Its node table (see nodes.py), which explains the variant and is not needed to run
            it: it is not among `files`.
    """

    model_config = _FROZEN
    name: str = Field(pattern="^[a-z0-9][a-z0-9._-]*$")
    precision: Precision
    recipe: dict[str, JsonValue] = Field(default_factory=dict)
    models: dict[Layout, BundlePath] = Field(min_length=1)
    files: tuple[BundlePath, ...]
    size_bytes: int = Field(ge=0)
    opset: int = Field(ge=1)
    space: str | None = None
    parity: Parity | None = None
    quality: Quality | None = None
    tolerance: Tolerance
    nodes: BundlePath | None = None

    @model_validator(mode="after")
    def _check_files(self) -> Variant:
        _check_unique("file", self.files)
        for layout, model in self.models.items():
            if model not in self.files:
                raise ValueError(
                    f"model {model!r} of layout {layout!r} is not in the variant's files"
                )
        return self


class Role(BaseModel):
    """One graph of the model and the ladder of its variants, highest fidelity first.

    Attributes:
        modality: What it takes in.
        inputs: Its input specs.
        outputs: Its output specs.
        variants: Highest fidelity first.
        default: Name of the variant that is loaded where none is asked for: what a search chose.
            None is the first.
        search: What a search tried.
    """

    model_config = _FROZEN
    modality: Modality
    inputs: tuple[TensorEntry, ...] = Field(min_length=1)
    outputs: tuple[TensorEntry, ...] = Field(min_length=1)
    variants: tuple[Variant, ...] = Field(min_length=1)
    default: str | None = None
    search: SearchRecord | None = None

    @model_validator(mode="after")
    def _check_names(self) -> Role:
        names = {variant.name for variant in self.variants}
        if self.default is not None and self.default not in names:
            raise ValueError(f"default {self.default!r} is not among the variants {sorted(names)}")
        _check_unique("variant", (variant.name for variant in self.variants))
        _check_unique("input", (entry.name for entry in self.inputs))
        _check_unique("output", (entry.name for entry in self.outputs))
        return self


class ContrastiveHead(BaseModel):
    """How similarities become scores: logits = scale * (image @ text) + bias.

    Attributes:
        activation: `softmax` over the labels (CLIP) or `sigmoid` for each pair (SigLIP).
        logit_scale: The factor itself, not its logarithm.
        logit_bias: Added after the scale.
    """

    model_config = _FROZEN
    activation: Literal["softmax", "sigmoid"]
    logit_scale: float
    logit_bias: float = 0.0


class Provenance(BaseModel):
    """Where the bundle came from and how it was made."""

    model_config = _FROZEN
    source: str
    revision: str | None
    weights_sha256: str
    calibration_sha256: str | None = None
    calibration_samples: int = Field(default=0, ge=0)
    tools: dict[str, str]
    command: str
    created: str


class Manifest(BaseModel):
    """A bundle's `manifest.json`.

    Attributes:
        format_version: "major.minor" of this document; a reader refuses a newer major.
        name: For people.
        family: Model family ("clip", "siglip", ...).
        tasks: What the bundle can be used for.
        embedding_dim: D of the shared embedding space, None where there is none.
        roles: By role name ("image_encoder", "text_encoder", ...).
        preprocessing: Frozen, per modality.
        contrastive_head: For dual encoders.
        label_banks: Lists of labels by name.
        golden: Path of the golden vectors.
        files: Every file of the bundle except the manifest itself, by its POSIX path relative to
            the bundle.
        provenance: Source, tools and command.
    """

    model_config = _FROZEN
    format_version: str = Field(default=FORMAT_VERSION, pattern="^[0-9]+\\.[0-9]+$")
    name: str
    family: str
    tasks: tuple[Task, ...]
    embedding_dim: int | None = Field(default=None, ge=1)
    roles: dict[RoleName, Role] = Field(min_length=1)
    preprocessing: Preprocessing
    contrastive_head: ContrastiveHead | None = None
    label_banks: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    golden: BundlePath
    files: dict[BundlePath, FileEntry]
    provenance: Provenance

    @model_validator(mode="after")
    def _check_files(self) -> Manifest:
        if MANIFEST_NAME in self.files:
            raise ValueError(f"files lists {MANIFEST_NAME!r}, which cannot hold its own hash")
        for what, path in self._references():
            if path not in self.files:
                raise ValueError(f"{what} {path!r} is not listed in files")
        for role_name, role in self.roles.items():
            for variant in role.variants:
                total_bytes = sum(self.files[path].size_bytes for path in variant.files)
                if variant.size_bytes != total_bytes:
                    raise ValueError(
                        f"variant {role_name}/{variant.name}: size_bytes is {variant.size_bytes}, "
                        f"its files sum to {total_bytes}"
                    )
        return self

    def _references(self) -> Iterator[tuple[str, str]]:
        yield "golden", self.golden
        if self.preprocessing.text is not None:
            yield "tokenizer", self.preprocessing.text.tokenizer_file
        for role_name, role in self.roles.items():
            for variant in role.variants:
                for path in variant.files:
                    yield f"file of variant {role_name}/{variant.name}", path
                if variant.nodes is not None:
                    yield f"node table of variant {role_name}/{variant.name}", variant.nodes

    @model_validator(mode="after")
    def _check_preprocessing(self) -> Manifest:
        for modality, names in self._preprocessed_inputs():
            taken = {
                entry.name
                for role in self.roles.values()
                if role.modality is modality
                for entry in role.inputs
            }
            for name in names:
                if taken and name not in taken:
                    raise ValueError(
                        f"preprocessing of {modality.value} makes the input {name!r}; the roles "
                        f"of that modality take {sorted(taken)}"
                    )
        return self

    def _preprocessed_inputs(self) -> Iterator[tuple[Modality, list[str]]]:
        image, text = self.preprocessing.image, self.preprocessing.text
        if image is not None:
            yield Modality.IMAGE, [image.input]
        if text is not None:
            names = (text.input, text.attention_mask)
            yield Modality.TEXT, [name for name in names if name is not None]

    @model_validator(mode="after")
    def _check_tasks(self) -> Manifest:
        if Task.ZERO_SHOT_CLASSIFICATION in self.tasks and self.contrastive_head is None:
            raise ValueError("zero-shot classification needs a contrastive_head")
        return self
