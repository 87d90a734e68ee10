"""The manifest: everything a device needs to know about a bundle, as one JSON document."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from mmedge.preprocess.config import Preprocessing
from mmedge.specs import Modality, Precision, Task, TensorSpec

__all__ = [
    "FORMAT_VERSION",
    "ContrastiveHead",
    "FileEntry",
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

_FROZEN = ConfigDict(extra="forbid", frozen=True)


class FileEntry(BaseModel):
    """Size and hash of one file of the bundle."""

    model_config = _FROZEN
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class TensorEntry(BaseModel):
    """A TensorSpec as JSON: dtype by its numpy name, a str in shape is a dynamic axis."""

    model_config = _FROZEN
    name: str
    dtype: str
    shape: tuple[int | str, ...]

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
        cosine_mean: Mean cosine of a sample's embedding with its fp32 embedding.
        cosine_p1: First percentile of the same.
        cosine_min: Minimum of the same.
        top_k: The k of top_k_overlap.
        top_k_overlap: Mean share of the k nearest neighbours that both variants agree on.
        task: Task figures by name ("text_to_image_recall@1", ...), where a labelled set was given.
        samples: Number of samples behind the cosine figures.
        data: What they were measured on.
    """

    model_config = _FROZEN
    cosine_mean: float
    cosine_p1: float
    cosine_min: float
    top_k: int = Field(ge=1)
    top_k_overlap: float
    task: dict[str, float] = Field(default_factory=dict)
    samples: int = Field(ge=1)
    data: str


class Tolerance(BaseModel):
    """How far a device's answers may lie from the golden ones before `verify` fails.

    Golden outputs are the variant's own, computed at conversion by ONNX Runtime on CPU; another
    processor rounds differently, an integer kernel more so than a float one.
    """

    model_config = _FROZEN
    cosine_min: float
    max_abs_error: float


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
        quality: Against the fp32 variant; None for fp32 itself.
        tolerance: For the golden vectors.
    """

    model_config = _FROZEN
    name: str = Field(pattern="^[a-z0-9][a-z0-9._-]*$")
    precision: Precision
    recipe: dict[str, JsonValue] = Field(default_factory=dict)
    models: dict[Literal["portable", "onnxruntime"], str] = Field(min_length=1)
    files: tuple[str, ...]
    size_bytes: int = Field(ge=0)
    opset: int
    space: str | None = None
    parity: Parity | None = None
    quality: Quality | None = None
    tolerance: Tolerance


class Role(BaseModel):
    """One graph of the model and the ladder of its variants, highest fidelity first."""

    model_config = _FROZEN
    modality: Modality
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    variants: tuple[Variant, ...] = Field(min_length=1)


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
    calibration_samples: int = 0
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
    format_version: str = Field(default=FORMAT_VERSION, pattern=r"^\d+\.\d+$")
    name: str
    family: str
    tasks: tuple[Task, ...]
    embedding_dim: int | None = Field(default=None, ge=1)
    roles: dict[str, Role] = Field(min_length=1)
    preprocessing: Preprocessing
    contrastive_head: ContrastiveHead | None = None
    label_banks: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    golden: str
    files: dict[str, FileEntry]
    provenance: Provenance
