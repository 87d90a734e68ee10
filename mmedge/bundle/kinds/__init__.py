"""Kinds of models: one typed section of the manifest each, distinguished by `type`."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from mmedge.bundle.kinds.detector import DetectorKind
from mmedge.bundle.kinds.dual_encoder import ContrastiveHead, DualEncoderKind
from mmedge.bundle.kinds.embedding import EmbeddingKind
from mmedge.bundle.kinds.encoder import ClassHead, EncoderKind
from mmedge.bundle.kinds.fused import FusedKind
from mmedge.bundle.kinds.generator import GeneratorKind
from mmedge.bundle.kinds.module import ModuleKind

__all__ = [
    "ClassHead",
    "ContrastiveHead",
    "DetectorKind",
    "DualEncoderKind",
    "EmbeddingKind",
    "EncoderKind",
    "FusedKind",
    "GeneratorKind",
    "Kind",
    "ModuleKind",
]

# One line a kind.
Kind: TypeAlias = Annotated[
    DetectorKind
    | DualEncoderKind
    | EncoderKind
    | FusedKind
    | GeneratorKind
    | ModuleKind,
    Field(discriminator="type"),
]  # fmt: skip
